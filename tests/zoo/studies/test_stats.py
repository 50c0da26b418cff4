"""The statistics on simulated data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.errors import DataError
from zoo.studies.stats import (
    detectable_difference,
    holm,
    mcnemar_exact,
    paired_difference,
    seed_difference,
)

KINDS = {
    "normal": (lambda rng, n: rng.normal(0.3, 1.0, n), 0.3),
    "skewed": (lambda rng, n: rng.exponential(1.0, n), 1.0),
}


@pytest.mark.parametrize("n", [5, 10, 40, 200, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_cover_the_true_mean_as_often_as_they_say(kind, n):
    draw, true = KINDS[kind]
    rng, rounds = np.random.default_rng(n), 300
    hits = 0
    for _ in range(rounds):
        got = paired_difference(draw(rng, n), np.zeros(n), resamples=600, seed=int(rng.integers(1 << 30)))
        hits += got.low <= true <= got.high
    # 300 rounds have a standard error of 1.3 %. Fewer than forty values of an exponential law say too little
    # of its tail for any of these intervals: theirs may fall short by more.
    least = 0.92 if kind == "normal" else (0.84 if n < 10 else 0.87 if n < 40 else 0.91)
    assert hits / rounds >= least, (kind, n, hits / rounds)


@pytest.mark.parametrize("n", [5, 10, 40, 200, 1000])
def test_intervals_of_shares_cover_too(n):
    """Right and wrong answers of two models: +1 with 20 %, -1 with 10 % of the samples."""
    rng, rounds, hits = np.random.default_rng(n), 400, 0
    for _ in range(rounds):
        drawn = rng.choice(3, p=[0.2, 0.1, 0.7], size=n)
        a, b = (drawn != 1).astype(float), (drawn != 0).astype(float)
        got = paired_difference(a, b)
        hits += got.low <= 0.1 <= got.high
    assert hits / rounds >= 0.92, (n, hits / rounds)


def test_holm_by_hand():
    # 0.01 * 3, then max(0.03, 0.02 * 2), then max(0.04, 0.03)
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("pair", [paired_difference, seed_difference])
def test_a_difference_of_rounding_is_none(pair):
    base = np.linspace(1.0, 2.0, 12)
    got = pair(base + 1e-12, base)
    assert not got.seen and got.value == 0 and got.p_value == 1.0


def test_two_values_are_warned_of():
    assert "only 2" in seed_difference([1.0, 2.0], [0.5, 1.0]).warning
    assert "only 4" in paired_difference([1.0, 2.0, 3.0, 5.0], [0.5, 1.0, 1.0, 1.0]).warning


def test_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(2)
    n = 300
    reach = detectable_difference(rng.normal(0.0, 1.0, 100_000)) * np.sqrt(100_000 / n)
    draws = [rng.normal(reach, 1.0, n) for _ in range(400)]
    found = sum(paired_difference(draw, np.zeros(n), resamples=400).seen for draw in draws)
    assert 0.73 <= found / 400 <= 0.87


def test_no_difference_is_seen_rarely_when_there_is_none():
    rng = np.random.default_rng(3)
    right = [rng.random((2, 250)) < 0.8 for _ in range(300)]
    seen = sum(paired_difference(a.astype(float), b.astype(float), resamples=400).seen for a, b in right)
    assert seen / 300 <= 0.08


def test_mcnemar_by_hand():
    a = [1, 1, 1, 1, 1, 1, 0, 1, 0]
    b = [0, 0, 0, 0, 0, 0, 1, 1, 0]
    # 6 gained, 1 lost: 2 * (C(7,0) + C(7,1)) / 2**7
    assert mcnemar_exact(a, b) == pytest.approx(2 * 8 / 128)
    assert mcnemar_exact(a, a) == 1.0


def test_binary_samples_can_not_detect_less_than_the_exact_test():
    same = np.ones(100)
    got = paired_difference(same, same)
    assert (got.value, got.p_value) == (0, 1.0) and got.low < 0 < got.high
    assert not got.seen
    # six one-sided discordant pairs are the fewest with p < 0.05
    assert got.detectable == pytest.approx(6 / 100)
    gained = np.zeros(100)
    gained[:6] = 1
    assert mcnemar_exact(gained, np.zeros(100)) < 0.05 < mcnemar_exact(gained[1:], np.zeros(99))


def test_equal_seeds_give_equal_intervals_and_sides_swap():
    rng = np.random.default_rng(4)
    a, b = rng.random(50), rng.random(50)
    assert paired_difference(a, b, seed=7) == paired_difference(a, b, seed=7)
    assert paired_difference(a, b).value == pytest.approx(-paired_difference(b, a).value)


def test_constant_difference_is_seen_and_seeds_use_student():
    base = np.linspace(0, 1, 20)
    assert paired_difference(base + 1.0, base).value == pytest.approx(1.0)
    got = seed_difference([2.0, 3.0, 4.0], [1.0, 1.0, 3.0])
    assert got.value == pytest.approx(4 / 3)
    # t(0.975, 2) = 4.303 and s = 0.577 / sqrt(3)
    assert got.high - got.value == pytest.approx(4.3027 * np.std([1, 2, 1], ddof=1) / np.sqrt(3), rel=1e-3)
    assert got.detectable > got.high - got.value
    single = seed_difference([2.0], [1.0])
    assert (single.value, single.low, single.high, single.seen) == (1.0, -np.inf, np.inf, False)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], "same samples"),
        ([1.0], [1.0], "at least 2"),
        ([1.0, float("nan")], [1.0, 2.0], "NaN"),
    ],
)
def test_refusals(a, b, message):
    with pytest.raises(DataError, match=message):
        paired_difference(a, b)
