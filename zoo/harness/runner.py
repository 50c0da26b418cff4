"""The runner: models x tasks x executions, each cell cached by content, so that a run that was killed goes
on."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from zoo.bundles.catalog import CACHE_REMEDY, cache_folder
from zoo.bundles.store import Execution
from zoo.errors import TaskError, UnknownNameError
from zoo.harness.records import (
    Cost,
    Environment,
    MetricValue,
    Pair,
    PeakMemory,
    Record,
    Samples,
    now,
    zoo_version,
)
from zoo.harness.subjects import Models, Subject, resolve
from zoo.harness.tasks import Progress, Task, TaskResult, get_task
from zoo.harness.workers import workers
from zoo.names import is_glob
from zoo.registry import TASKS
from zoo.shared.errors import SparseError, StorageError
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.store.identity import code_digest, data_digest, state_digest
from zoo.shared.store.kept import keep_in_mind

_log = logging.getLogger("zoo")
Tasks = str | Task | Iterable[str | Task]


@dataclass(frozen=True)
class Cell:
    """One run: a subject, a task, an execution, and their content address."""

    subject: Subject
    task: Task
    execution: Execution
    seed: int

    @functools.cached_property
    def code_sha256(self) -> str:
        """Digest of the code that measures; "" if it is unknown."""
        return code_digest(self.task, run_cell)

    def key(self) -> str:
        """Digest of all that decides the result; "" where some of it is unknown, or another run may
        give another result, and nothing may be kept.

        That is: the model (`Subject.identity`), the task with its state, version, code and data, the
        execution, the seed, and the versions of the libraries. Not the machine: back-ends agree within 1e-5.
        """
        if not self.task.repeatable:
            return ""
        parts = (
            self.subject.identity(),
            state_digest(self.task),
            data_digest([self.task.measured_on()]),
            self.code_sha256,
        )
        if not all(parts):
            return ""
        named = [self.task.name, self.task.version, self.execution, self.seed, zoo_version()]
        return data_digest([parts, named])


def evaluate(
    models: Models,
    tasks: Tasks | None = None,
    executions: Sequence[Execution] = ("masked",),
    *,
    twins: bool = False,
    seed: int = 0,
    use_cache: bool | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Evaluate models on tasks.

    Finished cells of bundles are kept in the cache folder and found again by content: the weights and other
    state of the model, the task's state and data, the code of both, the execution, the seed and the versions
    of the libraries. So a second run, also after a kill, measures only what is missing. A cell whose code or
    data cannot be known (see `zoo.shared.store.identity`) is measured each time. Under `accelerate launch`
    the cells are shared out over the processes, and every process returns all records.

    Args:
        models: names, globs (`graph/*cora*`), folders of bundles or modules, one or many.
        tasks: names, globs or tasks; by default those with a figure on each model's card. A task that does
            not accept a model is left out for it.
        executions: `masked`, `packed`, or both. Modules are evaluated as they are.
        twins: also evaluate the dense twin of each model.
        seed: of Python's, numpy's and torch's generators, set anew for each cell.
        use_cache: None keeps and finds the cells of bundles, True those of bare modules, too; False measures
            everything again, and what it measures of bundles replaces the records that are kept.
        out: folder for a copy of each record as `<model>--<task>--<execution>.json`.
        progress: called as cells finish.

    Returns:
        One record per cell, ordered by model, execution and task.

    Raises:
        UnknownNameError: a model or task that is not known.
        TaskError: a model for which no task is left.
    """
    subjects = resolve(models, twins=twins)
    cells = [
        Cell(subject, task, execution, seed)
        for subject in subjects
        for execution in (executions if subject.card else ("masked",))
        for task in tasks_for(subject, tasks)
    ]
    folder = cache_folder() / "records"
    team = workers()
    records: list[tuple[int, Record]] = []
    keeps = True
    loaded: tuple[Subject, str, nn.Module] | None = None
    for index, cell in enumerate(cells):
        if not team.owns(index):
            continue
        label = f"{cell.subject.name} on {cell.task.name}"
        if progress:
            progress(index, len(cells), label)
        key = cell.key() if cell.subject.card or use_cache else ""
        path = folder / f"{key}.safetensors"
        record = _cached(path, key, cell) if key and use_cache is not False else None
        if record is None:
            if loaded is None or loaded[0] is not cell.subject or loaded[1] != cell.execution:
                loaded = None  # let go of the old model before the next is there
                loaded = (cell.subject, cell.execution, cell.subject.load(cell.execution))
            record = run_cell(cell, loaded[2], _inner(progress, index, len(cells), label), key)
            if key:
                keeps = keeps and _keep(record, path)
        if out is not None:
            record.write(Path(out) / f"{_file_name(cell)}.json")
        records.append((index, record))
    if progress:
        progress(len(cells), len(cells), "done")
    return [record for _, record in sorted(team.gather(records), key=lambda item: item[0])]


def run_cell(cell: Cell, model: nn.Module, progress: Progress | None = None, key: str = "") -> Record:
    """Measure one cell, without the cache; `key` is its digest if that is known."""
    training = model.training
    model.eval()
    try:
        with PeakMemory() as peak, _seeded(cell.seed), torch.no_grad():
            start = time.perf_counter()
            result = cell.task.evaluate(model, progress=progress)
            seconds = time.perf_counter() - start
    finally:
        model.train(training)
    _check_result(cell.task, result)
    subject = cell.subject
    return Record(
        key=key,
        model=subject.name,
        model_version=subject.version,
        dense_twin=_without_version(subject.card.dense_twin)
        if subject.card and subject.card.dense_twin
        else None,
        weights_sha256=subject.weights_sha256,
        execution=cell.execution,
        task=cell.task.name,
        task_version=cell.task.version,
        primary=cell.task.primary,
        direction=1 if cell.task.direction(cell.task.primary) > 0 else -1,
        unit=cell.task.unit,
        code_sha256=cell.code_sha256,
        metrics={name: MetricValue(value=m.value, stderr=m.stderr) for name, m in result.metrics.items()},
        samples={name: Samples.encode(values) for name, values in result.samples.items()},
        sample_set=result.sample_set,
        n=result.n,
        sparsity=_sparsity(subject, model),
        cost=_cost(subject, model, cell.task),
        seed=cell.seed,
        seconds=seconds,
        peak_memory_bytes=peak.bytes,
        created=now(),
        environment=Environment.here(),
    )


def tasks_for(subject: Subject, tasks: Tasks | None) -> list[Task]:
    """The tasks to run on a subject: those asked for that accept it, or those with a figure on its card.

    Raises:
        TaskError: none is left.
        UnknownNameError: a name or glob that matches no task.
    """
    if tasks is None:
        if subject.card is None:
            raise TaskError(
                f"{subject.name} has no card that says what to measure; name the tasks, e.g. tasks='graph/*'"
            )
        if not subject.card.metrics:
            raise TaskError(f"the card of {subject.name} states no figure; name the tasks to measure")
        return [get_task(name) for name in dict.fromkeys(metric.task for metric in subject.card.metrics)]
    asked: list[Task] = []
    for task in [tasks] if isinstance(tasks, str | Task) else tasks:
        asked.extend([task] if isinstance(task, Task) else [get_task(name) for name in _task_names(task)])
    fitting = [task for task in asked if subject.card is None or task.accepts(subject.card)]
    if not fitting:
        names = ", ".join(task.name for task in asked)
        raise TaskError(
            f"{subject.name} is not accepted by {names}; `zoo show {subject.name}` lists its own tasks"
        )
    return fitting


def _task_names(glob: str) -> list[str]:
    if not is_glob(glob):
        return [glob]
    names = TASKS.names(glob)
    if not names:
        raise UnknownNameError(f"no task matches {glob!r}; there are: {', '.join(TASKS.names()) or 'none'}")
    return names


def _keep(record: Record, path: Path) -> bool:
    """Keep a record; False, with a warning, where the cache cannot be written: what was measured stands."""
    try:
        record.keep(path)
    except StorageError as error:
        _log.warning("Results are shown, but not kept: %s %s", error, CACHE_REMEDY)
        return False
    keep_in_mind()
    return True


def _cached(path: Path, key: str, cell: Cell) -> Record | None:
    """The kept record of a cell; one that is damaged or of another cell counts as missing, with a warning.
    Names are the caller's, not the content's."""
    try:
        record = Record.kept(path, key)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SparseError) as error:
        _log.warning("Measured again: %s", error)
        return None
    twin = cell.subject.card.dense_twin if cell.subject.card else None
    return record.model_copy(
        update={
            "model": cell.subject.name,
            "model_version": cell.subject.version,
            "dense_twin": _without_version(twin) if twin else None,
        }
    )


def _inner(progress: Progress | None, index: int, cells: int, label: str) -> Progress | None:
    """A task's own steps, shown as the note of the outer bar."""
    if progress is None:
        return None

    def report(done: int, total: int, note: str = "") -> None:
        progress(index, cells, f"{label} {done}/{total} {note}".rstrip())

    return report


def _check_result(task: Task, result: TaskResult) -> None:
    if task.primary not in result.metrics:
        raise TaskError(
            f"task {task.name} gave no {task.primary!r}, its primary metric; got {list(result.metrics)}"
        )
    values = {name: [measure.value] for name, measure in result.metrics.items()}
    for name, measured in [*values.items(), *result.samples.items()]:
        if len(odd := [value for value in measured if not np.isfinite(value)]):
            raise TaskError(f"task {task.name}: {name} is {odd[0]}; the model's outputs are not finite")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Fixed random numbers inside, the caller's generators untouched outside."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def _sparsity(subject: Subject, model: nn.Module) -> float | None:
    if subject.card:
        return subject.card.sparsity.overall
    masks = masks_of(model)
    return masks.sparsity() if masks else None


def _cost(subject: Subject, model: nn.Module, task: Task) -> Cost:
    """The card's figures, or without a card what the model and the task can count."""
    if subject.card:
        cost = subject.card.cost
        return Cost(
            parameters=Pair(dense=cost.parameters.dense, sparse=cost.parameters.kept),
            flops=Pair(dense=cost.flops.dense, sparse=cost.flops.sparse) if cost.flops else None,
            bytes=Pair(dense=cost.bytes.dense, sparse=cost.bytes.sparse),
            bytes_on_disk=subject.card.bytes_needed,
        )
    flops = task.flops(model)
    return Cost(
        parameters=count_parameters(model),
        flops=Pair(dense=flops.dense, sparse=flops.sparse) if flops else None,
    )


def count_parameters(model: nn.Module) -> Pair:
    """Parameters of a model, tied ones once, and those that its masks keep."""
    parameters = dict(model.named_parameters())
    dense = sum(parameter.numel() for parameter in parameters.values())
    masks = masks_of(model) or MaskSet({})
    dropped = sum(mask.numel - mask.kept for name, mask in masks.items() if name in parameters)
    return Pair(dense=dense, sparse=dense - dropped)


def _without_version(name: str) -> str:
    return name.partition("@")[0]


def _file_name(cell: Cell) -> str:
    parts = (cell.subject.name, cell.task.name, cell.execution)
    return "--".join(part.replace("/", "-").replace(":", "-") for part in parts)
