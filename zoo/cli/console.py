"""Where output goes: tables and JSON to stdout, progress and messages to stderr."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Width of tables in a pipe or file, where there is no window to fit.
PIPE_WIDTH = 200


def stdout() -> Console:
    """A console on stdout. In a pipe lines are not folded to 80 columns and carry no colours."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def print_json(value: Any) -> None:
    """Print a value as JSON for machines."""
    print(json.dumps(value, indent=1, allow_nan=False))


def note(text: str) -> None:
    """A message beside the results, to stderr."""
    print(text, file=sys.stderr)


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Any]:
    """A progress callable `(done, total, note)` that draws a bar on stderr while the block runs.

    Outside a terminal each finished step is one line, so that a log shows where long work stands.
    """
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        last = -1

        def line(done: int, total: int, note: str = "") -> None:
            nonlocal last
            if done != last:
                print(f"[{done}/{total}] {note}", file=sys.stderr, flush=True)
                last = done

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=None)

        def draw(done: int, total: int, note: str = "") -> None:
            from rich.markup import escape

            bar.update(task, completed=done, total=total, description=escape(note))

        yield draw


def version_line() -> str:
    """Versions of what decides results, without importing any of it."""
    from importlib.metadata import PackageNotFoundError, version

    def find(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return f"zoo {find('sparse-model-zoo')} (torch {find('torch')}, Python {platform.python_version()})"
