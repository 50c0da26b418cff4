"""`zoo make`: bundles from their recipe rows."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import shlex
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from zoo.cli import OK
from zoo.cli.console import note, print_json, stdout
from zoo.cli.parsing import Positional, metavar, parse
from zoo.errors import ConfigError
from zoo.progress import progress_bar
from zoo.studies.tables import Table

if TYPE_CHECKING:
    from zoo.bundles.make import Target
    from zoo.bundles.recipes import Row

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Make:
    """Make bundles from their recipe rows: train every seed, measure beside the dense twin, save.

    Finished seeds are kept in the cache, and bundles that are there are left alone, so that the same command
    goes on after an interruption.
    """

    names: Annotated[tuple[str, ...], Positional, metavar("NAME")]
    """Names or quoted globs of bundles."""

    out: Path | None = None
    """Folder for the bundles. By default those of the source checkout, with the evidence of every seed."""

    jobs: int = 1
    """Processes that work at the same time, each on one thread."""

    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:1, say."""

    overwrite: bool = False
    """Make bundles again that are there."""

    dry_run: bool = False
    """Only show what would be made, and from what."""

    json: bool = False
    """Print JSON."""


def make_command(argv: Sequence[str]) -> int:
    """`zoo make NAME ...`."""
    options = parse(Make, argv, "make")
    if not options.names:
        raise ConfigError("name at least one bundle, e.g. `zoo make 'vision/bip-*' --dry-run`")
    if all(name.startswith("hub/") for name in options.names):
        return _hub(options)
    if options.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, received {options.jobs}")
    from zoo.bundles.recipes import select_rows

    rows = select_rows(options.names)
    if options.dry_run:
        return _show(rows, options)
    todo = [row for row in rows if options.overwrite or not _folder(row, options).exists()]
    for row in rows:
        if row not in todo:
            note(f"{_folder(row, options)} is there; --overwrite makes it again")
    made = _run(todo, options)
    if options.json:
        print_json([str(path) for path in made])
    else:
        for path in made:
            stdout().print(str(path), soft_wrap=True)
    return OK


def _hub(options: Make) -> int:
    """Run recipes for models that people know (`zoo recipes list`), each into a folder of its name."""
    from zoo.cli import dispatch
    from zoo.recipes import select

    if options.out is None:
        raise ConfigError("recipes of hub/ need a folder for what they make: --out DIR")
    shown = []
    for entry in select(options.names):
        for words in entry.commands(str(options.out / entry.name)):
            shown.append(shlex.join(["zoo", *words]))
            if not options.dry_run:
                note(shown[-1])
                # With --json stdout is for one document, what the commands show goes beside it.
                place = sys.stderr if options.json else sys.stdout
                with contextlib.redirect_stdout(place):
                    dispatch(words)
    if options.json:
        print_json(shown)
    elif options.dry_run:
        print("\n".join(shown))
    return OK


def _target(row: Row, options: Make) -> Target:
    """Where a row's bundle goes: the chosen folder, or the domain's own cards with their evidence."""
    from zoo.bundles.make import Target

    if options.out is not None:
        return Target(options.out, None, options.overwrite, options.device)
    if not (REPOSITORY / "pyproject.toml").is_file():
        raise ConfigError("an installed zoo keeps its bundles as they are: choose a folder with --out")
    cards = REPOSITORY / "zoo" / row.domain / "cards"
    return Target(cards, REPOSITORY, options.overwrite, options.device)


def _folder(row: Row, options: Make) -> Path:
    return _target(row, options).folder / row.slug


def _run(rows: list[Row], options: Make) -> list[Path]:
    """Make the rows; those that others are made from come first."""
    from zoo.bundles.recipes import depth

    made: list[Path] = []
    with progress_bar() as progress:
        if options.jobs == 1:
            for done, row in enumerate(rows):
                made.append(
                    _one(row.name, _target(row, options), lambda text, d=done: progress(d, len(rows), text))
                )
            return made
        # Fresh processes: a forked one may hang in a pool of threads that it inherited.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, context) as pool:
            for _, level in itertools.groupby(rows, depth):
                work = {pool.submit(_one, row.name, _target(row, options)): row.name for row in level}
                for future in as_completed(work):
                    made.append(future.result())
                    progress(len(made), len(rows), work[future])
    return made


def _one(name: str, target: Target, tell: Any = None) -> Path:
    import torch

    from zoo.bundles.make import make
    from zoo.bundles.recipes import find_row

    torch.set_num_threads(1)  # results do not depend on how many there are
    return make(find_row(name), target, tell)


def _show(rows: Iterable[Row], options: Make) -> int:
    """What would be made, and from what."""
    from zoo.report.terminal import show_table

    shown = [
        {
            "name": row.name,
            "from": row.source or row.architecture,
            "method": row.method,
            "seeds": row.seeds,
            "folder": str(_folder(row, options)),
            "there": _folder(row, options).exists(),
        }
        for row in rows
    ]
    if options.json:
        print_json(shown)
        return OK
    cells: list[list[Any]] = [
        [one["name"], one["from"], one["method"], one["seeds"], "there" if one["there"] else "to make"]
        for one in shown
    ]
    show_table(stdout(), Table("Recipes", ["name", "from", "method", "seeds", ""], cells))
    return OK
