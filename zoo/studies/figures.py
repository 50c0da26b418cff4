"""Tables and plots that most studies have: arms by levels, and curves over levels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.studies.study import shown
from zoo.studies.tables import Plot, Series, Table
from zoo.studies.verdict import deviation
from zoo.studies.view import Value, View

Text = str | Callable[[View], str]


def _text(text: Text, view: View) -> str:
    return text(view) if callable(text) else text.format(where=view.title)


@dataclass(frozen=True)
class Grid:
    """A table of means ± deviations: arms by levels.

    Attributes:
        title, note: with `{where}` for the group, or functions of the view.
        value: the figure, if it is not the study's.
        arms, levels: which, or functions of the view; by default all that were run.
        columns: headings of the levels, if they are not the levels themselves.
        mark: (view, arm, level) -> text that is added to a cell.
    """

    title: Text
    note: Text = ""
    value: Value | None = None
    arms: Sequence[str] | Callable[[View], Sequence[str]] = ()
    levels: Sequence[Any] | Callable[[View], Sequence[Any]] = ()
    columns: Callable[[View, Any], str] = lambda view, level: shown(level)  # noqa: E731
    mark: Callable[[View, str, Any], str] = lambda view, arm, level: ""  # noqa: E731

    def __call__(self, view: View) -> Table | None:
        """The table of a group; None if none of its arms were run."""
        levels = list((self.levels(view) if callable(self.levels) else self.levels) or view.levels())
        arms = self.arms(view) if callable(self.arms) else view.arms(self.arms)
        body = [[arm, *(self._cell(view, arm, level, levels) for level in levels)] for arm in arms]
        columns = ["arm", *(self.columns(view, level) for level in levels)]
        body = [row for row in body if any(row[1:])]
        return Table(_text(self.title, view), columns, body, _text(self.note, view)) if body else None

    def _cell(self, view: View, arm: str, level: Any, levels: Sequence[Any]) -> str:
        """A cell; a flat arm stands in its own column where the table has it, else in all."""
        own = view.levels(arm)
        if level not in own and any(one in own for one in levels):
            return ""
        return view.cell(arm, level, self.value) + self.mark(view, arm, level)


@dataclass(frozen=True)
class Curves:
    """A plot with one curve per arm over levels, bands of one standard deviation.

    Attributes:
        name: of the file, with `{slug}` for the last part of the group's names.
        title, alt: with `{where}`, or functions of the view.
        x_label, y_label: with units.
        arms: those with curves.
        x: level -> place on the axis.
        levels: which; by default those that are numbers.
        references: arms that are horizontal lines.
        value: the figure, if it is not the study's.
        log10: of the figure.
        log_x: a logarithmic axis.
    """

    name: str
    title: Text
    x_label: str
    y_label: str
    arms: Sequence[str] = ()
    x: Callable[[Any], float] = lambda level: 100 * level  # noqa: E731
    levels: Sequence[Any] | Callable[[View], Sequence[Any]] = ()
    references: Sequence[str] = ()
    value: Value | None = None
    log10: bool = False
    log_x: bool = False
    alt: Text = (
        "One curve per arm, with bands of one standard deviation over seeds; the table has the numbers."
    )

    def __call__(self, view: View) -> Plot | None:
        """The plot of a group; None if none of its arms were run."""
        levels = (self.levels(view) if callable(self.levels) else self.levels) or [
            level for level in view.levels() if isinstance(level, int | float)
        ]
        series = []
        for arm in view.arms(self.arms):
            own = [level for level in levels if level in view.levels(arm)]
            found = {level: values for level in own if (values := self._of(view, arm, level))}
            if found and arm not in self.references:
                means, spreads = (
                    [statistics.fmean(v) for v in found.values()],
                    [*map(deviation, found.values())],
                )
                series.append(Series(arm, [self.x(level) for level in found], means, spreads))
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
