"""Where output goes: tables and JSON to stdout, messages to stderr (progress: `zoo.progress`)."""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zoo.report.plain import plain

if TYPE_CHECKING:
    from rich.console import Console

# Width of tables in a pipe or file, where there is no window to fit.
PIPE_WIDTH = 200


def stdout() -> Console:
    """A console on stdout. In a pipe lines are not folded to 80 columns and carry no colours.

    Whatever is printed on it, a card's text say, has its control characters taken out (`zoo.report.plain`);
    only the styles that the zoo itself asks for reach the terminal.
    """
    from rich.console import Console
    from rich.segment import Segment

    class PlainConsole(Console):
        def render(self, *args: Any, **options: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **options):
                yield segment if segment.control else Segment(plain(segment.text), segment.style)

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # which is no failure: see `zoo.cli.main`

    return PlainConsole(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def print_json(value: Any) -> None:
    """Print a value as JSON for machines."""
    print(json.dumps(value, indent=1, allow_nan=False))


def note(text: str) -> None:
    """A message beside the results, to stderr, without control characters."""
    print(plain(text), file=sys.stderr)


class Notes(logging.Handler):
    """What the zoo logs, as messages beside the results."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"zoo: {record.getMessage()}")


def versions() -> dict[str, str]:
    """Versions of what decides results, without importing any of it."""
    from importlib.metadata import PackageNotFoundError, version

    def find(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {
        "zoo": find("sparse-model-zoo"),
        "torch": find("torch"),
        "python": platform.python_version(),
    }
