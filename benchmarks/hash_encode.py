"""zoo::hash_encode, forward and backward, against torch: nerfstudio's formula and the definition."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from zoo.shared import ops
from zoo.shared.bench import Bound, Cell, Goal, main
from zoo.shared.ops.hash_encode import HashGrid, hash_encode


def torch_formula(points: Tensor, table: Tensor, grid: HashGrid) -> Tensor:
    """Every level hashed into a table of its own, all levels at once, as nerfstudio 1.1 does it."""
    size, sides = 1 << grid.log2_size, torch.tensor(grid.resolutions)
    scaled = points[:, None] * sides[:, None]
    low = scaled.detach().floor()
    share = scaled - low
    corners = torch.stack([low, low + 1], -1).long()  # [n, levels, 3, 2]
    primes = torch.tensor([1, 2654435761, 805459861])
    first = torch.arange(grid.levels) * size
    total = points.new_zeros(len(points), grid.levels, grid.features)
    for corner in range(8):
        bits = (corner & 1, corner >> 1 & 1, corner >> 2)
        hashed = [corners[:, :, axis, bits[axis]] * primes[axis] for axis in range(3)]
        index = (hashed[0] ^ hashed[1] ^ hashed[2]) % size + first
        sides_of = [share[..., axis] if bits[axis] else 1 - share[..., axis] for axis in range(3)]
        total = total + (sides_of[0] * sides_of[1] * sides_of[2])[..., None] * table[index]
    return total.flatten(1)


def both_ways(
    encode: Callable[[Tensor, Tensor], Tensor], points: Tensor, table: Tensor, with_points: bool
) -> Callable[[], object]:
    """Features, and gradients for the table and, if wanted, the points."""
    leaves = [points.clone().requires_grad_(with_points), table.clone().requires_grad_()]
    flow = torch.ones(len(points), encode(points[:1], table).shape[1])
    wanted = leaves if with_points else leaves[1:]
    return lambda: torch.autograd.grad(encode(*leaves), wanted, flow)


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    generator = torch.Generator().manual_seed(0)
    for count, levels, log2_size, goal in ((8192, 8, 12, 30.0), (65536, 16, 19, 10.0)):
        if quick and count > 10000:
            continue
        grid = HashGrid(levels, 2, log2_size, 16, 16 << (levels // 2))
        points = torch.rand(count, 3, generator=generator)
        table = torch.randn(grid.entries, 2, generator=generator)
        full = torch.randn(levels << log2_size, 2, generator=generator)
        # Eight entries a point and level are read, and those of the gradient are read and written.
        touched = min(count * levels * 8, grid.entries) * 8
        for with_points in (False, True):

            def ours(p: Tensor, t: Tensor, grid: HashGrid = grid) -> Tensor:
                with ops.backend("native"):
                    return hash_encode(p, t, grid)

            def peer(p: Tensor, t: Tensor, grid: HashGrid = grid) -> Tensor:
                return torch_formula(p, t, grid)

            labels = {"points": count, "levels": levels, "entries": f"2^{log2_size}"}
            bytes_ = 3 * touched + grid.entries * 8 + 2 * count * (levels * 8 + 12)
            yield Cell(
                labels | {"gradients": "table and points" if with_points else "table"},
                both_ways(ours, points, table, with_points),
                {"torch": both_ways(peer, points, full, with_points)},
                Bound(bytes_, count * levels * (8 * 10 + (8 * 14 if with_points else 32))),
                Goal(goal),
            )


if __name__ == "__main__":
    sys.exit(main("hash grids against torch", cells))
