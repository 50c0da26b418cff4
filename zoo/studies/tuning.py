"""Choice of an option by validation data, alike for every arm that has it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from zoo.studies.view import Row, Rows


def at_best(
    rows: Rows, option: str, figure: str = "validation", by: Sequence[str] = ("arm", "level")
) -> list[Row]:
    """Of each group the rows with the value of an option whose mean figure over seeds is largest.

    Args:
        rows: as measured, each with the option and the figure.
        option: that was tried with several values; the first of equals is taken.
        figure: of validation data, never of test data.
        by: what the rows of a group have in common.
    """

    def place(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in by)

    tried: dict[tuple[Any, ...], dict[Any, list[float]]] = {}
    for row in rows:
        tried.setdefault(place(row), {}).setdefault(row[option], []).append(row[figure])
    means = {where: {v: statistics.fmean(f) for v, f in own.items()} for where, own in tried.items()}
    best = {where: max(own, key=own.__getitem__) for where, own in means.items()}
    return [row for row in rows if row[option] == best[place(row)]]
