"""Experiments: a paper's claims re-measured, with published, measured and verdict side by side.

An experiment splits its work into cells (one training run, say) and asks `CellCache` for each; a run that is
killed resumes with the cells that are on disk. Its result is plain data - tables, verdicts, plots, rows -
which `reproduce` writes as JSON, Markdown and PNG.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from zoo.errors import ConfigError
from zoo.harness.tables import Plot, Series, Table, Verdict
from zoo.registry import EXPERIMENTS
from zoo.shared.store.io import atomic_write, write_json

try:
    import fcntl
except ModuleNotFoundError:  # Windows: there one process computes all cells
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
WAIT = 0.5  # seconds until work that other processes are doing is asked for again

__all__ = [
    "CellBusy",
    "CellCache",
    "Experiment",
    "ExperimentResult",
    "Plot",
    "Reproduction",
    "Series",
    "Table",
    "Verdict",
    "get_experiment",
    "reproduce",
    "share",
    "write_result",
]


class CellBusy(Exception):
    """Another process is computing the cell at this moment; see `share`."""


class CellCache:
    """Results of finished pieces of work, one JSON file per key, so that an interrupted run can go on.

    A key is a flat description of everything that decides the value (method, data set, level, seed, steps,
    and a version of the code's meaning). Files are written atomically; one that cannot be read counts as
    missing.

    Attributes:
        sharing: whether other processes may be working on the same folder, so that a cell is claimed before
            it is computed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.sharing = False
        self.hits = 0
        self.misses = 0

    def path(self, key: Mapping[str, Any]) -> Path:
        """The file of a key."""
        text = json.dumps(key, sort_keys=True, allow_nan=False)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def get(self, key: Mapping[str, Any]) -> Any | None:
        """The stored value, or None."""
        try:
            stored = json.loads(self.path(key).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        same = isinstance(stored, dict) and stored.get("key") == json.loads(json.dumps(key))
        return stored.get("value") if same else None

    def put(self, key: Mapping[str, Any], value: Any, seconds: float = 0.0) -> None:
        """Store a JSON value."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path(key), {"key": dict(key), "value": value, "seconds": round(seconds, 3)})

    def cell(self, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The value of a key: from the disk, or computed, stored and returned.

        The value passes through JSON in both cases, so that a resumed run sees exactly what a fresh one does.

        Raises:
            CellBusy: while sharing, another process computes it.
        """
        if (value := self.get(key)) is not None:
            self.hits += 1
            return value
        with self._claim(key):
            if self.sharing and (value := self.get(key)) is not None:  # finished a moment ago
                self.hits += 1
                return value
            start = time.perf_counter()
            value = json.loads(json.dumps(compute(), allow_nan=False))
            self.put(key, value, time.perf_counter() - start)
            self.misses += 1
            return value

    @contextmanager
    def _claim(self, key: Mapping[str, Any]) -> Iterator[None]:
        """Keeps other processes off a cell; the system ends the claim of a process that dies."""
        if not self.sharing or fcntl is None:
            yield
            return
        folder = self.folder / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / self.path(key).stem).open("w") as claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CellBusy(str(dict(key))) from None
            yield


def share(
    work: Sequence[tuple[str, Callable[[], T]]],
    cells: CellCache,
    progress: Callable[..., None] | None = None,
) -> list[T]:
    """The results of pieces of work, in their order.

    Several processes that run the same work on the same folder of cells divide it among themselves: what
    another is computing is put off until it is there.

    Args:
        work: a note for the progress, and what makes the result through `cells`.
        cells: the cells that the work asks.
        progress: called as the pieces finish.
    """
    cells.sharing = True
    found: dict[int, T] = {}
    waiting = list(range(len(work)))
    while waiting:
        busy = []
        for index in waiting:
            note, make = work[index]
            try:
                found[index] = make()
            except CellBusy:
                busy.append(index)
                continue
            if progress is not None:
                progress(len(found), len(work), note)
        if len(busy) == len(waiting):
            time.sleep(WAIT)
        waiting = busy
    return [found[index] for index in range(len(work))]


@dataclasses.dataclass(frozen=True)
class ExperimentResult:
    """What an experiment found. `rows` are the raw measurements, one flat dictionary each."""

    tables: list[Table]
    verdicts: list[Verdict]
    plots: list[Plot] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


class Experiment(ABC):
    """A paper's small experiment. Subclasses register in `zoo.registry.EXPERIMENTS`.

    Attributes:
        name: what `zoo reproduce` takes.
        title: one line.
        paper: reference of the paper.
        config_class: a dataclass with defaults; its fields become the options of `zoo reproduce NAME`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    config_class: ClassVar[type]

    @abstractmethod
    def run(
        self, config: Any, cells: CellCache, progress: Callable[..., None] | None = None
    ) -> ExperimentResult:
        """Run with `config` (an instance of `config_class`), asking `cells.cell(key, compute)` for each
        piece of work.

        `progress(done, total, note)` is called as the cells finish (see `zoo.harness.tasks.Progress`).
        """


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A finished experiment and the files that were written."""

    experiment: type[Experiment] | Experiment
    config: Any
    result: ExperimentResult
    seconds: float
    files: list[Path]


def get_experiment(name: str) -> Experiment:
    """The experiment of that name, ready to run.

    Raises:
        UnknownNameError: nobody registered it.
        ConfigError: the entry is not an experiment.
    """
    entry: Any = EXPERIMENTS.get(name)
    experiment = entry() if isinstance(entry, type) else entry
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"{name!r} is registered as an experiment, but {entry!r} is not a zoo Experiment")
    return experiment


def reproduce(
    name: str,
    config: Any = None,
    *,
    out: str | Path = "results",
    cells: str | Path | None = None,
    progress: Callable[..., None] | None = None,
    **options: Any,
) -> Reproduction:
    """Run an experiment and write `NAME.json`, `NAME.md` and one PNG per plot into `out`.

    Args:
        name: of the experiment.
        config: an instance of its `config_class`; or give single `options`, fields of that class.
        out: folder of the results; made if need be.
        cells: folder of the finished cells, for resuming; by default in the cache folder.
        progress: called as the cells finish.

    Raises:
        UnknownNameError: no such experiment.
        ConfigError: an option that the experiment does not have, or a config of another class.
    """
    from zoo.bundles.catalog import cache_folder

    experiment = get_experiment(name)
    config = _config(experiment, config, options)
    folder = Path(cells) if cells is not None else cache_folder() / "cells" / name
    cache = CellCache(folder)
    start = time.perf_counter()
    result = experiment.run(config, cache, progress)
    seconds = time.perf_counter() - start
    files = write_result(experiment, config, result, Path(out), seconds=seconds, cells=cache)
    return Reproduction(experiment, config, result, seconds, files)


def write_result(
    experiment: Experiment,
    config: Any,
    result: ExperimentResult,
    out: Path,
    *,
    seconds: float,
    cells: CellCache,
) -> list[Path]:
    """Write the JSON, the Markdown and the pictures of a result; each file whole or not at all."""
    from zoo.harness.records import Environment, now
    from zoo.report import markdown, plots

    out.mkdir(parents=True, exist_ok=True)
    environment = Environment.here()
    options = dataclasses.asdict(config)
    written = [out / f"{experiment.name}.json"]
    content = {
        "experiment": experiment.name,
        "paper": experiment.paper,
        "config": options,
        "result": dataclasses.asdict(result),
        "seconds": round(seconds, 1),
        "cells": {"from_cache": cells.hits, "computed": cells.misses},
        "created": now(),
        "environment": environment.model_dump(),
    }
    write_json(written[0], json.loads(json.dumps(content, default=str)))
    pictures = {}
    for plot in result.plots:
        picture = out / f"{experiment.name}-{plot.name}.png"
        atomic_write(picture, plots.png(plot))
        pictures[plot.name] = picture.name
        written.append(picture)
    facts = {
        "Paper": experiment.paper,
        "Command": f"zoo reproduce {experiment.name}",
        "Options": ", ".join(f"{key} = {value}" for key, value in options.items()),
        "Time": f"{seconds:.0f} s, {cells.misses} cells computed and {cells.hits} from the cache",
        "Machine": f"{environment.cpu}, {environment.cpus} CPUs, {environment.threads} threads, "
        f"torch {environment.torch}",
    }
    text = markdown.experiment_report(experiment.title, result, facts=facts, plot_files=pictures)
    written.append(atomic_write(out / f"{experiment.name}.md", text.encode()))
    return written


def _config(experiment: Experiment, config: Any, options: Mapping[str, Any]) -> Any:
    expected = experiment.config_class
    if config is not None:
        if options:
            raise ConfigError(f"give either a config or options to {experiment.name!r}, not both")
        if not isinstance(config, expected):
            raise ConfigError(
                f"{experiment.name!r} takes a {expected.__name__}; received {type(config).__name__}"
            )
        return config
    known = [field.name for field in dataclasses.fields(expected)]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(
            f"experiment {experiment.name!r} has no option {unknown[0]!r}; it has: {', '.join(known)}"
        )
    return expected(**options)
