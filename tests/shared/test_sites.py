"""Cells, keys and windows against loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.shared.errors import OpError
from zoo.shared.sites import pack_keys, quantize, unpack_keys, windows


def random_points(extent: tuple[int, ...], count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, side, (count,), generator=generator) for side in extent], 1)


# -- keys


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


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (torch.tensor([[0, 1], [0, 4]]), r"site 1 at \[0, 4\] lies outside"),
        (torch.tensor([[0, -1]]), "lies outside"),
        (torch.tensor([[0.0, 1.0]]), "coordinates are integers, received torch.float32"),
        (torch.tensor([[0.0, float("nan")]]), "coordinates are integers"),
        (torch.tensor([[True, False]]), "coordinates are integers"),
        (torch.tensor([0, 1]), "one row per site"),
        (torch.tensor([[0, 1, 2]]), "one column per dimension"),
    ],
)
def test_coordinates_refuse(coords, message) -> None:
    with pytest.raises(OpError, match=message):
        pack_keys(coords, (1, 4))


def test_grids_refuse() -> None:
    with pytest.raises(OpError, match="does not exist"):
        pack_keys(torch.zeros(0, 0, dtype=torch.long), ())
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


# -- windows


@pytest.mark.parametrize("shift", [None, (0, 0), (1, 2), (3, 4)])
def test_windows_against_a_loop(shift) -> None:
    sites = random_points((2, 7, 9), 60)
    found = windows(sites, (2, 7, 9), (3, 4), shift)
    sx, sy = shift or (0, 0)
    nx, ny = -(-(7 + sx) // 3), -(-(9 + sy) // 4)
    places = [(b, x + sx, y + sy) for b, x, y in sites.tolist()]
    assert found.number.tolist() == [(b * nx + x // 3) * ny + y // 4 for b, x, y in places]
    assert found.local.tolist() == [[x % 3, y % 4] for _, x, y in places]


@pytest.mark.parametrize(
    ("size", "shift"), [((3,), None), ((3, 0), None), ((3, 3), (4, 0)), ((3, 3), (-1, 0)), ((3, 3), (1,))]
)
def test_windows_refuse(size, shift) -> None:
    with pytest.raises(OpError, match="positive sizes, and shifts"):
        windows(random_points((2, 7, 9), 5), (2, 7, 9), size, shift)
