"""`zoo recipes`: models that people know, and the command that makes each of them sparse."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from zoo.cli import OK
from zoo.cli.console import print_json, stdout
from zoo.cli.parsing import Positional, metavar, parse
from zoo.studies.tables import Table


@dataclass
class Recipes:
    """List recipes for models that people know, or show one.

    `zoo make hub/NAME --out DIR` runs a recipe where its base can be had.
    """

    what: Annotated[Literal["list", "show"], Positional] = "list"
    """All in a table, or everything of each."""

    glob: Annotated[str, Positional, metavar("GLOB")] = "*"
    """Which recipes, e.g. 'wanda-*' (quote it)."""

    json: bool = False
    """Print JSON."""


def recipes_command(argv: Sequence[str]) -> int:
    """`zoo recipes list [GLOB]`, `zoo recipes show NAME`."""
    options = parse(Recipes, argv, "recipes")
    from zoo.recipes import PREFIX, select
    from zoo.report.terminal import show_table

    chosen = select((options.glob,))
    if options.json:
        print_json([entry.to_dict() for entry in chosen])
        return OK
    if options.what == "show":
        for entry in chosen:
            stdout().print(f"[bold]{PREFIX}{entry.name}[/bold]", highlight=False)
            for key, value in entry.to_dict().items():
                if key not in ("name", "commands"):
                    stdout().print(f"  {key}: {value}", markup=False, highlight=False)
            for words in entry.commands(entry.name):
                stdout().print(f"  zoo {shlex.join(words)}", markup=False, highlight=False, soft_wrap=True)
        return OK
    rows: list[list[Any]] = []
    for entry in chosen:
        minutes, gib = entry.minutes(), entry.gib()
        rows.append(
            [
                PREFIX + entry.name,
                entry.method,
                entry.base,
                "" if minutes is None else f"{max(minutes, 1):,.0f} min",
                "" if gib is None else f"{gib:,.1f} GiB",
            ]
        )
    note = (
        f"{len(rows)} recipes, none run here on the real weights: docs/recipes.md says what was tried. "
        "Next: zoo recipes show NAME"
    )
    columns = ["recipe", "method", "base", "expected", "memory"]
    show_table(stdout(), Table("", columns, rows, note, ("base", "memory", "expected")))
    return OK
