"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoo.studies.tables import Result, Table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

_LEAST = 8  # characters of a column beside long names
GOOD, BAD = ("ok", "holds", "better"), ("failed", "does not hold", "invalid", "worse")


def show_table(console: Console, table: Table) -> None:
    """Print a table: numbers to the right, outcomes in colour, the note below.

    Where the screen is too narrow, the table's optional columns go first, and the note says which. Names of
    rows are not broken, unless they would take more than half of it and leave less than `_LEAST` to each
    other column: what is said of them counts more.
    """
    from rich.cells import cell_len
    from rich.measure import Measurement
    from rich.text import Text

    left_out: list[str] = []
    boundless = console.options.update(width=10_000)
    widest = _widest(table)  # as wide as the whole, and measured at once

    def too_wide() -> bool:
        return Measurement.get(console, boundless, _drawn(widest)).maximum > console.width

    for column in table.optional:
        if not too_wide():
            break
        left_out.append(column)
        table, widest = table.without(column), widest.without(column)
    names = max((len(str(row[0])) for row in table.rows), default=0)
    if too_wide() or cell_len(table.title or "") > sum(_widths(widest)) or not table.rows:
        rest = console.width - names - 2
        broken = names > console.width / 2 and rest < (len(table.columns) - 1) * (_LEAST + 3)
        console.print(_drawn(table, broken_names=broken))
    else:  # what fits need not be measured and folded cell by cell, which takes longer than all else
        console.print(_lines(table, _widths(widest)), no_wrap=True, overflow="ignore", crop=False)
    if table.note:
        console.print(Text(table.note, style="dim"))
    if left_out:
        text = f"Left out at {console.width} columns: {', '.join(left_out)}. A pipe has all."
        console.print(Text(text, style="dim"))


def _widest(table: Table) -> Table:
    """The table with one row, of the longest line of each column."""
    from rich.cells import cell_len

    columns = [
        [line for row in table.rows for line in str(row[i]).split("\n")] for i in range(len(table.columns))
    ]
    return replace(table, rows=[[max(lines, key=cell_len) for lines in columns]] if table.rows else [])


def _widths(widest: Table) -> list[int]:
    from rich.cells import cell_len

    return [max(map(cell_len, map(str, column))) for column in zip(widest.columns, *widest.rows, strict=True)]


def _lines(table: Table, widths: Sequence[int]) -> Text:
    """What `_drawn` makes of a table whose columns all fit."""
    from rich.cells import cell_len
    from rich.text import Text

    right = _numeric_columns(table)
    whole = sum(widths) + 3 * len(widths) - 1
    text = Text()
    if table.title:
        text.append(f"{table.title}{' ' * (whole - cell_len(table.title))}\n", "bold")
    text.append(f"{' ' * whole}\n")

    def add(cells: Sequence[object], style: str = "") -> None:
        columns = [str(cell).split("\n") for cell in cells]
        for line in range(max(map(len, columns))):
            for index, (cell, lines) in enumerate(zip(cells, columns, strict=True)):
                shown = lines[line] if line < len(lines) else ""
                fill = " " * (widths[index] - cell_len(shown))
                text.append("   " if index else " ")
                text.append(fill + shown if right[index] else shown + fill, style or _style(cell))
            text.append(" \n")

    add(table.columns, "bold")
    text.append(f" {'─' * (whole - 2)} \n")
    for row in table.rows:
        add(row)
    return text.append(" " * whole)


def _numeric_columns(table: Table) -> list[bool]:
    return [all(_numeric(row[index]) for row in table.rows) for index in range(len(table.columns))]


def _drawn(table: Table, broken_names: bool = False) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(
        box=box.SIMPLE_HEAD, title=table.title, title_justify="left", title_style="bold", pad_edge=False
    )
    for index, (column, numeric) in enumerate(zip(table.columns, _numeric_columns(table), strict=True)):
        shown.add_column(
            Text(column),
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=index == 0 and not broken_names,
        )
    for row in table.rows:
        shown.add_row(*(Text(str(cell), style=_style(cell)) for cell in row))
    return shown


def show_study(console: Console, result: Result) -> None:
    """Print the tables, the verdicts and the notes of a study."""
    for table in result.tables:
        show_table(console, table)
    show_table(console, verdict_table(result))
    for note in result.notes:
        console.print(note, markup=False, highlight=False)


def verdict_table(result: Result) -> Table:
    """The verdicts as a table: published, measured and verdict side by side."""
    columns = ["claim", "published", "measured", "verdict", "smallest visible", "corrected p", "note"]
    rows: list[list[Any]] = [
        [v.claim, v.published, v.measured, v.verdict, v.visible, "" if v.p is None else f"{v.p:.2g}", v.note]
        for v in result.verdicts
    ]
    used = [index for index in range(len(columns)) if index < 4 or any(row[index] for row in rows)]
    columns, rows = [columns[i] for i in used], [[row[i] for i in used] for row in rows]
    return Table("Verdicts", columns, rows)


def _numeric(cell: object) -> bool:
    return not isinstance(cell, str) or not cell or cell[0] in "0123456789+−-±"


def _style(cell: object) -> str:
    return "green" if cell in GOOD else "red" if cell in BAD else ""
