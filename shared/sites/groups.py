"""Rows that belong together: gather, scatter, ranks, padding, windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from ..errors import OpError
from .coordinates import SiteSet


def _check_index(index: Tensor, size: int, least: int = 0) -> None:
    if index.numel() and not (least <= int(index.min()) and int(index.max()) < size):
        raise OpError(
            f"indices from {int(index.min())} to {int(index.max())} where {least} to {size - 1} "
            "are allowed; check what they index"
        )


def gather_rows(
    values: Shaped[Tensor, rows * features], index: Int64[Tensor, " out"]
) -> Shaped[Tensor, out * features]:
    """`values[index]`, with rows of zeros where the index is -1 (no such site).

    Raises:
        OpError: an index out of range.
    """
    _check_index(index, len(values), least=-1)
    missing = index < 0
    if not len(values):
        return values.new_zeros(len(index), *values.shape[1:])
    found = values[index.clamp(min=0)]
    return found.masked_fill(missing.view(-1, *[1] * (values.dim() - 1)), 0)


def scatter_rows(
    values: Shaped[Tensor, rows * features],
    index: Int64[Tensor, " rows"],
    size: int,
    reduce: Literal["sum", "mean", "max"] = "sum",
) -> Shaped[Tensor, size * features]:
    """Reduce the rows of each group; differentiable. Groups without rows are zero.

    Args:
        values: rows to be reduced.
        index: the group of each row, 0 <= index < size.
        size: number of groups.
        reduce: "sum", "mean" or "max".

    Raises:
        OpError: an index out of range, or an unknown reduction.
    """
    if reduce not in ("sum", "mean", "max"):
        raise OpError(f"unknown reduction {reduce!r}; use sum, mean or max")
    _check_index(index, size)
    out = values.new_zeros(size, *values.shape[1:])
    if reduce == "max":
        spread = index.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
        return out.scatter_reduce(0, spread, values, "amax", include_self=False)
    total = out.index_add(0, index, values)
    if reduce == "sum":
        return total
    counts = torch.bincount(index, minlength=size).clamp(min=1)
    return total / counts.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)


def rank_in_group(group: Int64[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
    """For each row the number of earlier rows of the same group."""
    ordered, rows = torch.sort(group, stable=True)
    place = torch.arange(len(group), device=group.device)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(starts, place, 0).cummax(0).values if len(group) else place
    return torch.empty_like(group).index_copy(0, rows, place - first)


class Padding:
    """Rows of groups of different sizes, and the same rows as one padded block (groups, length, ...).

    Args:
        group: the group of each row, 0 <= group < groups.
        groups: number of groups.
        length: rows per group in the block, by default those of the largest group.

    Raises:
        OpError: a group out of range, or one with more than `length` rows.
    """

    def __init__(self, group: Int64[Tensor, " rows"], groups: int, length: int | None = None) -> None:
        _check_index(group, groups)
        sizes = torch.bincount(group, minlength=groups)
        largest = int(sizes.max()) if groups else 0
        if length is not None and length < largest:
            raise OpError(f"a group has {largest} rows, the padded length is {length}; raise it")
        self.sizes: Tensor = sizes
        self.groups = groups
        self.length = largest if length is None else length
        self._place = group * self.length + rank_in_group(group)

    @property
    def valid(self) -> Bool[Tensor, "groups length"]:
        """Which places of the block hold a row."""
        return torch.arange(self.length, device=self.sizes.device) < self.sizes[:, None]

    def pad(self, values: Shaped[Tensor, rows * features], fill: float | int = 0) -> Tensor:
        """The rows as a block (groups, length, *features), in their order, `fill` in the places left over.

        Raises:
            OpError: not as many rows as the groups have.
        """
        if len(values) != len(self._place):
            raise OpError(f"{len(values)} rows for a padding of {len(self._place)}; pass one row per site")
        block = values.new_full((self.groups * self.length, *values.shape[1:]), fill)
        return block.index_copy(0, self._place, values).unflatten(0, (self.groups, self.length))

    def unpad(self, block: Shaped[Tensor, "groups length *features"]) -> Shaped[Tensor, rows * features]:
        """The rows of a block in their original order.

        Raises:
            OpError: a block of another size.
        """
        if tuple(block.shape[:2]) != (self.groups, self.length):
            raise OpError(f"a block of {list(block.shape[:2])}, expected {[self.groups, self.length]}")
        return block.flatten(0, 1)[self._place]


@dataclass(frozen=True, eq=False)
class Windows:
    """A set of sites cut into boxes of the grid.

    Attributes:
        group: for each site the number of its window; only windows with sites are numbered, in row-major
            order.
        count: number of windows.
        local: coordinates of each site within its window (the sample's column is left out).
    """

    group: Tensor
    count: int
    local: Tensor


def windows(sites: SiteSet, size: Sequence[int], shift: Sequence[int] | None = None) -> Windows:
    """Partition the sites of each sample into windows.

    Args:
        sites: sites whose first dimension is the sample.
        size: cells of a window in each spatial dimension.
        shift: how far the windows are moved towards the origin, 0 <= shift < size; by default not at all.

    Raises:
        OpError: sizes or shifts that do not fit the grid's dimensions.
    """
    shift = tuple(shift) if shift is not None else (0,) * len(size)
    fits = len(size) == len(shift) == len(sites.extent) - 1
    if not fits or not all(s > 0 and 0 <= t < s for s, t in zip(size, shift, strict=True)):
        raise OpError(
            f"windows of {list(size)} shifted by {list(shift)} on a grid of extent "
            f"{list(sites.extent)}: give {len(sites.extent) - 1} positive sizes and smaller shifts"
        )
    moved = sites.coords[:, 1:] + sites.coords.new_tensor(shift)
    side = moved.new_tensor(size)
    box = torch.cat([sites.coords[:, :1], moved.div(side, rounding_mode="floor")], 1)
    spatial = zip(sites.extent[1:], size, shift, strict=True)
    boxes = [sites.extent[0], *(-(-(side + by) // length) for side, length, by in spatial)]
    strides = moved.new_tensor([math.prod(boxes[axis + 1 :]) for axis in range(len(boxes))])
    keys, group = torch.unique((box * strides).sum(1), return_inverse=True)
    return Windows(group, len(keys), moved % side)
