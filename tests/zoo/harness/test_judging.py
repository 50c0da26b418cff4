"""Verdicts on differences over seeds."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.harness.judging import deviation, judge, mean_cell
from zoo.harness.stats import seed_difference


@pytest.mark.parametrize(
    ("values", "bar", "outcome"),
    [
        ([1.0, 1.1, 0.9], None, "holds"),
        ([-1.0, -1.1, -0.9], None, "does not hold"),
        ([1.0, -0.7, 0.6], None, "no difference seen"),
        ([5.0], None, "no difference seen"),
        ([-0.9, 0.2, -2.0], -1.0, "holds"),
        ([1.9, 1.8, 2.0], 2.0, "does not hold"),
    ],
)
def test_signs_need_the_interval_and_bars_the_mean(values, bar, outcome):
    verdict = judge("a beats b", "not stated", seed_difference(values, [0.0] * len(values)), at_least=bar)
    assert (verdict.claim, verdict.published, verdict.verdict) == ("a beats b", "not stated", outcome)
    assert f"({len(values)} seeds)" in verdict.measured and f"{np.mean(values):+.1f} ±" in verdict.measured


def test_what_was_not_measured_says_so():
    assert judge("a", "b", None).verdict == "not measured"


def test_cells_by_hand():
    assert deviation([1.0, 2.0, 4.0]) == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert deviation([5.0]) == 0.0
    assert mean_cell([1.0, 2.0, 4.0], digits=2) == "2.33 ± 1.53"
    assert mean_cell([]) == ""
