"""Boxes of a grid, in which attention over sites works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from ..errors import OpError
from .coordinates import pack_keys


class Windows(NamedTuple):
    """Where sites lie in windows.

    Attributes:
        number: row-major number of each site's window over all samples; windows without sites count, too.
        local: coordinates of each site within its window, without the sample.
    """

    number: Int64[Tensor, " sites"]
    local: Int64[Tensor, "sites dims"]


def windows(
    coords: Int64[Tensor, "sites one_plus_dims"],
    extent: Sequence[int],
    size: Sequence[int],
    shift: Sequence[int] | None = None,
) -> Windows:
    """Cut the grid of each sample into windows.

    Args:
        coords: (sample, *place) of each site.
        extent: number of samples, and cells of the grid in each dimension.
        size: cells of a window in each dimension.
        shift: how far the windows are moved towards the origin, 0 <= shift <= size; by default not at all.

    Raises:
        OpError: sizes or shifts that do not fit the grid's dimensions, or a site outside of the grid.
    """
    shift = tuple(shift) if shift is not None else (0,) * len(size)
    fits = len(size) == len(shift) == len(extent) - 1
    if not fits or not all(s > 0 and 0 <= t <= s for s, t in zip(size, shift, strict=True)):
        raise OpError(
            f"windows of {list(size)} shifted by {list(shift)} on a grid of extent {list(extent)}: give "
            f"{len(extent) - 1} positive sizes, and shifts from 0 to the size"
        )
    moved = coords[:, 1:] + coords.new_tensor(shift)
    side = moved.new_tensor(size)
    box = moved.div(side, rounding_mode="floor")
    counts = [-(-(n + by) // length) for n, by, length in zip(extent[1:], shift, size, strict=True)]
    number = pack_keys(torch.cat([coords[:, :1], box], 1), (extent[0], *counts))
    return Windows(number, moved - box * side)
