"""Integer coordinates on a grid: the cells of points, and row-major keys of cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..errors import OpError


def _check_extent(extent: Sequence[int]) -> tuple[int, ...]:
    if not extent or any(side < 0 for side in extent):
        raise OpError(f"a grid of extent {list(extent)} does not exist; give the size of each dimension")
    if math.prod(max(side, 1) for side in extent) >= 1 << 63:
        raise OpError(f"a grid of extent {list(extent)} has 2**63 cells or more; split it")
    return tuple(extent)


def _inside(coords: Tensor, extent: tuple[int, ...]) -> Tensor:
    return ((coords >= 0) & (coords < coords.new_tensor(extent))).all(1)


def _strides(extent: tuple[int, ...]) -> list[int]:
    return [math.prod(extent[axis + 1 :]) for axis in range(len(extent))]


def _pack(coords: Tensor, extent: tuple[int, ...]) -> Tensor:
    return (coords * coords.new_tensor(_strides(extent))).sum(1)


def _checked(coords: Tensor, extent: tuple[int, ...]) -> Tensor:
    """Coordinates as int64, known to lie on the grid."""
    if coords.dim() != 2 or coords.shape[1] != len(extent):
        raise OpError(
            f"coordinates of shape {list(coords.shape)} do not fit a grid of extent "
            f"{list(extent)}; give one row per site and one column per dimension"
        )
    if coords.dtype.is_floating_point or coords.dtype.is_complex or coords.dtype == torch.bool:
        raise OpError(f"coordinates are integers, received {coords.dtype}; see quantize for points")
    coords = coords.long()
    inside = _inside(coords, extent)
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise OpError(
            f"site {row} at {coords[row].tolist()} lies outside of the grid of extent "
            f"{list(extent)} ({int((~inside).sum())} such sites); drop it or enlarge the grid"
        )
    return coords


def pack_keys(coords: Tensor, extent: Sequence[int]) -> Int64[Tensor, " sites"]:
    """The row-major number of each cell; keys sort like the coordinates' rows.

    Args:
        coords: integers, (sites, dims), 0 <= coords[:, d] < extent[d].
        extent: size of the grid, in each dimension.

    Raises:
        OpError: coordinates out of range or not integers, or a grid with 2**63 cells or more.
    """
    checked = _check_extent(extent)
    return _pack(_checked(coords, checked), checked)


def unpack_keys(keys: Int64[Tensor, " sites"], extent: Sequence[int]) -> Int64[Tensor, "sites dims"]:
    """The coordinates of cells: the inverse of `pack_keys`.

    Raises:
        OpError: a key outside of the grid.
    """
    checked = _check_extent(extent)
    cells = math.prod(checked)
    if keys.numel() and not (int(keys.min()) >= 0 and int(keys.max()) < cells):
        raise OpError(
            f"keys from {int(keys.min())} to {int(keys.max())} for a grid of {cells} cells; "
            "unpack with the extent they were packed with"
        )
    columns = [
        keys.div(stride, rounding_mode="floor") % max(side, 1)
        for stride, side in zip((max(s, 1) for s in _strides(checked)), checked, strict=True)
    ]
    return torch.stack(columns, 1)


def quantize(
    points: Float[Tensor, "points dims"],
    lower: Sequence[float | int],
    cell: Sequence[float | int],
    extent: Sequence[int],
) -> tuple[Int64[Tensor, "points dims"], Bool[Tensor, " points"]]:
    """The cell of each point, floor((point - lower) / cell), and whether it lies on the grid.

    Args:
        points: positions.
        lower: corner of the grid, in the unit of the points.
        cell: size of a cell, positive.
        extent: number of cells in each dimension.

    Raises:
        OpError: NaN or infinite points, cells without size, or lengths that do not match.
    """
    checked = _check_extent(extent)
    if not len(lower) == len(cell) == len(checked) == points.shape[1] or not all(size > 0 for size in cell):
        raise OpError(
            f"lower {list(lower)}, cell {list(cell)} and extent {list(extent)} must have "
            f"{points.shape[1]} entries, and cells a positive size"
        )
    finite = points.isfinite().all(1)
    if not bool(finite.all()):
        raise OpError(
            f"{int((~finite).sum())} of {len(points)} points are NaN or infinite, the first in row "
            f"{int((~finite).nonzero()[0])}; remove them"
        )
    # In float64, so that a float32 point on the edge of a cell falls to the same side everywhere.
    offset = points.double() - torch.tensor(lower, dtype=torch.float64, device=points.device)
    place = torch.floor(offset / torch.tensor(cell, dtype=torch.float64, device=points.device))
    coords = place.clamp(-1, max(checked)).long()
    return coords, _inside(coords, checked)
