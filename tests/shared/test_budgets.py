"""Budgets: exact totals, hand-computed shares, floors, and the knapsack against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.shared.errors import BudgetError, PatternError
from zoo.shared.masks.patterns import NM, Block, Group, Unstructured, Whole
from zoo.shared.pruning.budgets import (
    BUDGETS,
    ErdosRenyi,
    Floor,
    Global,
    Knapsack,
    SensitivityWeighted,
    Uniform,
    check_sparsity,
    kept_count,
)

SHAPES = {"conv1": (16, 3, 3, 3), "conv2": (32, 16, 3, 3), "fc": (10, 32), "tiny": (2, 2)}
NUMEL = {name: math.prod(shape) for name, shape in SHAPES.items()}
TOTAL = sum(NUMEL.values())


def scores(seed: int = 0, shapes=SHAPES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("sparsity", [1.0, -0.1, math.nan, math.inf, 90.0])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(BudgetError, match=r"must lie in \[0, 1\); received"):
        check_sparsity(sparsity)
    with pytest.raises(BudgetError, match="must lie in"):
        Global().allocate(scores(), sparsity)


def test_kept_count_takes_the_decimal_at_its_word():
    # 0.29 * 100 = 28.999999999999996 in binary
    assert [kept_count(100, s) for s in (0.0, 0.29, 0.3, 0.57, 0.999)] == [100, 71, 70, 43, 1]
    assert kept_count(7, 0.5) == 4 and kept_count(0, 0.5) == 0 and kept_count(10, 1 / 3) == 7


@pytest.mark.parametrize("name", sorted(BUDGETS))
@given(sparsity=st.floats(0, 0.999), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_total_is_exact(name, sparsity, seed):
    counts = BUDGETS[name]().allocate(scores(seed), sparsity)
    assert sum(counts.values()) == kept_count(TOTAL, sparsity)
    assert list(counts) == list(SHAPES)
    assert all(0 <= counts[tensor] <= NUMEL[tensor] for tensor in SHAPES)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=7),
    sparsity=st.floats(0, 0.999),
    weights=st.lists(st.floats(0.01, 100), min_size=7, max_size=7),
)
@settings(max_examples=150, deadline=None)
def test_sensitivity_total_is_exact(sizes, sparsity, weights):
    shapes = {str(i): (n,) for i, n in enumerate(sizes)}
    counts = SensitivityWeighted({str(i): w for i, w in enumerate(weights)}).allocate(shapes, sparsity)
    assert sum(counts.values()) == kept_count(sum(sizes), sparsity)
    assert all(0 <= counts[str(i)] <= n for i, n in enumerate(sizes))


def test_uniform_hand_computed():
    # 7 of 10 kept: 2.1, 2.8 and 2.1 round to 2, 3, 2
    assert Uniform().allocate({"a": (3,), "b": (4,), "c": (3,)}, 0.3) == {"a": 2, "b": 3, "c": 2}
    # equal fractions: the first gets the rest
    assert Uniform().allocate({"a": (3,), "b": (3,), "c": (3,)}, 0.5) == {"a": 2, "b": 2, "c": 1}


def test_erk_hand_computed():
    # Densities eps * sum/prod: kept eps * (4+4), eps * (10+10), eps * (8+1+3+3) -> shares 8:20:15
    shapes = {"a": (4, 4), "b": (10, 10), "c": (8, 1, 3, 3)}
    total = 16 + 100 + 72
    kept = kept_count(total, 0.9)
    assert kept == 19
    counts = ErdosRenyi().allocate(shapes, 0.9)
    exact = {name: kept * part / 43 for name, part in {"a": 8, "b": 20, "c": 15}.items()}
    assert all(abs(counts[name] - exact[name]) < 1 for name in shapes)
    # Without the kernel the convolution counts 8+1 over 8*1, on its 72 entries: 81
    exact = {name: kept * part / 109 for name, part in {"a": 8, "b": 20, "c": 81}.items()}
    counts = ErdosRenyi(kernel=False).allocate(shapes, 0.9)
    assert all(abs(counts[name] - exact[name]) < 1 for name in shapes)


def test_erk_caps_and_solves_again():
    # 2x2 would get density above 1: it stays dense, the rest share what is left in proportion 40:20
    counts = ErdosRenyi().allocate({"small": (2, 2), "large": (20, 20), "mid": (10, 10)}, 0.7)
    kept = kept_count(504, 0.7)
    assert counts["small"] == 4
    left = kept - 4
    assert abs(counts["mid"] - min(100, left / 3)) < 1 and sum(counts.values()) == kept


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_global_counts_are_those_of_one_threshold(sparsity):
    values = scores()
    kept = kept_count(TOTAL, sparsity)
    flat = torch.cat([value.flatten() for value in values.values()])
    threshold = flat.sort(descending=True).values[kept - 1]
    expected = {name: int((value >= threshold).sum()) for name, value in values.items()}
    assert Global().allocate(values, sparsity) == expected


def test_global_ties_go_to_the_first():
    ones = {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4)}
    assert Global().allocate(ones, 0.5) == {"a": 4, "b": 2, "c": 0}


def test_global_needs_scores_and_uniform_does_not():
    with pytest.raises(BudgetError, match="needs the scores of 'conv1'"):
        Global().allocate(SHAPES, 0.5)
    assert sum(Uniform().allocate(SHAPES, 0.5).values()) == kept_count(TOTAL, 0.5)


@pytest.mark.parametrize("name", sorted(BUDGETS))
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_structured_totals_fall_short_by_less_than_a_unit(name, sparsity):
    patterns = {"conv1": Group(0), "conv2": Block(4, 1), "fc": Block(2, 2), "tiny": Unstructured()}
    counts = BUDGETS[name]().allocate(scores(), sparsity, patterns)
    for tensor, count in counts.items():
        assert patterns[tensor].feasible(SHAPES[tensor], count) == count
    kept = kept_count(TOTAL, sparsity)
    assert kept - 27 < sum(counts.values()) <= kept


def test_best_units_of_different_sizes():
    # Means per unit: a's blocks 4, 1; b's entries 3, 2, 0, 5. Six entries: b[3], a[0] (4 entries), then b[0].
    values = {"a": torch.tensor([[4.0, 4, 1, 1], [4, 4, 1, 1]]), "b": torch.tensor([3.0, 2, 0, 5])}
    patterns = {"a": Block(2, 2), "b": Unstructured()}
    assert Global().allocate(values, 0.5, patterns) == {"a": 4, "b": 2}
    # Three entries: the block of four does not fit and is passed over.
    assert Global().allocate(values, 0.75, patterns) == {"a": 0, "b": 3}


def test_nm_tensors_are_fixed_and_the_rest_is_shared():
    shapes = {"nm": (4, 8), "free": (6, 6)}
    for name in BUDGETS:
        counts = BUDGETS[name]().allocate(scores(0, shapes), 0.6, {"nm": NM(2, 4), "free": Unstructured()})
        assert counts == {"nm": 16, "free": kept_count(68, 0.6) - 16}
    with pytest.raises(BudgetError, match="need 16 of 68 entries, the sparsity leaves 14"):
        Uniform().allocate(shapes, 0.8, {"nm": NM(2, 4), "free": Unstructured()})
    assert Uniform().allocate({"nm": (4, 8)}, 0.1, NM(2, 4)) == {"nm": 16}


@pytest.mark.parametrize("base", [Uniform(), Global(), ErdosRenyi()], ids=lambda base: type(base).__name__)
@given(
    sparsity=st.floats(0, 0.97), floor=st.integers(0, 12), share=st.floats(0, 0.005), seed=st.integers(0, 3)
)
@settings(max_examples=60, deadline=None)
def test_no_layer_falls_below_its_floor(base, sparsity, floor, share, seed):
    counts = Floor(base, kept=floor, share=share).allocate(scores(seed), sparsity)
    lowest = max(floor, math.ceil(share * TOTAL))
    assert sum(counts.values()) == kept_count(TOTAL, sparsity)
    assert all(counts[name] >= min(lowest, NUMEL[name]) for name in SHAPES)


def test_floor_repairs_a_collapsed_layer():
    values = scores()
    values["fc"] *= 1e-6
    assert Global().allocate(values, 0.9)["fc"] == 0
    repaired = Floor(Global(), kept=5).allocate(values, 0.9)
    assert repaired["fc"] == 5 and sum(repaired.values()) == kept_count(TOTAL, 0.9)


def test_uniform_plus_and_erk_plus():
    plus = Floor(Uniform(), kept=0, density={"conv1": 1.0, "fc": 0.2}).allocate(SHAPES, 0.85)
    assert plus["conv1"] == NUMEL["conv1"] and plus["fc"] == 64
    assert sum(plus.values()) == kept_count(TOTAL, 0.85)
    assert Floor(ErdosRenyi(), density={"fc": 1.0}).allocate(SHAPES, 0.9)["fc"] == 320


def test_floors_in_whole_units():
    counts = Floor(Global(), kept=1).allocate(scores(), 0.8, {n: Group(0) for n in SHAPES})
    assert all(counts[name] >= NUMEL[name] // SHAPES[name][0] for name in SHAPES)


@pytest.mark.parametrize(
    ("floor", "sparsity", "message"),
    [
        (Floor(Global(), kept=400), 0.9, "lower the sparsity"),
        (Floor(Uniform(), density=0.2), 0.9, "floors need .* of 5364 entries, the sparsity leaves 537"),
        (Floor(Uniform(), density={"fcc": 0.2}), 0.5, "fcc"),
    ],
)
def test_impossible_floors(floor, sparsity, message):
    with pytest.raises(BudgetError, match=message):
        floor.allocate(scores(), sparsity)


@pytest.mark.parametrize(
    "bad", [{"kept": -1}, {"share": 1.5}, {"density": -0.1}, {"density": {"a": math.nan}}]
)
def test_nonsense_floors(bad):
    with pytest.raises(BudgetError, match="a floor needs"):
        Floor(Uniform(), **bad)


def test_sensitivity_weighting_orders_densities():
    shapes = {"a": (100,), "b": (100,)}
    assert SensitivityWeighted({"a": 3.0, "b": 1.0}).allocate(shapes, 0.8) == {"a": 30, "b": 10}
    assert SensitivityWeighted({"a": 3.0, "b": 1.0}, power=0.0).allocate(shapes, 0.8) == {"a": 20, "b": 20}
    assert SensitivityWeighted({"a": 9.0, "b": 1.0}).allocate(shapes, 0.4) == {"a": 100, "b": 20}
    for wrong in ({"a": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": math.nan}):
        with pytest.raises(BudgetError, match="'b'"):
            SensitivityWeighted(wrong).allocate(shapes, 0.8)


@pytest.mark.parametrize("seed", range(6))
def test_knapsack_against_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.rand(10, generator=generator) * (i + 1) for i, name in enumerate("abc")}
    price = {"a": 1, "b": 3, "c": 7}
    grid = (0.0, 0.2, 0.5, 0.8)
    dense = sum(10 * price[name] for name in values)
    limit = dense // 2

    def kept_score(name: str, count: int) -> float:
        return float(values[name].sort(descending=True).values[:count].double().sum())

    feasible = [
        counts
        for counts in itertools.product((0, 2, 5, 8, 10), repeat=3)
        if sum(price[n] * c for n, c in zip(values, counts, strict=True)) <= limit
    ]
    best = max(sum(kept_score(n, c) for n, c in zip(values, counts, strict=True)) for counts in feasible)
    budget = Knapsack(cost=lambda name, kept: float(price[name] * kept), densities=grid, buckets=limit)
    counts = budget.allocate(values, 0.5)
    assert sum(price[name] * counts[name] for name in values) <= limit
    assert sum(kept_score(name, counts[name]) for name in values) == pytest.approx(best, rel=1e-6)


def test_knapsack_takes_any_cost_and_never_exceeds_it():
    values = scores()

    def latency(name: str, kept: int) -> float:  # sparse kernels pay only below half density
        dense = NUMEL[name] * 1e-6
        return min(dense, 2 * dense * kept / NUMEL[name] + 1e-6)

    counts = Knapsack(cost=latency).allocate(values, 0.6)
    assert (
        sum(latency(n, counts[n]) for n in values) <= 0.4 * sum(latency(n, NUMEL[n]) for n in values) + 1e-12
    )
    with pytest.raises(BudgetError, match="cheapest choice"):
        Knapsack(cost=lambda name, kept: 1.0 + kept).allocate(values, 0.999)
    by_size = Knapsack().allocate(values, 0.7, {n: Group(0) for n in SHAPES})
    assert sum(by_size.values()) <= kept_count(TOTAL, 0.7)


def test_whole_layers_by_knapsack():
    values = {"a": torch.full((10,), 1.0), "b": torch.full((10,), 3.0), "c": torch.full((10,), 2.0)}
    assert Knapsack().allocate(values, 0.3, Whole()) == {"a": 0, "b": 10, "c": 10}


def test_bad_arguments_are_named():
    with pytest.raises(BudgetError, match="no pattern for 'tiny'"):
        Uniform().allocate(SHAPES, 0.5, {n: Unstructured() for n in SHAPES if n != "tiny"})
    with pytest.raises(PatternError, match="multiple of 4"):
        Uniform().allocate({"a": (4, 6)}, 0.5, NM(2, 4))
