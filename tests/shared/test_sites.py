"""Coordinate sets against dictionaries and loops, convolutions against dense ones."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.shared.errors import OpError
from zoo.shared.sites import (
    Padding,
    SiteSet,
    convolve,
    gather_rows,
    neighbour_table,
    pack_keys,
    quantize,
    rank_in_group,
    scatter_rows,
    strided_rulebook,
    submanifold_rulebook,
    unique_sites,
    unpack_keys,
    windows,
)

GRIDS = [(2, 5, 4), (1, 3, 4, 5), (3, 7)]


def random_points(extent: tuple[int, ...], count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, side, (count,), generator=generator) for side in extent], 1)


def random_sites(extent: tuple[int, ...], count: int, seed: int = 0) -> SiteSet:
    """Distinct sites in random order."""
    sites = unique_sites(random_points(extent, count, seed), extent).sites
    return SiteSet(
        sites.coords[torch.randperm(len(sites), generator=torch.Generator().manual_seed(seed))], extent
    )


# -- keys and sets


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 30), st.integers(0, 1000))
def test_keys_number_the_cells(extent, count, seed) -> None:
    points = random_points(tuple(extent), count, seed)
    keys = pack_keys(points, extent)
    cells = {cell: i for i, cell in enumerate(itertools.product(*map(range, extent)))}
    assert keys.tolist() == [cells[tuple(p)] for p in points.tolist()]
    assert torch.equal(unpack_keys(keys, extent), points)


def test_keys_of_large_grids() -> None:
    extent = (3, 2**20, 2**20, 2**20)
    points = torch.tensor([[2, 2**20 - 1, 0, 2**20 - 1], [0, 0, 0, 0]])
    assert torch.equal(unpack_keys(pack_keys(points, extent), extent), points)
    with pytest.raises(OpError, match=r"2\*\*63 cells or more"):
        pack_keys(points, (8, 2**20, 2**20, 2**20))


@pytest.mark.parametrize("extent", GRIDS)
def test_unique_against_a_dictionary(extent) -> None:
    points = random_points(extent, 40)
    found = unique_sites(points, extent)
    counts: dict[tuple, int] = {}
    for point in map(tuple, points.tolist()):
        counts[point] = counts.get(point, 0) + 1
    assert [tuple(c) for c in found.sites.coords.tolist()] == sorted(counts)
    assert found.counts.tolist() == [counts[key] for key in sorted(counts)]
    assert torch.equal(found.sites.coords[found.inverse], points)
    order = torch.randperm(40)
    again = unique_sites(points[order], extent)
    assert torch.equal(again.sites.coords, found.sites.coords) and torch.equal(again.counts, found.counts)


@pytest.mark.parametrize("extent", GRIDS)
def test_lookup_against_a_dictionary(extent) -> None:
    sites = random_sites(extent, 25)
    rows = {tuple(c): i for i, c in enumerate(sites.coords.tolist())}
    queries = torch.cat([random_points(tuple(side + 3 for side in extent), 60) - 1, sites.coords.int()])
    assert sites.lookup(queries).tolist() == [rows.get(tuple(q), -1) for q in queries.tolist()]


def test_intersection() -> None:
    a, b = random_sites((2, 6, 6), 40, 1), random_sites((2, 6, 6), 40, 2)
    here, there = a.intersection(b)
    assert torch.equal(a.coords[here], b.coords[there]) and torch.equal(here, here.sort().values)
    shared = {tuple(c) for c in a.coords.tolist()} & {tuple(c) for c in b.coords.tolist()}
    assert {tuple(c) for c in a.coords[here].tolist()} == shared and 0 < len(shared) < len(a)
    with pytest.raises(OpError, match="bring them to one"):
        a.intersection(random_sites((2, 6, 7), 5))


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (torch.tensor([[0, 1], [0, 4]]), r"site 1 at \[0, 4\] lies outside"),
        (torch.tensor([[0, -1]]), "lies outside"),
        (
            torch.tensor([[0, 1], [0, 2], [0, 1]]),
            r"site \[0, 1\] occurs twice \(1 duplicates\); merge with unique_sites",
        ),
        (torch.tensor([[0.0, 1.0]]), "coordinates are integers, received torch.float32"),
        (torch.tensor([[0.0, float("nan")]]), "coordinates are integers"),
        (torch.tensor([[True, False]]), "coordinates are integers"),
        (torch.tensor([0, 1]), "one row per site"),
        (torch.tensor([[0, 1, 2]]), "one column per dimension"),
    ],
)
def test_sets_refuse(coords, message) -> None:
    with pytest.raises(OpError, match=message):
        SiteSet(coords, (1, 4))


def test_grids_refuse() -> None:
    with pytest.raises(OpError, match="does not exist"):
        SiteSet(torch.zeros(0, 0, dtype=torch.long), ())
    with pytest.raises(OpError, match="does not exist"):
        pack_keys(torch.zeros(0, 2, dtype=torch.long), (2, -1))
    with pytest.raises(OpError, match="for a grid of 6 cells"):
        unpack_keys(torch.tensor([6]), (2, 3))


def test_quantize() -> None:
    points = torch.tensor([[0.0, 0.0], [0.99, 1.0], [1.0, -0.01], [2.0, 0.5], [1e30, 0.0]])
    coords, inside = quantize(points, (0, 0), (0.5, 0.25), (4, 5))
    assert coords[inside].tolist() == [[0, 0], [1, 4]] and inside.tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(OpError, match="1 of 2 points are NaN or infinite, the first in row 1"):
            quantize(torch.tensor([[0.0], [bad]]), (0,), (1,), (3,))
    with pytest.raises(OpError, match="positive size"):
        quantize(points, (0, 0), (0.5, 0), (4, 5))


# -- groups


def test_gather_with_missing_rows() -> None:
    values = torch.arange(6.0).reshape(3, 2).requires_grad_()
    got = gather_rows(values, torch.tensor([2, -1, 0]))
    assert got.tolist() == [[4, 5], [0, 0], [0, 1]]
    got.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert gather_rows(torch.zeros(0, 4), torch.tensor([-1, -1])).shape == (2, 4)
    for bad in ([3], [-2]):
        with pytest.raises(OpError, match="-1 to 2 are allowed"):
            gather_rows(values, torch.tensor(bad))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("shape", [(50,), (50, 3), (50, 2, 2)])
def test_scatter_against_a_loop(reduce, shape) -> None:
    values = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 7, (50,), generator=torch.Generator().manual_seed(0))
    index[index == 3] = 2  # an empty group
    got = scatter_rows(values, index, 8, reduce)
    for group in range(8):
        rows = values[index == group]
        expected = torch.zeros(shape[1:], dtype=torch.float64)
        if len(rows):
            expected = {"sum": rows.sum(0), "mean": rows.mean(0), "max": rows.amax(0)}[reduce]
        torch.testing.assert_close(got[group], expected)
    assert torch.autograd.gradcheck(lambda v: scatter_rows(v, index, 8, reduce), values)


def test_scatter_refuses() -> None:
    with pytest.raises(OpError, match="0 to 2 are allowed"):
        scatter_rows(torch.ones(2), torch.tensor([0, 3]), 3)
    with pytest.raises(OpError, match="0 to -1 are allowed"):
        scatter_rows(torch.ones(1), torch.tensor([0]), 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40))
def test_ranks_and_padding(groups) -> None:
    group = torch.tensor(groups, dtype=torch.long)
    seen: dict[int, int] = {}
    expected = []
    for g in groups:
        expected.append(seen.get(g, 0))
        seen[g] = seen.get(g, 0) + 1
    assert rank_in_group(group).tolist() == expected
    padding = Padding(group, 6)
    values = torch.arange(1.0, len(groups) + 1)[:, None].expand(-1, 2)
    block = padding.pad(values, fill=-1)
    assert block.shape == (6, max(seen.values(), default=0), 2) and int(padding.valid.sum()) == len(groups)
    assert bool((block[~padding.valid] == -1).all()) and torch.equal(padding.unpad(block), values)
    for g in range(6):
        assert block[g][padding.valid[g]][:, 0].tolist() == [i + 1 for i, x in enumerate(groups) if x == g]


def test_padding_refuses() -> None:
    group = torch.tensor([0, 1, 1])
    assert Padding(group, 2, length=5).pad(torch.ones(3)).shape == (2, 5)
    with pytest.raises(OpError, match="a group has 2 rows, the padded length is 1"):
        Padding(group, 2, length=1)
    with pytest.raises(OpError, match="0 to 0 are allowed"):
        Padding(group, 1)
    with pytest.raises(OpError, match="2 rows for a padding of 3"):
        Padding(group, 2).pad(torch.ones(2))
    with pytest.raises(OpError, match="expected"):
        Padding(group, 2).unpad(torch.ones(2, 3))


@pytest.mark.parametrize("shift", [None, (0, 0), (1, 2)])
def test_windows_against_a_dictionary(shift) -> None:
    sites = random_sites((2, 7, 9), 60)
    found = windows(sites, (3, 4), shift)
    sx, sy = shift or (0, 0)
    boxes = [(b, (x + sx) // 3, (y + sy) // 4) for b, x, y in sites.coords.tolist()]
    number = {box: i for i, box in enumerate(sorted(set(boxes)))}
    assert found.group.tolist() == [number[box] for box in boxes] and found.count == len(number)
    assert found.local.tolist() == [[(x + sx) % 3, (y + sy) % 4] for _, x, y in sites.coords.tolist()]


@pytest.mark.parametrize(
    ("size", "shift"), [((3,), None), ((3, 0), None), ((3, 3), (3, 0)), ((3, 3), (-1, 0)), ((3, 3), (1,))]
)
def test_windows_refuse(size, shift) -> None:
    with pytest.raises(OpError, match="positive sizes and smaller shifts"):
        windows(random_sites((2, 7, 9), 5), size, shift)


# -- rulebooks


@pytest.mark.parametrize(
    ("extent", "kernel", "dilation"),
    [
        ((2, 5, 6), 3, 1),
        ((2, 5, 6), (1, 3), 2),
        ((1, 4, 4, 4), 3, 1),
        ((3, 9), 5, 1),
    ],
)
def test_neighbours_against_a_dictionary(extent, kernel, dilation) -> None:
    sites = random_sites(extent, 40)
    dims = len(extent) - 1
    sizes = (kernel,) * dims if isinstance(kernel, int) else kernel
    rows = {tuple(c): i for i, c in enumerate(sites.coords.tolist())}
    expected = []
    for batch, *place in sites.coords.tolist():
        offsets = itertools.product(*map(range, sizes))
        expected.append(
            [
                rows.get(
                    (batch, *(p + (o - s // 2) * dilation for p, o, s in zip(place, k, sizes, strict=True))),
                    -1,
                )
                for k in offsets
            ]
        )
    table = neighbour_table(sites, kernel, dilation)
    assert table.tolist() == expected
    assert torch.equal(table[:, table.shape[1] // 2], torch.arange(len(sites)))


def to_dense(features: torch.Tensor, sites: SiteSet) -> torch.Tensor:
    """(batch, channels, *space) with zeros where there is no site."""
    dense = features.new_zeros(*sites.extent, features.shape[1])
    dense[tuple(sites.coords.t())] = features
    return dense.movedim(-1, 1)


def dense_weight(weight: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    return weight.reshape(*sizes, *weight.shape[1:]).movedim((-1, -2), (0, 1))


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize(
    ("extent", "kernel", "dilation"),
    [((2, 8, 7), (3, 3), 1), ((2, 8, 7), (3, 1), 2), ((2, 5, 6, 4), (3, 3, 3), 1), ((1, 20), (5,), 3)],
)
def test_submanifold_convolution_is_the_dense_one_at_the_sites(extent, kernel, dilation) -> None:
    sites = random_sites(extent, 50)
    features = torch.randn(len(sites), 3, dtype=torch.float64)
    weight = torch.randn(torch.Size(kernel).numel(), 3, 4, dtype=torch.float64)
    rulebook = submanifold_rulebook(sites, kernel, dilation)
    assert sum(rulebook.counts) == len(rulebook.inputs) == len(rulebook.outputs)
    pad = tuple((k // 2) * dilation for k in kernel)
    dense = CONV[len(kernel)](
        to_dense(features, sites), dense_weight(weight, kernel), padding=pad, dilation=dilation
    )
    expected = dense.movedim(1, -1)[tuple(sites.coords.t())]
    torch.testing.assert_close(convolve(features, weight, rulebook), expected)


@pytest.mark.parametrize(
    ("extent", "kernel", "stride", "padding", "dilation"),
    [
        ((2, 9, 7), (3, 3), 2, 1, 1),
        ((2, 9, 7), (2, 2), 2, 0, 1),
        ((2, 9, 7), (3, 2), (1, 3), (0, 2), 2),
        ((2, 6, 5, 7), (3, 3, 3), 2, 1, 1),
        ((1, 20), (4,), 3, 2, 2),
        ((2, 9, 7), (1, 1), 3, 0, 1),
    ],
)
def test_strided_convolution_is_the_dense_one(extent, kernel, stride, padding, dilation) -> None:
    sites = random_sites(extent, 30)
    features = torch.randn(len(sites), 3, dtype=torch.float64)
    weight = torch.randn(torch.Size(kernel).numel(), 3, 4, dtype=torch.float64)
    rulebook = strided_rulebook(sites, kernel, stride, padding, dilation)
    dense = CONV[len(kernel)](
        to_dense(features, sites), dense_weight(weight, kernel), None, stride, padding, dilation
    )
    out = rulebook.output_sites
    assert out.extent == (extent[0], *dense.shape[2:])
    torch.testing.assert_close(to_dense(convolve(features, weight, rulebook), out), dense)
    # The output sites are exactly the cells that a convolution of ones can reach.
    ones = CONV[len(kernel)](
        to_dense(torch.ones(len(sites), 1), sites), torch.ones(1, 1, *kernel), None, stride, padding, dilation
    )
    assert torch.equal(to_dense(torch.ones(len(out), 1), out) > 0, ones > 0)
    assert torch.equal(out.keys, out.keys.sort().values)


def test_inverse_rulebook_is_the_transposed_convolution() -> None:
    sites = random_sites((2, 9, 7), 30)
    rulebook = strided_rulebook(sites, 3, 2, 1)
    features = torch.randn(len(rulebook.output_sites), 4, dtype=torch.float64)
    weight = torch.randn(9, 4, 3, dtype=torch.float64)
    dense = F.conv_transpose2d(
        to_dense(features, rulebook.output_sites),
        dense_weight(weight, (3, 3)).transpose(0, 1),
        stride=2,
        padding=1,
    )
    expected = dense.movedim(1, -1)[tuple(sites.coords.t())]
    torch.testing.assert_close(convolve(features, weight, rulebook.inverse()), expected)


def test_gradients() -> None:
    sites = random_sites((1, 4, 4), 6)
    features = torch.randn(len(sites), 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    for rulebook in (submanifold_rulebook(sites, 3), strided_rulebook(sites, 3, 2, 1)):
        assert torch.autograd.gradcheck(lambda f, w, book=rulebook: convolve(f, w, book), (features, weight))


@pytest.mark.parametrize("threads", [1, 2])
def test_any_order_of_the_sites_gives_the_same_result(threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    sites = random_sites((2, 12, 12), 120)
    features, weight = torch.randn(len(sites), 4), torch.randn(9, 4, 5)
    order = torch.randperm(len(sites))
    moved = SiteSet(sites.coords[order], sites.extent)
    a, b = (
        convolve(features, weight, submanifold_rulebook(sites, 3)),
        convolve(features[order], weight, submanifold_rulebook(moved, 3)),
    )
    torch.testing.assert_close(a[order], b)
    first, second = strided_rulebook(sites, 3, 2, 1), strided_rulebook(moved, 3, 2, 1)
    assert (
        torch.equal(first.output_sites.coords, second.output_sites.coords) and first.counts == second.counts
    )
    assert torch.equal(first.outputs, second.outputs) and torch.equal(first.inputs, order[second.inputs])
    torch.testing.assert_close(convolve(features, weight, first), convolve(features[order], weight, second))
    torch.set_num_threads(before)


def test_zero_sites() -> None:
    sites = SiteSet(torch.zeros(0, 3, dtype=torch.long), (2, 5, 5))
    assert len(unique_sites(sites.coords, sites.extent).sites) == 0
    assert sites.lookup(torch.tensor([[0, 1, 1]])).tolist() == [-1]
    assert neighbour_table(sites, 3).shape == (0, 9) and windows(sites, (2, 2)).count == 0
    weight = torch.randn(9, 3, 4)
    assert convolve(torch.zeros(0, 3), weight, submanifold_rulebook(sites, 3)).shape == (0, 4)
    strided = strided_rulebook(sites, 3, 2, 1)
    assert len(strided.output_sites) == 0 and convolve(torch.zeros(0, 3), weight, strided).shape == (0, 4)
    assert len(sites.intersection(sites)[0]) == 0 and scatter_rows(
        torch.zeros(0, 2), torch.zeros(0).long(), 3
    ).shape == (3, 2)
    assert Padding(torch.zeros(0).long(), 0).pad(torch.zeros(0, 2)).shape == (0, 0, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: neighbour_table(s, 2), r"kernel of \[2, 2\] has no middle; use odd sizes"),
        (lambda s: neighbour_table(s, (3, 3, 3)), r"kernel is \[3, 3, 3\]; expected 2 integers"),
        (lambda s: neighbour_table(s, 3, 0), r"dilation is \[0, 0\]; expected 2 integers, 1 or more"),
        (lambda s: strided_rulebook(s, 3, 0), "stride is"),
        (lambda s: strided_rulebook(s, 3, 1, -1), "padding is"),
        (lambda s: strided_rulebook(s, 9), "larger than the padded grid"),
        (
            lambda s: convolve(torch.ones(2, 3), torch.ones(9, 3, 4), submanifold_rulebook(s, 3)),
            "2 rows of features",
        ),
        (
            lambda s: convolve(torch.ones(len(s), 3), torch.ones(3, 3, 4), submanifold_rulebook(s, 3)),
            "3 offsets for a",
        ),
    ],
)
def test_rulebooks_refuse(call, message) -> None:
    with pytest.raises(OpError, match=message):
        call(random_sites((2, 6, 6), 10))


def test_a_hundred_thousand_voxels() -> None:
    """Sorting, not dictionaries: a large cloud takes a moment even on a busy machine."""
    start = time.process_time()
    sites = unique_sites(random_points((1, 468, 468, 32), 100_000), (1, 468, 468, 32)).sites
    rulebook = submanifold_rulebook(sites, 3)
    assert sum(rulebook.counts) >= len(sites) and windows(sites, (12, 12, 32)).count == 39 * 39
    assert time.process_time() - start < 20
