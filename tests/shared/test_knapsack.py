"""The cheapest cover against all subsets."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.shared.errors import BudgetError
from zoo.shared.pruning.knapsack import cheapest_cover


@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0, 9, allow_nan=False)), max_size=9), st.integers(0, 200)
)
def test_no_subset_is_cheaper(items, target) -> None:
    weights, costs = [w for w, _ in items], [c for _, c in items]
    if target > sum(weights):
        with pytest.raises(BudgetError, match="asked for"):
            cheapest_cover(weights, costs, target)
        return
    chosen = cheapest_cover(weights, costs, target)
    assert sum(weights[i] for i in chosen) >= target and len(set(chosen)) == len(chosen)
    subsets = (s for n in range(len(items) + 1) for s in itertools.combinations(range(len(items)), n))
    least = min(sum(costs[i] for i in s) for s in subsets if sum(weights[i] for i in s) >= target)
    assert sum(costs[i] for i in chosen) == pytest.approx(least)


def test_large_targets_are_met() -> None:
    weights = [1_000_003, 2_000_001, 500_000, 3_333_333]
    for target in (1, 999_999, 3_000_000, sum(weights)):
        assert sum(weights[i] for i in cheapest_cover(weights, [3.0, 1.0, 1.0, 2.0], target)) >= target


def test_bad_numbers_are_refused() -> None:
    for weights, costs in (([1], []), ([-1], [0.0]), ([1], [float("nan")]), ([1], [-1.0])):
        with pytest.raises(BudgetError):
            cheapest_cover(weights, costs, 1)
