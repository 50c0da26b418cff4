"""Points to voxels without a cap on points per voxel, and the features of a voxel from its points.

Everything is put into one canonical order - voxels row-major, the points of a voxel by their values - so that
neither the order of the points nor the number of threads changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.shared.sites import pack_keys, quantize, unpack_keys

NORM: dict[str, Any] = {"eps": 1e-3, "momentum": 0.01}  # of every batch norm of the reference
_MIX = (-7046029254386353131, -4417276706812531889)  # odd 64-bit constants of a multiplicative hash


@dataclass(frozen=True)
class Grid:
    """A box of space cut into voxels.

    Attributes:
        lower, upper: corners (x, y, z) in metres.
        voxel: sides of a voxel (x, y, z) in metres. A voxel as high as the box is a pillar.

    Raises:
        ConfigError: the range is empty or not a whole number of voxels.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    voxel: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.lower) == len(self.upper) == len(self.voxel) == 3 or min(self.voxel) <= 0:
            raise ConfigError(
                f"a grid needs three lower and three upper bounds and positive voxel sides; received "
                f"{self.lower}, {self.upper}, {self.voxel}"
            )
        for axis, low, high, side in zip("xyz", self.lower, self.upper, self.voxel, strict=True):
            cells = (high - low) / side
            if cells < 0.5 or abs(cells - round(cells)) > 1e-4 * max(1.0, cells):
                raise ConfigError(
                    f"the range {low:g} to {high:g} m along {axis} holds {cells:.6g} voxels of {side:g} m; "
                    "choose bounds that are a whole number of voxels apart"
                )

    @classmethod
    def of(cls, point_cloud_range: Sequence[float | int], voxel_size: Sequence[float | int]) -> Grid:
        """From OpenPCDet's POINT_CLOUD_RANGE (x0, y0, z0, x1, y1, z1) and VOXEL_SIZE."""
        bounds = tuple(float(v) for v in point_cloud_range)
        return cls(bounds[:3], bounds[3:], tuple(float(v) for v in voxel_size))

    @property
    def size(self) -> tuple[int, int, int]:
        """Number of voxels along x, y and z."""
        nx, ny, nz = (
            round((high - low) / side)
            for low, high, side in zip(self.lower, self.upper, self.voxel, strict=True)
        )
        return nx, ny, nz


@dataclass(frozen=True, eq=False)
class Voxels:
    """The occupied voxels of a batch of frames, with their points.

    Attributes:
        coords: (batch, z, y, x) of each voxel, distinct, in row-major order.
        points: features of the points that lie on the grid (x, y, z, ...), sorted by voxel.
        voxel_of: the voxel of each point.
        counts: points in each voxel.
        batch_size: number of frames, empty ones included.
    """

    coords: Int64[Tensor, "voxels 4"]
    points: Float[Tensor, "points features"]
    voxel_of: Int64[Tensor, " points"]
    counts: Int64[Tensor, " voxels"]
    batch_size: int


def voxelise(points: Float[Tensor, "all one_plus_features"], grid: Grid, batch_size: int) -> Voxels:
    """Group the points of a batch by voxel; points outside of the grid are dropped.

    Args:
        points: rows (batch index, x, y, z, ...).
        grid: the voxels.
        batch_size: number of frames; it cannot be told from the points if the last frame is empty.

    Raises:
        DataError: NaN or infinite values, batch indices out of range, or no point on the grid.
    """
    if points.shape[1] < 4:
        raise DataError(f"points are rows of (frame, x, y, z, ...); received {points.shape[1]} columns")
    bad = ~points.isfinite().all(1)
    if bool(bad.any()):
        raise DataError(
            f"{int(bad.sum())} of {len(points)} points are NaN or infinite, the first in row "
            f"{int(bad.nonzero()[0])}; remove them, e.g. points[points.isfinite().all(1)]"
        )
    frame = points[:, 0].long()
    if len(frame) and not (int(frame.min()) >= 0 and int(frame.max()) < batch_size):
        raise DataError(
            f"points name frames {int(frame.min())} to {int(frame.max())} of a batch of {batch_size}; "
            "pass the number of frames as batch_size"
        )
    nx, ny, nz = grid.size
    cell, inside = quantize(points[:, 1:4].contiguous(), grid.lower, grid.voxel, (nx, ny, nz))
    kept = inside.nonzero().squeeze(1)
    if not len(kept):
        raise DataError(
            f"none of {len(points)} points lies between {grid.lower} and {grid.upper}; check the frame's "
            "axes and unit, or choose another range"
        )
    extent = (batch_size, nz, ny, nx)
    keys = pack_keys(torch.cat([frame[:, None], cell.flip(1)], 1)[kept], extent)
    values = points[kept, 1:]
    by_value = _fingerprint(values).argsort(stable=True)
    keys, order = keys[by_value].sort(stable=True)
    present, voxel_of, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    return Voxels(unpack_keys(present, extent), values[by_value[order]], voxel_of, counts, batch_size)


def _fingerprint(values: Tensor) -> Tensor:
    """A number of each row that depends on its bits alone."""
    mixed = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    for column in (values.float() + 0.0).contiguous().view(torch.int32).long().unbind(1):  # -0 becomes 0
        mixed = (mixed ^ column) * _MIX[0]
        mixed = (mixed ^ (mixed >> 29)) * _MIX[1]
    return mixed


class _SegmentMax(torch.autograd.Function):
    """Row maxima of segments; the gradient is shared evenly by equal maxima.

    torch's own scatter_reduce gathers element by element in the backward pass, which takes five times as
    long.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, segment: Tensor, count: int) -> Tensor:
        index = segment[:, None].expand_as(values)
        top = values.new_zeros(count, values.shape[1])
        top = top.scatter_reduce(0, index, values, "amax", include_self=False)
        ctx.save_for_backward(values, segment, top)
        return top

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        values, segment, top = ctx.saved_tensors
        reached = (values == top[segment]).to(values.dtype)
        ties = torch.zeros_like(top).index_add_(0, segment, reached)
        return (grads[0] / ties)[segment] * reached, None, None


def segment_max(
    values: Float[Tensor, "rows features"], segment: Int64[Tensor, " rows"], count: int
) -> Float[Tensor, "count features"]:
    """The largest value per segment and feature; every segment must have a row."""
    top: Tensor = _SegmentMax.apply(values, segment, count)
    return top


class PointLayer(nn.Module):
    """Linear, batch norm, ReLU, and the maximum over each voxel; but for the last layer each point keeps its
    own features beside the maximum."""

    def __init__(self, inputs: int, outputs: int, last: bool) -> None:
        super().__init__()
        self.last = last
        width = outputs if last else outputs // 2
        self.linear = nn.Linear(inputs, width, bias=False)
        self.norm = nn.BatchNorm1d(width, **NORM)

    def forward(self, points: Tensor, voxels: Voxels) -> Tensor:
        values = torch.relu(self.norm(self.linear(points)))
        top = segment_max(values, voxels.voxel_of, len(voxels.coords))
        return top if self.last else torch.cat([values, top[voxels.voxel_of]], 1)


class VoxelEncoder(nn.Module):
    """Dynamic voxel features (DynPillarVFE and DynPillarVFE3D of OpenPCDet).

    A point is its raw features, its offset to the mean of its voxel and that to the voxel's centre; then
    `PointLayer`s. In a grid of pillars the z offset is that to the middle of the range.

    Args:
        features: raw features of a point, 4 for (x, y, z, intensity).
        widths: outputs of the layers; the last is the voxels' width.
        grid: the voxels.
    """

    def __init__(self, features: int, widths: Sequence[int], grid: Grid) -> None:
        super().__init__()
        self.grid, self.features = grid, features
        inputs = [features + 6, *widths[:-1]]
        self.pfn_layers = nn.ModuleList(
            PointLayer(before, after, index == len(widths) - 1)
            for index, (before, after) in enumerate(zip(inputs, widths, strict=True))
        )

    def forward(self, voxels: Voxels) -> Float[Tensor, "voxels width"]:
        """Raises:
        DataError: points with another number of features.
        """
        points = voxels.points
        if points.shape[1] != self.features:
            raise DataError(
                f"points have {points.shape[1]} features, this network was made for {self.features} (x, y, z "
                "first)"
            )
        place, count = points[:, :3], voxels.counts.to(points.dtype)
        total = place.new_zeros(len(count), 3).index_add(0, voxels.voxel_of, place)
        mean = total / count[:, None]
        side, lower = place.new_tensor(self.grid.voxel), place.new_tensor(self.grid.lower)
        centre = (voxels.coords[:, [3, 2, 1]].to(points.dtype) + 0.5) * side + lower
        values = torch.cat([points, place - mean[voxels.voxel_of], place - centre[voxels.voxel_of]], 1)
        for layer in self.pfn_layers:
            values = layer(values, voxels)
        return values


def occupancy(voxels: Voxels, grid: Grid) -> float:
    """Share of the grid's voxels that hold a point."""
    return len(voxels.coords) / (voxels.batch_size * math.prod(grid.size))
