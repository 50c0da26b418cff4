"""Windows and rotated sets (DSVT, section 3.2): a deterministic partition in integers.

A window with n voxels is cut into S = ceil(n / tau) sets; slot t of set j takes the voxel of rank
floor((j tau + t) n / (S tau)) in the window's order. Since n > (S - 1) tau, the distinct voxels of set j are
the ranks floor(j n / S) up to floor((j + 1) n / S) - 1, and the remaining slots repeat a voxel. A set is
thus a run of the sorted voxels: nothing needs to be padded until a kernel asks for it, and then only the
repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.shared.sites import windows


class Bucket(NamedTuple):
    """Sets that are attended together: how many, slots in each, and which slots are used (None: all)."""

    sets: int
    length: int
    used: Bool[Tensor, "sets length"] | None


@dataclass(frozen=True, eq=False)
class Layout:
    """The slots of all sets, bucket after bucket.

    Attributes:
        rows: the voxel in each slot; unused slots repeat one of their set.
        place: the slot of each voxel.
        buckets: how `rows` is cut.
    """

    rows: Int64[Tensor, " slots"]
    place: Int64[Tensor, " voxels"]
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, eq=False)
class Sets:
    """Voxels cut into sets.

    Attributes:
        order: voxels sorted by window and, within, along an axis.
        start: set s holds order[start[s]] up to order[start[s + 1] - 1].
        tau: most voxels in a set.
    """

    order: Int64[Tensor, " voxels"]
    start: Int64[Tensor, " sets_plus_1"]
    tau: int

    def ragged(self) -> Layout:
        """Sets of equal length together: no slot is wasted, for processors, where padding is the cost."""
        lengths = self.start.diff()
        by_length = lengths.argsort(stable=True)
        size = lengths[by_length]
        first = size.cumsum(0) - size
        slot = torch.arange(len(self.order), device=self.order.device)
        rows = self.order[slot + (self.start[:-1][by_length] - first).repeat_interleave(size)]
        place = torch.empty_like(rows).index_copy_(0, rows, slot)
        found, count = torch.unique_consecutive(size, return_counts=True)
        pairs = zip(count.tolist(), found.tolist(), strict=True)
        return Layout(rows, place, tuple(Bucket(sets, length, None) for sets, length in pairs))

    def padded(self) -> Layout:
        """All sets with tau slots, for devices on which a kernel's start costs more than padding."""
        sets = len(self.start) - 1
        slot = torch.arange(self.tau, device=self.order.device)
        at = self.start[:-1, None] + slot
        used = at < self.start[1:, None]
        rows = self.order[torch.where(used, at, self.start[:-1, None])].flatten()
        voxel = torch.arange(len(self.order), device=self.order.device)
        of_set = torch.searchsorted(self.start, voxel, right=True) - 1
        slots = of_set * self.tau + voxel - self.start[of_set]
        place = torch.empty_like(self.order).index_copy_(0, self.order, slots)
        return Layout(rows, place, (Bucket(sets, self.tau, used),))


@dataclass(frozen=True, eq=False)
class Partition:
    """One way of cutting space into windows, and the two set lists within.

    Attributes:
        local: (x, y, z) of each voxel within its window.
        sets: the set list sorted along y (index 0) and that sorted along x (index 1).
    """

    local: Int64[Tensor, "voxels 3"]
    sets: tuple[Sets, Sets]


def partition(
    coords: Int64[Tensor, "voxels 4"],
    size: Sequence[int],
    batch_size: int,
    window: Sequence[int],
    shift: Sequence[int],
    tau: int,
) -> Partition:
    """Windows and both set lists of the voxels of a batch.

    Args:
        coords: (batch, z, y, x) of each voxel; distinct.
        size: voxels of the grid along x, y, z.
        batch_size: number of frames.
        window: voxels of a window along x, y, z.
        shift: by how many voxels windows are moved towards the origin, 0 <= shift <= window.
        tau: most voxels in a set.

    Raises:
        ConfigError: windows, shifts or tau that make no partition.
        DataError: voxels outside of the grid or there twice.
    """
    sides = zip(window, shift, strict=True)
    if len(window) != 3 or tau < 1 or not all(w > 0 and 0 <= s <= w for w, s in sides):
        raise ConfigError(
            f"windows {list(window)} shifted by {list(shift)} with sets of {tau}: give three positive sides, "
            "shifts from 0 to the side, and sets of at least one voxel"
        )
    _check_inside(coords, size, batch_size)
    number, local = windows(coords, (batch_size, *size[::-1]), window[::-1], shift[::-1])
    local = local.flip(1)  # here x comes first
    (wx, wy, wz), volume = window, math.prod(window)
    x, y, z = local.unbind(1)
    keys, order_y = (number * volume + (y * wx + x) * wz + z).sort()
    twice = (keys[1:] == keys[:-1]).nonzero()
    if len(twice):
        cell = coords[order_y[twice[0, 0]]].tolist()
        raise DataError(
            f"voxel {cell} (batch, z, y, x) is there twice ({len(twice)} duplicates); merge equal voxels "
            "first, as voxelise does"
        )
    _, order_x = (number * volume + (x * wy + y) * wz + z).sort()
    _, n = torch.unique_consecutive(keys.div(volume, rounding_mode="floor"), return_counts=True)
    start = _set_starts(n, tau)
    return Partition(local, (Sets(order_y, start, tau), Sets(order_x, start, tau)))


def _set_starts(n: Tensor, tau: int) -> Tensor:
    """Where each set starts in the sorted voxels, for windows of n voxels, and where the last one ends."""
    sets = (n + tau - 1).div(tau, rounding_mode="floor")
    before_window = n.cumsum(0) - n
    index = torch.arange(int(sets.sum()), device=n.device)
    j = index - (sets.cumsum(0) - sets).repeat_interleave(sets, output_size=len(index))
    expand = [t.repeat_interleave(sets, output_size=len(index)) for t in (before_window, n, sets)]
    start = expand[0] + (j * expand[1]).div(expand[2], rounding_mode="floor")
    return torch.cat([start, n.sum()[None]])


def _check_inside(coords: Tensor, size: Sequence[int], batch_size: int) -> None:
    nx, ny, nz = size
    limits = coords.new_tensor([batch_size, nz, ny, nx])
    outside = ((coords < 0) | (coords >= limits)).any(1)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise DataError(
            f"voxel {coords[row].tolist()} (batch, z, y, x) lies outside of {batch_size} grids of {nx} x "
            f"{ny} x {nz} voxels (x, y, z): {int(outside.sum())} such; the grid and sparse_shape must agree"
        )
