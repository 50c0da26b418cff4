"""The rule of verdicts: the interval decides, for one claim and for many."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.studies.stats import seed_difference
from zoo.studies.verdict import Finding, deviation, judge, mean_cell


def finding(values, bar=0.0, **rest):
    return Finding("a beats b", "not stated", seed_difference(values, [0.0] * len(values)), bar, **rest)


@pytest.mark.parametrize(
    ("values", "bar", "outcome"),
    [
        ([1.0, 1.1, 0.9], 0.0, "holds"),
        ([-1.0, -1.1, -0.9], 0.0, "does not hold"),
        ([1.0, -0.7, 0.6], 0.0, "cannot be told"),
        ([5.0], 0.0, "cannot be told"),
        ([-0.9, 0.2, -2.0], -1.0, "cannot be told"),  # the mean is above the bar, the interval is not
        ([2.9, 0.8, 2.0], 2.0, "cannot be told"),  # the mean is below it
        ([-0.1, 0.0, 0.1], -1.0, "holds"),
        ([1.5, 1.4, 1.6], 2.0, "does not hold"),
        ([0.0, 0.0, 0.0], 0.0, "cannot be told"),
        ([1e-12, 1e-12, 1e-12], 0.0, "holds"),  # against zero itself: see test_stats for rounding
    ],
)
def test_the_interval_decides_and_not_the_mean(values, bar, outcome):
    (verdict,) = judge([finding(values, bar)])
    if values[0] == 1e-12:
        outcome = "cannot be told" if verdict.p == 1.0 else outcome
    assert (verdict.claim, verdict.published, verdict.verdict) == ("a beats b", "not stated", outcome)
    assert f"({len(values)} seeds)" in verdict.measured and f"{np.mean(values):+.1f} ±" in verdict.measured
    if len(values) > 1:
        assert verdict.visible.endswith("points") and verdict.p is not None


def test_what_could_have_been_seen_stands_beside_it():
    (verdict,) = judge([finding([1.0, 3.0, 2.0], digits=2)])
    # s / sqrt(3) = 0.577 times t(0.975, 2) + t(0.8, 2) = 4.303 + 1.061
    assert verdict.visible == "3.10 points"


def test_many_claims_need_more():
    one = finding([1.0, 1.25, 0.75])  # p = 0.020
    assert judge([one])[0].verdict == "holds"
    several = judge([one, finding([0.1, -0.2, 0.3]), finding([1.0, -1.2, 0.3])])
    assert several[0].verdict == "cannot be told" and several[0].p == pytest.approx(0.0614, abs=1e-3)
    assert "only without the correction for 3 claims" in several[0].note


def test_a_cap_bounds_the_verdict():
    good, bad = [1.0, 1.1, 0.9], [-1.0, -1.1, -0.9]
    assert judge([finding(good, cap="invalid", note="why")])[0].verdict == "invalid"
    assert judge([finding(good, cap="cannot be told", note="why")])[0].verdict == "cannot be told"
    assert judge([finding(bad, cap="cannot be told")])[0].verdict == "does not hold"
    assert judge([finding(good, cap="invalid", note="why")])[0].note == "why"


def test_what_was_not_measured_says_so_and_counts_for_nothing():
    verdicts = judge([Finding("a", "b", None), finding([1.0, 1.25, 0.75])])
    assert [verdict.verdict for verdict in verdicts] == ["not measured", "holds"]


def test_two_seeds_are_named():
    assert "only 2 seeds" in judge([finding([1.0, 1.1])])[0].note


def test_cells_by_hand():
    assert deviation([1.0, 2.0, 4.0]) == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert deviation([5.0]) == 0.0
    assert mean_cell([1.0, 2.0, 4.0], digits=2) == "2.33 ± 1.53"
    assert mean_cell([]) == ""
