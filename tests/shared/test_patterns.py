"""Patterns: hand-made tables of expected masks, exact counts, ties, refusals."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.shared.errors import PatternError
from zoo.shared.masks.patterns import (
    NM,
    Block,
    Channel,
    Group,
    Unstructured,
    Whole,
    parse_pattern,
    pattern_from_dict,
    topk_mask,
)


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[character == "x" for character in row] for row in rows])


SCORE = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 5.0, 3.0]])

# Score as above; ties (three 3s, two 0s) go to the lower row-major index.
TABLE = [
    (Unstructured(), 0, mask("....", "....")),
    (Unstructured(), 1, mask("....", "..x.")),
    (Unstructured(), 2, mask(".x..", "..x.")),
    (Unstructured(), 3, mask(".x.x", "..x.")),
    (Unstructured(), 6, mask("xxxx", "..xx")),
    (Unstructured(), 7, mask("xxxx", "x.xx")),
    (Unstructured(), 8, mask("xxxx", "xxxx")),
    (NM(2, 4), 0, mask(".x.x", "..xx")),
    (NM(1, 4), 0, mask(".x..", "..x.")),
    (NM(1, 2), 0, mask(".x.x", "x.x.")),
    (NM(1, 2, dim=0), 0, mask("xx.x", "..x.")),
    (Block(2, 2), 4, mask("..xx", "..xx")),
    (Block(1, 2), 4, mask("..xx", "..xx")),
    (Block(1, 2), 6, mask("xxxx", "..xx")),
    (Block(2, 1), 2, mask("..x.", "..x.")),
    (Block(2, 1), 4, mask("..xx", "..xx")),
    (Group(0), 4, mask("xxxx", "....")),
    (Group(1), 2, mask("..x.", "..x.")),
    (Group(-1), 6, mask(".xxx", ".xxx")),
    (Whole(), 0, mask("....", "....")),
    (Whole(), 8, mask("xxxx", "xxxx")),
]


@pytest.mark.parametrize(("pattern", "kept", "expected"), TABLE, ids=lambda value: str(value)[:20])
def test_expected_masks(pattern, kept, expected):
    got = pattern.keep(SCORE, kept)
    assert torch.equal(got, expected)
    pattern.check(got)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
@settings(max_examples=150, deadline=None)
def test_topk_is_the_stable_sort(values, data):
    kept = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[order[:kept]] = True
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        assert torch.equal(topk_mask(torch.tensor(values, dtype=dtype), kept), expected)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, -torch.inf])
def test_equal_scores_keep_the_lower_index(value):
    got = topk_mask(torch.full((3, 7), value), 8)
    assert torch.equal(got.reshape(-1), torch.arange(21) < 8)


def test_topk_of_a_scalar_and_of_nothing():
    assert topk_mask(torch.tensor(2.0), 1).item() is True
    assert topk_mask(torch.zeros(0, 4), 0).shape == (0, 4)


@pytest.mark.parametrize("kept", [-1, 9])
def test_count_out_of_range_is_refused(kept):
    with pytest.raises(PatternError, match="between 0 and 8"):
        topk_mask(SCORE, kept)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(1, 2), Group(0), Whole()], ids=str)
def test_nan_scores_are_refused(pattern):
    score = SCORE.clone()
    score[1, 2] = torch.nan
    with pytest.raises(PatternError, match="1 of 8 scores are NaN|1 of . scores are NaN"):
        pattern.keep(score, 8)


@pytest.mark.parametrize(
    "pattern", [Unstructured(), NM(2, 4, dim=1), Block(2, 3), Group(1), Group(0), Whole()], ids=str
)
def test_memory_layout_does_not_matter(pattern):
    score = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    kept = pattern.feasible(score.shape, 144)
    expected = pattern.keep(score, kept)
    assert torch.equal(pattern.keep(score.to(memory_format=torch.channels_last), kept), expected)
    strided = torch.empty(8, 4, 3, 6)[..., ::2].copy_(score)
    assert torch.equal(pattern.keep(strided, kept), expected)


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (NM(2, 4), (8, 6), "multiple of 4.*has 6 there: leave this tensor out"),
        (NM(2, 4, dim=2), (8, 8), "needs dimension 2"),
        (Block(3, 2), (8, 6), "8x6 of shape .* 3x2 tiles: leave this tensor out"),
        (Block(2, 4), (4, 3, 3, 3), "4x27"),
        (Block(1, 1), (), "scalar"),
        (Group(2), (8, 6), "needs dimension 2"),
    ],
)
def test_shapes_that_do_not_divide_are_refused(pattern, shape, message):
    with pytest.raises(PatternError, match=message):
        pattern.check_shape(shape)
    with pytest.raises(PatternError, match=message):
        pattern.keep(torch.zeros(shape), 0)


@pytest.mark.parametrize(
    ("pattern", "kept"), [(Block(2, 2), 3), (Group(0), 2), (Whole(), 5), (Unstructured(), 9)]
)
def test_counts_that_are_no_whole_units_are_refused(pattern, kept):
    with pytest.raises(PatternError, match="feasible"):
        pattern.keep(SCORE, kept)


def test_feasible_is_the_largest_count_not_above():
    assert [Block(2, 2).feasible((2, 4), kept) for kept in (0, 3, 4, 7, 99)] == [0, 0, 4, 4, 8]
    assert [Group(0).feasible((2, 4), kept) for kept in (3, 4, 8)] == [0, 4, 8]
    assert [Whole().feasible((2, 4), kept) for kept in (7, 8)] == [0, 8]
    assert NM(2, 4).feasible((2, 4), 99) == NM(2, 4).feasible((2, 4), 0) == 4


def test_largest_sparsity():
    assert Unstructured().max_sparsity((2, 4)) == pytest.approx(7 / 8)
    assert Block(2, 2).max_sparsity((2, 4)) == pytest.approx(1 / 2)
    assert NM(1, 4).max_sparsity((2, 4)) == pytest.approx(3 / 4)
    assert Whole().max_sparsity((2, 4)) == 0


@pytest.mark.parametrize(
    ("pattern", "broken"),
    [
        (NM(2, 4), mask("xxx.", "xx..")),
        (Block(2, 2), mask("xx..", "x...")),
        (Group(1), mask("x...", "....")),
        (Whole(), mask("xxxx", "xxx.")),
    ],
)
def test_check_finds_a_broken_pattern(pattern, broken):
    with pytest.raises(PatternError, match="rebuild"):
        pattern.check(broken)


def test_fewer_than_n_of_m_is_legal():
    NM(2, 4).check(mask("x...", "...."))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 2)])
def test_impossible_nm(n, m):
    with pytest.raises(PatternError, match="1 <= n <= m"):
        NM(n, m)


def test_nm_on_the_way_to_its_goal():
    assert [NM(1, 4).at(s).n for s in (0.0, 0.24, 0.25, 0.5, 0.6, 0.75)] == [4, 4, 3, 2, 2, 1]
    assert NM(2, 4).at(0.99) == NM(2, 4)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Unstructured()),
        ("2:4", NM(2, 4)),
        ("1:8@1", NM(1, 8, dim=1)),
        ("3:4@0", NM(3, 4, dim=0)),
        ("block4x1", Block(4, 1)),
        ("channel0", Channel(0)),
        ("channel-1", Group(-1)),
        ("whole", Whole()),
    ],
)
def test_names_and_dictionaries_round_trip(text, pattern):
    assert parse_pattern(text) == pattern == parse_pattern(str(pattern))
    assert str(pattern) == text
    assert pattern_from_dict(pattern.to_dict()) == pattern


@pytest.mark.parametrize("text", ["", "2-4", "4:2", "block4", "block0x1", "channel", "Unstructured", "2:4@x"])
def test_unreadable_names(text):
    with pytest.raises(PatternError):
        parse_pattern(text)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kind": "nm", "n": 2},
        {"kind": "nm", "n": 2.0, "m": 4},
        {"kind": "x"},
        {"kind": "whole", "dim": 1},
        {"kind": []},
    ],
)
def test_unreadable_dictionaries(values):
    with pytest.raises(PatternError):
        pattern_from_dict(values)


def test_selection_is_not_a_sort():
    # A full sort of the same tensor takes several times as long; selection must not.
    score = torch.rand(4_000_000, generator=torch.Generator().manual_seed(0))
    took = {}
    for name, run in {"topk": lambda: topk_mask(score, 400_000), "sort": lambda: score.sort()}.items():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        took[name] = min(times)
    assert took["topk"] < took["sort"]
    assert int(topk_mask(score, 400_000).sum()) == 400_000
