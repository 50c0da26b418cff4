"""The statistics on simulated data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.errors import DataError
from zoo.studies.stats import (
    bootstrap_interval,
    detectable_difference,
    mcnemar_exact,
    paired_difference,
    seed_difference,
)


@pytest.mark.parametrize("continuous", [True, False])
def test_interval_covers_the_true_difference_as_often_as_it_says(continuous):
    rng = np.random.default_rng(1)
    true, hits, rounds = (0.3 if continuous else 0.1), 0, 400
    for _ in range(rounds):
        if continuous:
            delta = rng.normal(true, 1.0, 200)
        else:  # differences of 0/1 samples: +1 with 20 %, -1 with 10 %
            delta = rng.choice([1.0, 0.0, -1.0], p=[0.2, 0.7, 0.1], size=200)
        low, high = bootstrap_interval(delta, resamples=1000, seed=int(rng.integers(1 << 30)))
        hits += low <= true <= high
    # 95 % of 400 with a standard error of 1.1 %: four of them leave room for the bootstrap's own small bias
    assert 0.905 <= hits / rounds <= 0.995


def test_bootstrap_of_many_values_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(2.0, 3.0, 5000)
    low, high = bootstrap_interval(values, resamples=4000)
    error = values.std(ddof=1) / np.sqrt(5000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


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
    assert (got.value, got.low, got.high, got.p_value) == (0, 0, 0, 1.0)
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
