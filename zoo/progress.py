"""Progress of long work: a bar on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

# Seconds between two lines of a log.
PAUSE = 2.0


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Any]:
    """A progress callable `(done, total, note)` that draws a bar on stderr while the block runs.

    Outside a terminal finished steps are lines, at most one in two seconds, so that a log shows where long
    work stands.
    """
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        last, shown = -1, -math.inf

        def line(done: int, total: int, note: str = "") -> None:
            nonlocal last, shown
            if done != last and (done == total or time.monotonic() - shown >= PAUSE):
                print(f"[{done}/{total}] {note}", file=sys.stderr, flush=True)
                last, shown = done, time.monotonic()

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
