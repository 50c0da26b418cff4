"""Results as plain data: tables, plots, verdicts. `zoo.report` draws them; nothing here knows how."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from zoo.errors import ConfigError

Outcome = Literal["holds", "does not hold", "cannot be told", "invalid", "not measured"]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of results; cells are strings or numbers.

    Attributes:
        title, columns, rows, note: what is shown; the first column names the row.
        optional: columns that are left out where the screen is too narrow for all, the first one first.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ConfigError(
                    f"table {self.title!r} has {len(self.columns)} columns, but a row of {len(row)}: {row}"
                )

    def without(self, column: str) -> Table:
        """The table without a column."""
        left = [index for index, name in enumerate(self.columns) if name != column]
        rows = [[row[index] for index in left] for row in self.rows]
        return dataclasses.replace(self, columns=[self.columns[index] for index in left], rows=rows)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One claim: what the paper says, what came out here, and the outcome.

    Attributes:
        visible: the smallest difference that the study could have seen, with its unit; empty where the claim
            is no difference.
        note: why a claim is invalid, what the correction for several claims changed, what was tuned.
        paper: numbers of the papers in `zoo.studies.papers` that it is about.
        p: of the difference from the bar, corrected for the claims of its family; None for a plain fact.
    """

    claim: str
    published: str
    measured: str
    verdict: Outcome
    visible: str = ""
    note: str = ""
    paper: tuple[int, ...] = ()
    p: float | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    """One series of a plot.

    Attributes:
        label: for the legend.
        x, y: of equal length; a `reference` with empty `x` is a horizontal line at `y[0]` over the whole
            plot.
        spread: half-width of the band (lines) or error bar (points) around `y`.
        kind: a line with markers, points only, a dashed reference, or the steps of a Pareto front.
        marks: a short text beside each point.
        group: series of one group share a colour; by default each label is its own.
    """

    label: str
    x: Sequence[float | int]
    y: Sequence[float | int]
    spread: Sequence[float | int] | None = None
    kind: Literal["line", "points", "reference", "front"] = "line"
    marks: Sequence[str] | None = None
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot as data. Labels carry units; `alt` says in a sentence what is to be seen.

    With an empty `x_label` each series is one point, whose label stands on the axis.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    alt: str = ""
    log_x: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What a study found. `rows` are the raw measurements, one dictionary each."""

    tables: list[Table]
    verdicts: list[Verdict]
    plots: list[Plot] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
