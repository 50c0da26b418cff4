"""From the runs of several seeds to verdicts: what an experiment says of a claim."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from zoo.harness.stats import Difference
from zoo.harness.tables import Outcome, Verdict


def judge(
    claim: str,
    published: str,
    difference: Difference | None,
    *,
    at_least: float | None = None,
    unit: str = "points",
    digits: int = 1,
) -> Verdict:
    """The verdict on a claim that one arm is above another.

    Args:
        claim: what is claimed, with the setting it was tried in.
        published: what the paper says, or that it says nothing.
        difference: the paired difference over seeds (`stats.seed_difference`), positive where the claim is
            right; None where it was not measured.
        at_least: a bar that the mean must reach; by default the difference must be above zero beyond its
            interval, and an interval that holds zero is "no difference seen".
        unit: of the difference.
        digits: decimals shown.
    """
    if difference is None:
        return Verdict(claim, published, "", "not measured")
    outcome: Outcome
    if at_least is not None:
        outcome = "holds" if difference.value >= at_least else "does not hold"
    elif difference.low > 0:
        outcome = "holds"
    else:
        outcome = "does not hold" if difference.high < 0 else "no difference seen"
    half = (difference.high - difference.low) / 2
    measured = f"{difference.value:+.{digits}f} ± {half:.{digits}f} {unit} ({difference.n} seeds)"
    return Verdict(claim, published, measured, outcome)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation over seeds (n - 1); 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_cell(values: Sequence[float], digits: int = 1) -> str:
    """A table's cell: mean ± sample standard deviation over seeds; empty where there are no values."""
    return f"{statistics.fmean(values):.{digits}f} ± {deviation(values):.{digits}f}" if values else ""
