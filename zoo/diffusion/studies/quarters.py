"""A figure by quarters of the test samples, ordered by something else of theirs, and its plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from zoo.errors import DataError
from zoo.studies.tables import Plot, Series
from zoo.studies.verdict import deviation
from zoo.studies.view import NotRunError, View


def quarters(values: Float[Tensor, " n"], by: Float[Tensor, " n"]) -> list[float]:
    """Means of the values of each quarter of the samples, in the order of `by`."""
    return [float(values[part].mean()) for part in by.argsort().chunk(4)]


@dataclass(frozen=True)
class ByQuarter:
    """A plot with one curve per arm of the rows' `quarters`, bands of one standard deviation.

    Attributes:
        name, title, x_label, y_label: of the plot.
        order: options -> what the samples were ordered by.
        level: whose rows.
        scale: of order and figure.
        arms: those with curves; by default all.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    order: Callable[[Any], Tensor]
    level: Any = None
    scale: tuple[float, float] = (1.0, 1.0)
    arms: Sequence[str] = ()

    def __call__(self, view: View) -> Plot:
        """The plot of a group; NotRunError where the data are not at hand that the samples are ordered by."""
        try:
            by = self.order(view.options)
        except DataError as error:
            raise NotRunError(f"the order of the samples ({error})") from error
        places = [self.scale[0] * value for value in quarters(by, by)]
        series = []
        for arm in view.arms(self.arms):
            runs = [row["quarters"] for row in view.chosen(arm, self.level)]
            if runs:
                columns = [[self.scale[1] * value for value in one] for one in zip(*runs, strict=True)]
                series.append(
                    Series(arm, places, [*map(statistics.fmean, columns)], [*map(deviation, columns)])
                )
        return Plot(
            self.name,
            self.title,
            self.x_label,
            self.y_label,
            series,
            "One curve per arm over quarters of the samples, bands of one standard deviation over seeds.",
        )
