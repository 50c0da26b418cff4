"""hash_encode against its definition, interpolation by hand and the paper's parameter counts; refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.hash_encode import HashGrid, hash_encode, reference


def _built() -> bool:
    try:
        _native.function("zoo_hash_encode", "pppippiipi")
    except _native.NativeMissing:
        return False
    return True


needs_native = pytest.mark.skipif(not _built(), reason="no native library on this machine, or an older one")


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native)])
def backend(request):
    with ops.backend(request.param):
        yield request.param


def both(
    points: Tensor, table: Tensor, grid: HashGrid, saliency: Tensor | None, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """The features, and gradients for points, table and saliency, as float64."""
    leaves = [t.to(dtype).clone().requires_grad_() for t in (points, table, saliency) if t is not None]
    with ops.backend(backend):
        out = hash_encode(leaves[0], leaves[1], grid, *leaves[2:])
    flow = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = torch.autograd.grad(out, leaves, flow.to(dtype))
    return [t.detach().double() for t in (out, *grads)]


@needs_native
@given(
    st.integers(0, 70),
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(0, 10),
    st.integers(1, 9),
    st.sampled_from([None, "some", "none"]),
    st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_native_is_the_definition(count, levels, features, log2_size, coarsest, salient, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = HashGrid(levels, features, log2_size, coarsest, 4 * coarsest)
    # Some outside the cube; away from the borders of cells, where one side or the other is right.
    points = torch.rand(count, 3, generator=generator) * 1.4 - 0.2
    table = torch.randn(grid.entries, features, generator=generator)
    saliency = None
    if salient is not None:
        saliency = torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) > 0.5)
        saliency = saliency * 0 if salient == "none" else saliency
    expected = both(points, table, grid, saliency, torch.float64, "reference")
    found = both(points, table, grid, saliency, torch.float32, "native")
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


def test_interpolation_by_hand(backend: str) -> None:
    """On one cell, the entries of the corners in the order x, y, z, weighed by the opposite volumes."""
    grid = HashGrid(1, 1, 3, 1, 1)
    assert grid.entries == 8 and grid.dense(0)
    table = torch.arange(8.0)[:, None]
    points = torch.tensor([[0.25, 0.5, 0.75], [0.0, 0, 0], [1.0, 1, 1], [7.0, -3, 0.5]])
    # Entry = x + 2 y + 4 z, and that is what trilinear interpolation gives back.
    expected = torch.tensor([0.25 + 1 + 3, 0, 7, 1 + 0 + 2])
    torch.testing.assert_close(hash_encode(points, table, grid)[:, 0], expected)


def test_entries_of_hashed_levels_by_hand(backend: str) -> None:
    """At vertices, the entry is that of (x ^ y 2654435761 ^ z 805459861) mod 2^4."""
    grid = HashGrid(1, 1, 4, 8, 8)
    assert grid.entries == 16 and not grid.dense(0)
    table, vertices = torch.arange(16.0)[:, None], torch.tensor([[3, 0, 0], [1, 2, 3], [7, 5, 6]])
    expected = [(x ^ (y * 2654435761) ^ (z * 805459861)) % 16 for x, y, z in vertices.tolist()]
    assert hash_encode(vertices / 8, table, grid)[:, 0].tolist() == expected


def test_the_papers_parameter_counts() -> None:
    """HollowNeRF's arithmetic: tables of 2^19, 2^18, 2^17 with 9,344 weights and 64^3 cells of saliency."""
    counts = []
    for log2_size, cells in ((19, 0), (18, 64**3), (17, 64**3)):
        grid = HashGrid(16, 2, log2_size, 16, 1024)
        assert grid.resolutions[0] == 16 and grid.resolutions[-1] == 1024
        padded = sum(-(-(b - a) // 8) * 8 for a, b in zip(grid.offsets, grid.offsets[1:], strict=False))
        counts.append(round((2 * padded + 9344 + cells) / 1e6, 2))
    assert counts == [11.49, 6.48, 3.6]


def test_skipped_points_are_neither_read_nor_trained(backend: str) -> None:
    grid = HashGrid(2, 2, 6, 2, 4)
    table = torch.randn(grid.entries, 2).requires_grad_()
    points, saliency = torch.rand(10, 3), torch.zeros(10, requires_grad=True)
    with torch.no_grad():
        saliency[4] = 0.5
    out = hash_encode(points, table, grid, saliency)
    assert not out[torch.arange(10) != 4].any()
    torch.testing.assert_close(out[4], 0.5 * hash_encode(points[4:5], table, grid)[0])
    grad_table, grad_saliency = torch.autograd.grad(out.sum(), (table, saliency))
    only = torch.autograd.grad(0.5 * hash_encode(points[4:5], table, grid).sum(), table)[0]
    torch.testing.assert_close(grad_table, only)
    assert grad_saliency.nonzero()[:, 0].tolist() == [4]


def test_definition_by_finite_differences() -> None:
    grid = HashGrid(3, 2, 5, 2, 7)
    points = (
        torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.9
    ).requires_grad_()
    table = torch.randn(grid.entries, 2, dtype=torch.float64, requires_grad=True)
    saliency = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, t, s: reference(p, t, grid, s), (points, table, saliency))


@needs_native
def test_any_number_of_threads_gives_the_same_bits() -> None:
    grid = HashGrid(6, 2, 8, 4, 32)
    points, table = torch.rand(5000, 3), torch.randn(grid.entries, 2)
    saliency = torch.rand(5000) * (torch.rand(5000) > 0.3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(both(points, table, grid, saliency, torch.float32, "native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@needs_native
def test_the_dispatched_op_is_the_direct_call() -> None:
    grid = HashGrid(2, 2, 6, 2, 4)
    points, table, rows = torch.rand(9, 3), torch.randn(grid.entries, 2), torch.arange(9)
    leaves = [points.clone().requires_grad_(), table.clone().requires_grad_()]
    out = torch.ops.zoo.hash_encode(*leaves, rows, 2, 2, 6, 2, 4)
    flow = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float()
    found = (out, *torch.autograd.grad(out, leaves, flow))
    for one, other in zip(both(points, table, grid, None, torch.float32, "native"), found, strict=True):
        assert torch.equal(one, other.detach().double())
    torch.library.opcheck(
        torch.ops.zoo.hash_encode, (points, table, rows, 2, 2, 6, 2, 4), test_utils="test_faketensor"
    )


@pytest.mark.traced
def test_what_is_refused() -> None:
    grid = HashGrid(2, 2, 6, 2, 4)
    table = torch.zeros(grid.entries, 2)
    for arguments, match in (
        ((torch.zeros(3, 2), table, grid), "points must be"),
        ((torch.zeros(3, 3), table[1:], grid), "table must be"),
        ((torch.zeros(3, 3), table.double(), grid), "table must be"),
        ((torch.zeros(3, 3), table, grid, torch.ones(2)), "saliency must be"),
    ):
        with pytest.raises(OpError, match=match):
            hash_encode(*arguments)
    for numbers in ((0, 2, 6, 2, 4), (2, 2, 40, 2, 4), (2, 2, 6, 5, 4), (2, 0, 6, 2, 4)):
        with pytest.raises(OpError, match="a hash grid has"):
            HashGrid(*numbers)
