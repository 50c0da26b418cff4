"""Where output goes: tables and JSON to stdout, messages to stderr (progress: `zoo.progress`)."""

from __future__ import annotations

import json
import platform
import sys
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


def version_line() -> str:
    """Versions of what decides results, without importing any of it."""
    from importlib.metadata import PackageNotFoundError, version

    def find(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return f"zoo {find('sparse-model-zoo')} (torch {find('torch')}, Python {platform.python_version()})"
