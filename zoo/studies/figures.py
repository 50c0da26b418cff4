"""Tables and plots that most studies have: arms by levels or by figures, differences by sample, curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.studies.stats import paired_difference
from zoo.studies.study import PlotMaker, TableMaker, shown
from zoo.studies.tables import Plot, Series, Table
from zoo.studies.verdict import deviation
from zoo.studies.view import Row, Value, View

Text = str | Callable[[View], str]
Some = Sequence[Any] | Callable[[View], Sequence[Any]]


def when(condition: Callable[[View], bool], make: TableMaker | PlotMaker) -> Callable[[View], Any]:
    """A table or plot for the groups that meet a condition."""
    return lambda view: make(view) if condition(view) else None


def _text(text: Text, view: View) -> str:
    return text(view) if callable(text) else text.format(where=view.title)


def _some(some: Some, view: View, usual: Sequence[Any]) -> list[Any]:
    return list((some(view) if callable(some) else some) or usual)


@dataclass(frozen=True)
class Grid:
    """A table of means ± deviations: arms by levels.

    Attributes:
        title, note: with `{where}` for the group, or functions of the view.
        value: the figure, if it is not the study's; or (view, arm, level) -> text of a cell.
        arms, levels: which, or functions of the view; by default all that were run.
        columns: headings of the levels, if they are not the levels themselves.
        mark: (view, arm, level) -> text that is added to a cell.
    """

    title: Text
    note: Text = ""
    value: Value | Callable[[View, str, Any], str] | None = None
    arms: Some = ()
    levels: Some = ()
    columns: Callable[[View, Any], str] = lambda view, level: shown(level)  # noqa: E731
    mark: Callable[[View, str, Any], str] = lambda view, arm, level: ""  # noqa: E731

    def __call__(self, view: View) -> Table | None:
        """The table of a group; None if none of its arms were run."""
        levels = _some(self.levels, view, view.levels())
        arms = view.arms(_some(self.arms, view, ()))
        body = [[arm, *(self._cell(view, arm, level, levels) for level in levels)] for arm in arms]
        columns = ["arm", *(self.columns(view, level) for level in levels)]
        body = [row for row in body if any(row[1:])]
        return Table(_text(self.title, view), columns, body, _text(self.note, view)) if body else None

    def _cell(self, view: View, arm: str, level: Any, levels: Sequence[Any]) -> str:
        """A cell; a flat arm stands in its own column where the table has it, else in all."""
        own = view.levels(arm)
        if level not in own and any(one in own for one in levels):
            return ""
        made = _cell(self.value, view, arm, level)
        return made + self.mark(view, arm, level)


def _cell(value: Value | Callable[[View, str, Any], str] | None, view: View, arm: str, level: Any) -> str:
    return str(value(view, arm, level)) if callable(value) else view.cell(arm, level, value)


@dataclass(frozen=True)
class Columns:
    """A table with a row for each arm at each level and a column for each figure.

    Attributes:
        title, note: with `{where}` for the group, or functions of the view.
        columns: heading -> figure, or (view, arm, level) -> text of a cell.
        arms, levels: as in `Grid`; None as a level takes all runs of an arm.
        heading: of the levels' column; without one there is no such column.
    """

    title: Text
    columns: Mapping[str, Value | Callable[[View, str, Any], str]]
    note: Text = ""
    arms: Some = ()
    levels: Some = (None,)
    heading: str = ""

    def __call__(self, view: View) -> Table | None:
        """The table of a group; None if none of its arms were run."""
        body = [
            [arm, *([shown(level)] if self.heading else []), *self._cells(view, arm, level)]
            for arm in view.arms(_some(self.arms, view, ()))
            for level in _some(self.levels, view, view.levels())
            if view.chosen(arm, level)
        ]
        head = ["arm", *([self.heading] if self.heading else []), *self.columns]
        return Table(_text(self.title, view), head, body, _text(self.note, view)) if body else None

    def _cells(self, view: View, arm: str, level: Any) -> list[str]:
        return [_cell(value, view, arm, level) for value in self.columns.values()]


def mean_of(name: str, text: str = "{:g}", scale: float = 1.0) -> Callable[[View, str, Any], str]:
    """A cell with the mean of a figure over seeds, without a deviation; empty where no run has it."""

    def cell(view: View, arm: str, level: Any) -> str:
        found = view.values(arm, level, Value(name, scale))
        return text.format(statistics.fmean(found)) if found else ""

    return cell


@dataclass(frozen=True)
class BySample:
    """A table of differences from an arm with the test samples as the sample: each one's mean over seeds,
    paired.

    Attributes:
        against: the arm.
        of: a run -> its figures of all samples.
        title, note: as in `Grid`.
        arms, levels: those that are compared.
        digits: decimals.
    """

    against: str
    of: Callable[[Row], Any]
    title: Text
    note: Text = ""
    arms: Some = ()
    levels: Some = ()
    digits: int = 1

    def __call__(self, view: View) -> Table | None:
        """The table of a group; None if none of its arms were run."""
        note = f"{_text(self.note, view)} *: seen over samples; **: over seeds as well."
        return Grid(self.title, lambda _: note, self._cell, self.arms, self.levels)(view)

    def _cell(self, view: View, arm: str, level: Any) -> str:
        seeds = view.difference(arm, self.against, [level])
        if arm == self.against or seeds is None:
            return ""
        first, second = (
            np.mean([self.of(row) for row in view.chosen(name, level)], axis=0)
            for name in (arm, self.against)
        )
        found, digits = paired_difference(first, second, resamples=2000), self.digits
        mark = " **" if found.seen and (seeds.low > 0 or seeds.high < 0) else " *" * found.seen
        return f"{found.value:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]{mark}"


@dataclass(frozen=True)
class Curves:
    """A plot with one curve per arm over levels, bands of one standard deviation; or points.

    Attributes:
        name: of the file, with `{slug}` for the last part of the group's names.
        title, alt: with `{where}`, or functions of the view.
        x_label, y_label: with units.
        arms: those with curves.
        x: level -> place on the axis; or a figure, whose mean over the runs is the place; None, with
            `points` and one level, sets the arms side by side under their names (`x_label` is then empty).
        levels: which; by default those that are numbers.
        references: arms that are horizontal lines.
        value: the figure, if it is not the study's.
        log10: of the figure.
        log_x: a logarithmic axis.
        points: no lines; each point is marked with its level, or where each arm has one only with the arm's
            number, since colours repeat.
    """

    name: str
    title: Text
    x_label: str
    y_label: str
    arms: Some = ()
    x: Callable[[Any], float] | Value | None = lambda level: 100 * level  # noqa: E731
    levels: Some = ()
    references: Sequence[str] = ()
    value: Value | None = None
    log10: bool = False
    log_x: bool = False
    points: bool = False
    alt: Text = (
        "One curve per arm, with bands of one standard deviation over seeds; the table has the numbers."
    )

    def __call__(self, view: View) -> Plot | None:
        """The plot of a group; None if none of its arms were run."""
        numbers = [level for level in view.levels() if isinstance(level, int | float)]
        levels = _some(self.levels, view, numbers)
        series: list[Series] = []
        for arm in view.arms(_some(self.arms, view, ())):
            own = [level for level in levels if level in view.levels(arm)]
            found = {level: values for level in own if (values := self._of(view, arm, level))}
            if found and arm not in self.references:
                places = [self._place(view, arm, level, len(series)) for level in found]
                means, spreads = [*map(statistics.fmean, found.values())], [*map(deviation, found.values())]
                if not self.points:
                    series.append(Series(arm, places, means, spreads))
                    continue
                if self.x is None:
                    series.append(Series(arm, places, means, spreads, "points"))
                    continue
                number = str(len(series) + 1)
                label, marks = (
                    (arm, [*map(shown, found)]) if len(levels) > 1 else (f"{number}: {arm}", [number])
                )
                series.append(Series(label, places, means, spreads, "points", marks))
        for arm in view.arms(self.references) if self.references else ():
            series.append(Series(arm, [], [statistics.fmean(self._of(view, arm, None))], kind="reference"))
        if not series:
            return None
        slug = "-".join(str(one).rpartition("/")[2] for one in view.where.values())
        name, title, alt = self.name.format(slug=slug), _text(self.title, view), _text(self.alt, view)
        return Plot(name, title, self.x_label, self.y_label, series, alt, self.log_x)

    def _of(self, view: View, arm: str, level: Any) -> list[float]:
        found = view.values(arm, level, self.value)
        return [math.log10(value) for value in found] if self.log10 else found

    def _place(self, view: View, arm: str, level: Any, number: int) -> float:
        if self.x is None:
            return float(number)
        if isinstance(self.x, Value):
            return statistics.fmean(view.values(arm, level, self.x))
        return float(self.x(level))
