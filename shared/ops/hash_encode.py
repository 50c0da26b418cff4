"""Multi-resolution hash grid: features of points by trilinear interpolation on several levels.

    grid = HashGrid(levels=16, log2_size=19, finest=1024)
    table = nn.Parameter(torch.empty(grid.entries, grid.features).uniform_(-1e-4, 1e-4))
    features = hash_encode(points, table, grid, saliency)         # [n, 16 * 2]

Coarse levels that fit are stored densely and without collisions, so that the number of parameters is honest.
Points whose saliency is exactly zero are neither looked up nor trained (HollowNeRF's hollow space).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch

_PRIMES = (1, 2654435761, 805459861)


@dataclass(frozen=True)
class HashGrid:
    """The shape of a hash grid (Mueller et al., "Instant Neural Graphics Primitives", 2022).

    Args:
        levels: number of resolutions, from `coarsest` to `finest` in equal ratios.
        features: per entry.
        log2_size: the logarithm of the most entries of a level; larger levels are hashed.
        coarsest, finest: cells on a side; resolutions between are rounded up.

    Raises:
        OpError: numbers out of range.
    """

    levels: int = 16
    features: int = 2
    log2_size: int = 19
    coarsest: int = 16
    finest: int = 1024

    def __post_init__(self) -> None:
        sizes = 1 <= self.levels <= 64 and 1 <= self.features <= 64 and 0 <= self.log2_size <= 28
        if not sizes or not 1 <= self.coarsest <= self.finest <= 1 << 20:
            raise OpError(
                "a hash grid has 1 to 64 levels and features, 2^0 to 2^28 entries a level and resolutions "
                f"1 <= coarsest <= finest <= 2^20. Received: {self}."
            )

    @functools.cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Cells on a side, by level."""
        steps = max(self.levels - 1, 1)
        ratio = self.finest / self.coarsest
        # A hair below, as 16 * 64^(15/15) is 1024.0000000000002 on some machines.
        return tuple(
            -int(-(self.coarsest * ratio ** (level / steps) - 1e-9) // 1) for level in range(self.levels)
        )

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """The first entry of each level, and the number of all: dense levels have (resolution + 1)^3."""
        most, found = 1 << self.log2_size, [0]
        for side in self.resolutions:
            found.append(found[-1] + min(most, (side + 1) ** 3))
        return tuple(found)

    @property
    def entries(self) -> int:
        """Entries of the table."""
        return self.offsets[-1]

    def dense(self, level: int) -> bool:
        """Whether a level has an entry of its own for each of its vertices."""
        return self.offsets[level + 1] - self.offsets[level] == (self.resolutions[level] + 1) ** 3

    def entry(self, level: int, vertex: Int[Tensor, "n 3"]) -> Int[Tensor, " n"]:
        """Which entries of the table belong to vertices (x, y, z) of a level."""
        side, size = self.resolutions[level], self.offsets[level + 1] - self.offsets[level]
        if self.dense(level):
            own = vertex[:, 0] + (side + 1) * (vertex[:, 1] + (side + 1) * vertex[:, 2])
        else:
            x, y, z = (vertex[:, axis] * _PRIMES[axis] & 0xFFFFFFFF for axis in range(3))
            own = (x ^ y ^ z) & (size - 1)
        return self.offsets[level] + own


def hash_encode(
    points: Float[Tensor, "n 3"],
    table: Float[Tensor, "entries features"],
    grid: HashGrid,
    saliency: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "n channels"]:
    """saliency * interpolated features of the points, a level after the other.

    Args:
        points: in the unit cube; those outside are moved to its border, where they have no gradient.
        table: all levels, see `HashGrid.offsets`.
        saliency: a factor per point; where it is exactly zero the point is skipped, and its saliency gets no
            gradient. None for ones.

    The kernel computes in fp32, with the same bits for any number of threads.

    Raises:
        OpError: shapes, dtypes or devices that do not fit; a point that is NaN (not seen while tracing).
    """
    _check(points, table, grid, saliency)
    dispatch.refuse_transforms("hash_encode")
    dispatch.refuse_tangents(points, table, saliency)
    return _run(points, table, grid, saliency, _plan(points, table, grid).backend)


def reference(
    points: Float[Tensor, "n 3"],
    table: Float[Tensor, "entries features"],
    grid: HashGrid,
    saliency: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "n channels"]:
    """The definition of `hash_encode` in plain PyTorch."""
    _check(points, table, grid, saliency)
    return _run(points, table, grid, saliency, "reference")


def _run(points: Tensor, table: Tensor, grid: HashGrid, saliency: Tensor | None, backend: str) -> Tensor:
    rows = None if saliency is None else saliency.detach().nonzero()[:, 0]
    if backend == "reference":
        kept = points if rows is None else points[rows]
        found = _interpolate(kept, table, grid)
        if rows is None or saliency is None:
            return found
        return found.new_zeros(len(points), found.shape[1]).index_copy(0, rows, found * saliency[rows, None])
    if rows is None:
        rows = _every(points.shape[0])
    shape = (grid.levels, grid.features, grid.log2_size, grid.coarsest, grid.finest)
    run = _Eager.apply if dispatch.eager() else _hash_encode
    out: Tensor = run(points.resolve_neg(), table.resolve_neg(), rows, *shape)
    return out if saliency is None else out * saliency[:, None]


def _every(count: int) -> Tensor:
    """The rows of all points; kept for a small batch, which takes little longer itself, and where nothing
    traces, which must see how they are made."""
    small = count <= 1 << 14 and dispatch.eager()
    return _kept_every(count) if small else torch.arange(count, device="cpu")


@functools.lru_cache(maxsize=4)
def _kept_every(count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(count, device="cpu")


def _interpolate(points: Tensor, table: Tensor, grid: HashGrid) -> Tensor:
    held, out = points.clamp(0, 1), []
    for level, side in enumerate(grid.resolutions):
        scaled = held * side
        cell = scaled.detach().floor().clamp_max(side - 1)
        upper, low = scaled - cell, cell.long()
        total = held.new_zeros(len(points), grid.features)
        for corner in range(8):
            bits = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2], device=points.device)
            weight = torch.where(bits == 1, upper, 1 - upper).prod(1, keepdim=True)
            total = total + weight * table[grid.entry(level, low + bits)]
        out.append(total)
    return torch.cat(out, 1)


def _check(points: Tensor, table: Tensor, grid: HashGrid, saliency: Tensor | None) -> None:
    wanted = (grid.entries, grid.features)
    if points.ndim != 2 or points.shape[1] != 3 or not points.is_floating_point():
        raise OpError(
            f"points must be [n, 3] and floating-point. Received: {tuple(points.shape)}, {points.dtype}."
        )
    if tuple(table.shape) != wanted or table.dtype != points.dtype or table.device != points.device:
        raise OpError(
            f"table must be {wanted} of {points.dtype} on {points.device} for {grid}. "
            f"Received: {tuple(table.shape)}, {table.dtype} on {table.device}."
        )
    if saliency is not None and (saliency.shape != points.shape[:1] or saliency.dtype != points.dtype):
        raise OpError(
            f"saliency must be ({len(points)},) of {points.dtype}. "
            f"Received: {tuple(saliency.shape)}, {saliency.dtype}."
        )
    if dispatch.eager() and bool((nan := points.detach().isnan()).any()):
        raise OpError(f"point {int(nan.nonzero()[0, 0])} is NaN, which is in no cell of the grid")


def _plan(points: Tensor, table: Tensor, grid: HashGrid) -> dispatch.Plan:
    offered = ["native"] if points.device.type == "cpu" and points.dtype is torch.float32 else []
    sizes = (float(len(points) + 1), float(grid.levels), float(grid.entries))
    kind = str(points.dtype).removeprefix("torch.")
    return dispatch.choose("hash_encode", points.device, (*offered, "reference"), kind, sizes)


def _explain(points: Tensor, table: Tensor, grid: HashGrid, saliency: Tensor | None = None) -> dispatch.Plan:
    return _plan(points, table, grid)


Integers = ctypes.Array[ctypes.c_int64]


@functools.lru_cache(maxsize=64)
def _shape_of(*numbers: int) -> tuple[Integers, Integers, int, int]:
    """Resolutions, offsets, levels and features of `HashGrid(*numbers)`, as the kernels take them."""
    grid = HashGrid(*numbers)
    resolutions = (ctypes.c_int64 * grid.levels)(*grid.resolutions)
    return resolutions, (ctypes.c_int64 * (grid.levels + 1))(*grid.offsets), grid.levels, grid.features


def _forward(
    points: Tensor,
    table: Tensor,
    rows: Tensor,
    levels: int,
    features: int,
    log2_size: int,
    coarsest: int,
    finest: int,
) -> Tensor:
    """Features [n, levels * features] of the points that `rows` names, zeros for the others."""
    shape = _shape_of(levels, features, log2_size, coarsest, finest)
    points, table = points.contiguous(), table.contiguous()
    count, kept = points.shape[0], rows.shape[0]
    out = (torch.empty if kept == count else torch.zeros)(count, levels * features)
    _native.function("zoo_hash_encode", "pppippiipi")(
        points.data_ptr(),
        table.data_ptr(),
        rows.data_ptr(),
        kept,
        *shape,
        out.data_ptr(),
        _native.threads(),
    )
    return out


_hash_encode = torch.library.custom_op(
    "zoo::hash_encode",
    _forward,
    mutates_args=(),
    schema="(Tensor points, Tensor table, Tensor rows, int levels, int features, int log2_size, "
    "int coarsest, int finest) -> Tensor",
)


@_hash_encode.register_fake
def _(points: Tensor, table: Tensor, rows: Tensor, levels: int, features: int, *rest: int) -> Tensor:
    return points.new_empty(points.shape[0], levels * features)


def _gradients(
    grad: Tensor,
    points: Tensor,
    table: Tensor,
    rows: Tensor,
    levels: int,
    features: int,
    log2_size: int,
    coarsest: int,
    finest: int,
    of_points: bool,
    of_table: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients for points and table, empty where they are not wanted."""
    shape = _shape_of(levels, features, log2_size, coarsest, finest)
    points, table, grad = points.contiguous(), table.contiguous(), grad.resolve_neg().contiguous()
    to_points = torch.zeros_like(points) if of_points else points.new_empty(0)
    to_table = torch.zeros_like(table) if of_table else table.new_empty(0)
    _native.function("zoo_hash_encode_backward", "pppippiipppi")(
        points.data_ptr(),
        table.data_ptr(),
        rows.data_ptr(),
        rows.shape[0],
        *shape,
        grad.data_ptr(),
        to_points.data_ptr() if of_points else 0,
        to_table.data_ptr() if of_table else 0,
        _native.threads(),
    )
    return to_points, to_table


_hash_encode_backward = torch.library.custom_op(
    "zoo::hash_encode_backward",
    _gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor points, Tensor table, Tensor rows, int levels, int features, int log2_size, "
    "int coarsest, int finest, bool of_points, bool of_table) -> (Tensor, Tensor)",
)


@_hash_encode_backward.register_fake
def _(grad: Tensor, points: Tensor, table: Tensor, rows: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    of_points, of_table = rest[-2:]
    return (
        points.new_empty(points.shape if of_points else 0),
        table.new_empty(table.shape if of_table else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.shape = inputs[3:]


def _back(ctx: Any, grad: Tensor, gradients: Any) -> tuple[Tensor | None, ...]:
    of_points, of_table = ctx.needs_input_grad[:2]
    found = gradients(grad, *ctx.saved_tensors, *ctx.shape, of_points, of_table)
    return found[0] if of_points else None, found[1] if of_table else None, *(None,) * 6


class _Eager(torch.autograd.Function):
    """`zoo::hash_encode` for eager calls on plain tensors."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, inputs[0])
        return _forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _back(ctx, grad, _gradients)


_hash_encode.register_autograd(lambda ctx, grad: _back(ctx, grad, _hash_encode_backward), setup_context=_save)


def _examples() -> Iterator[dispatch.Example]:
    grid = HashGrid(levels=3, features=2, log2_size=5, coarsest=2, finest=7)
    for count in (1, 6, 0):
        points, saliency = torch.rand(count, 3), torch.rand(count).sub(0.3).relu()
        for factor in (None, saliency):
            yield dispatch.Example(
                lambda table, points, factor=factor: hash_encode(points, table, grid, factor),
                (torch.randn(grid.entries, 2), points),
            )


dispatch.register("hash_encode", plan=_explain, examples=_examples)
