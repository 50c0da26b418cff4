"""Rulebooks: which input site meets which output site at which offset of a kernel.

A rulebook depends only on the sites and on the kernel's geometry, so one is made per site set and geometry
and kept while the tensor of sites lives as it is; the layers of a network share it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from ..errors import OpError
from . import _native
from .cache import Derived
from .sparse_tensor import check_sites, site_keys, sites_of_keys

# Pairs per (tile, offset) to aim at: eight groups of six rows read each panel of weights, and the sums of a
# tile stay in the second-level cache (benchmarks/subm_conv.py).
_PAIRS = 48
_TILES = (64, 4096)


class Pairs(NamedTuple):
    """Pairs (source site, target site), grouped by tile of targets and, within, by offset of the kernel.

    Segment (tile, offset) is start[tile * offsets + offset] ... start[tile * offsets + offset + 1].
    """

    source: Int32[Tensor, " pairs"]
    target: Int32[Tensor, " pairs"]
    start: Int64[Tensor, " segments_plus_1"]
    sources: int
    targets: int
    tile: int


@dataclass(frozen=True)
class Geometry:
    """A kernel: input position = output position * stride - padding + offset * dilation, per dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def offsets(self) -> int:
        return math.prod(self.kernel)

    @property
    def most_reached(self) -> int:
        """The most output sites that one input site can reach."""
        # Offsets reach an output of the same remainder by the stride; those repeat every stride / gcd.
        return math.prod(
            -(-k // (s // math.gcd(s, d)))
            for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True)
        )

    def out_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Extents of the output grid, as those of a dense convolution."""
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                shape, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def numbers(self) -> Tensor:
        return torch.tensor([*self.kernel, *self.stride, *self.padding, *self.dilation], dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Rulebook:
    """The pairs of a convolution, for its forward pass and for the gradient of its input.

    Attributes:
        forward: from input sites to output sites.
        backward: from output sites to input sites. Those of a submanifold convolution are its forward pairs
            with the offsets counted backwards (`flipped`).
        indices, spatial_shape: the output sites.
    """

    forward: Pairs
    backward: Pairs
    flipped: bool
    indices: Int32[Tensor, "outputs one_plus_dims"]
    spatial_shape: tuple[int, ...]
    geometry: Geometry


# Forward pairs, backward pairs and the output sites that were found; not those that the caller gave, with
# which the entry is to go.
_made = Derived[tuple[Pairs, Pairs, Any]](capacity=256)


def geometry(dims: int, kernel: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Geometry:
    """A kernel's geometry from integers or one integer per dimension.

    Raises:
        OpError: a wrong number of integers, or one below 1 (padding: below 0).
    """
    values = []
    for name, value, least in (
        ("kernel size", kernel, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        each = (value,) * dims if isinstance(value, int) else tuple(value)
        if len(each) != dims or min(each) < least:
            raise OpError(f"{name} must be {dims} integers >= {least} (or one for all). Received: {value}.")
        values.append(each)
    return Geometry(*values)


def submanifold_rulebook(
    indices: Tensor, spatial_shape: Sequence[int], batch_size: int, kernel: Any, dilation: Any = 1
) -> Rulebook:
    """The rulebook of a submanifold convolution: the outputs are the input sites, a kernel centred on each.

    Raises:
        OpError: bad sites (see `check_sites`) or an even kernel size.
    """
    shape = tuple(map(int, spatial_shape))
    shaped = geometry(len(shape), kernel, dilation=dilation)
    if not all(k % 2 for k in shaped.kernel):
        raise OpError(f"a submanifold convolution needs odd kernel sizes. Received: {shaped.kernel}.")

    def build() -> tuple[Pairs, Pairs, Any]:
        check_sites(indices, shape, batch_size)
        pairs = _pairs(_submanifold_neighbours(indices, shape, batch_size, shaped), indices.shape[0])
        return pairs, pairs, None

    there, back, _ = _made.get((indices,), build, ("submanifold", shape, batch_size, shaped))
    return Rulebook(there, back, True, indices, shape, shaped)


def conv_rulebook(
    indices: Tensor,
    spatial_shape: Sequence[int],
    batch_size: int,
    kernel: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> Rulebook:
    """The rulebook of a sparse convolution: the outputs are all sites that some input reaches, row-major.

    Raises:
        OpError: bad sites (see `check_sites`) or geometry.
    """
    shape = tuple(map(int, spatial_shape))
    shaped = geometry(len(shape), kernel, stride, padding, dilation)
    out_shape = shaped.out_shape(shape)
    if min(out_shape) < 1:
        raise OpError(f"the kernel {shaped.kernel} does not fit into a grid of extents {shape}")

    def build() -> tuple[Pairs, Pairs, Any]:
        check_sites(indices, shape, batch_size)
        check_sites(indices[:0], out_shape, batch_size)
        keys, forward, backward = _conv_neighbours(indices, batch_size, out_shape, shaped)
        sites = sites_of_keys(keys, out_shape)
        return _pairs(forward, indices.shape[0]), _pairs(backward, sites.shape[0]), sites

    there, back, sites = _made.get((indices,), build, ("conv", shape, batch_size, shaped))
    return Rulebook(there, back, False, sites, out_shape, shaped)


def conv_rulebook_onto(
    indices: Tensor,
    spatial_shape: Sequence[int],
    batch_size: int,
    onto: Tensor,
    kernel: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> Rulebook:
    """The rulebook of a convolution whose output sites are given; what goes elsewhere is not computed.

    Args:
        onto: the output sites, on the grid that the dense convolution's output has.

    Raises:
        OpError: bad sites (see `check_sites`) or geometry.
    """
    shape = tuple(map(int, spatial_shape))
    shaped = geometry(len(shape), kernel, stride, padding, dilation)
    out_shape = shaped.out_shape(shape)

    def build() -> tuple[Pairs, Pairs, Any]:
        check_sites(indices, shape, batch_size)
        check_sites(onto, out_shape, batch_size)
        keys = site_keys(onto, out_shape)
        if _is_native(indices):
            forward, backward = _native_neighbours(indices, keys, batch_size, out_shape, shaped)
        else:
            forward, backward = _neighbours_onto(indices, keys, out_shape, shaped)
        return _pairs(forward, indices.shape[0]), _pairs(backward, onto.shape[0]), None

    there, back, _ = _made.get((indices, onto), build, ("onto", shape, batch_size, shaped))
    return Rulebook(there, back, False, onto, out_shape, shaped)


def _is_native(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and _native.available()


def _submanifold_neighbours(indices: Tensor, shape: tuple[int, ...], batch: int, shaped: Geometry) -> Tensor:
    """[sites, offsets] int32: the row of the site at each offset, -1 where there is none."""
    sites = indices.shape[0]
    if _is_native(indices):
        table = indices.new_empty(sites, shaped.offsets)
        extents, numbers = torch.tensor(shape, dtype=torch.int64), shaped.numbers()
        place = indices.contiguous()
        _native.function("zoo_submanifold_neighbours", "piiippip")(
            place.data_ptr(),
            sites,
            len(shape),
            batch,
            extents.data_ptr(),
            numbers.data_ptr(),
            _native.threads(),
            table.data_ptr(),
        )
        return table
    keys, rows = site_keys(indices, shape).sort()
    limits = torch.tensor(shape, device=indices.device)
    columns = []
    for offset in _offsets(shaped, indices.device):
        centre = torch.tensor(shaped.kernel, device=indices.device) // 2
        moved = indices[:, 1:] + (offset - centre) * torch.tensor(shaped.dilation, device=indices.device)
        inside = ((moved >= 0) & (moved < limits)).all(1)
        columns.append(_rows_of(torch.cat([indices[:, :1], moved], 1), inside, shape, keys, rows))
    return torch.stack(columns, 1)


def _offsets(shaped: Geometry, device: torch.device) -> Tensor:
    """All offsets of a kernel, row-major: [offsets, dims]."""
    axes = [torch.arange(size, device=device) for size in shaped.kernel]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def _rows_of(sites: Tensor, valid: Tensor, shape: Sequence[int], keys: Tensor, rows: Tensor) -> Tensor:
    """For each site its row among those with the sorted `keys`, -1 where there is none or it is not valid."""
    if keys.numel() == 0:
        return torch.full_like(valid, -1, dtype=torch.int32)
    wanted = torch.where(valid, site_keys(sites, shape), -1)
    at = torch.searchsorted(keys, wanted).clamp(max=keys.numel() - 1)
    return torch.where(valid & (keys[at] == wanted), rows[at], -1).int()


def _conv_neighbours(
    indices: Tensor, batch: int, out_shape: tuple[int, ...], shaped: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of the output sites, input at [output, offset] and output at [input, offset] (-1: none)."""
    sites, dims = indices.shape[0], len(out_shape)
    if _is_native(indices):
        keys = torch.empty(sites * shaped.most_reached, dtype=torch.int64)
        count = torch.zeros(1, dtype=torch.int64)
        extents, numbers = torch.tensor(out_shape, dtype=torch.int64), shaped.numbers()
        place = indices.contiguous()
        _native.function("zoo_conv_sites", "piiipppp")(
            place.data_ptr(),
            sites,
            dims,
            batch,
            extents.data_ptr(),
            numbers.data_ptr(),
            keys.data_ptr(),
            count.data_ptr(),
        )
        keys = keys[: int(count)].clone()
        return keys, *_native_neighbours(indices, keys, batch, out_shape, shaped)
    reached = [_reached(indices, offset, out_shape, shaped) for offset in _offsets(shaped, indices.device)]
    keys = torch.cat([site_keys(out, out_shape)[valid] for out, valid in reached]).unique()
    return keys, *_neighbours_onto(indices, keys, out_shape, shaped)


def _native_neighbours(
    indices: Tensor, keys: Tensor, batch: int, out_shape: tuple[int, ...], shaped: Geometry
) -> tuple[Tensor, Tensor]:
    """Input at [output, offset] and output at [input, offset] (-1: none) for outputs of these keys."""
    sites, outputs = indices.shape[0], keys.numel()
    forward = indices.new_empty(outputs, shaped.offsets)
    backward = indices.new_empty(sites, shaped.offsets)
    extents, numbers = torch.tensor(out_shape, dtype=torch.int64), shaped.numbers()
    place = indices.contiguous()
    _native.function("zoo_conv_neighbours", "pipiiippipp")(
        place.data_ptr(),
        sites,
        keys.data_ptr(),
        outputs,
        len(out_shape),
        batch,
        extents.data_ptr(),
        numbers.data_ptr(),
        _native.threads(),
        forward.data_ptr(),
        backward.data_ptr(),
    )
    return forward, backward


def _neighbours_onto(
    indices: Tensor, keys: Tensor, out_shape: tuple[int, ...], shaped: Geometry
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    ordered, rows = keys.sort()
    reached = (_reached(indices, offset, out_shape, shaped) for offset in _offsets(shaped, indices.device))
    backward = torch.stack([_rows_of(out, valid, out_shape, ordered, rows) for out, valid in reached], 1)
    forward = indices.new_full((keys.numel(), shaped.offsets), -1)
    row, offset = (backward >= 0).nonzero(as_tuple=True)
    forward[backward[row, offset].long(), offset] = row.int()
    return forward, backward


def _reached(
    indices: Tensor, offset: Tensor, out_shape: tuple[int, ...], shaped: Geometry
) -> tuple[Tensor, Tensor]:
    """The output site that each input reaches by one offset, and whether there is one."""
    stride, padding, dilation, limits = (
        torch.tensor(each, device=indices.device)
        for each in (shaped.stride, shaped.padding, shaped.dilation, out_shape)
    )
    position = indices[:, 1:] + padding - offset * dilation
    place = position.div(stride, rounding_mode="floor")
    valid = ((position >= 0) & (position % stride == 0) & (place < limits)).all(1)
    return torch.cat([indices[:, :1], place], 1), valid


def _found(neighbours: Tensor) -> int:
    """How many entries of a neighbour table are not -1."""
    if not _is_native(neighbours):
        return int((neighbours >= 0).sum())
    total = torch.zeros(1, dtype=torch.int64)
    _native.function("zoo_pairs_total", "piip")(
        neighbours.data_ptr(), neighbours.numel(), _native.threads(), total.data_ptr()
    )
    return int(total)


def _pairs(neighbours: Tensor, sources: int) -> Pairs:
    """Pair lists of a neighbour table [targets, offsets]."""
    targets, offsets = neighbours.shape
    found = _found(neighbours)
    tile = min(max(_PAIRS * targets * offsets // max(found, 1), _TILES[0]), _TILES[1])
    tile = max(min(tile, targets // 8), _TILES[0])  # enough tiles to share among threads
    tiles = -(-targets // tile)
    if _is_native(neighbours):
        start = torch.zeros(tiles * offsets + 1, dtype=torch.int64)
        _native.function("zoo_pairs_count", "piiiip")(
            neighbours.data_ptr(), targets, offsets, tile, _native.threads(), start[1:].data_ptr()
        )
        start.cumsum_(0)
        source, target = neighbours.new_empty(found), neighbours.new_empty(found)
        _native.function("zoo_pairs_fill", "piiipipp")(
            neighbours.data_ptr(),
            targets,
            offsets,
            tile,
            start.data_ptr(),
            _native.threads(),
            source.data_ptr(),
            target.data_ptr(),
        )
        return Pairs(source, target, start, sources, targets, tile)
    row, offset = (neighbours >= 0).nonzero(as_tuple=True)
    segment = row // tile * offsets + offset
    order = segment.argsort(stable=True)
    start = torch.zeros(tiles * offsets + 1, dtype=torch.int64, device=neighbours.device)
    start[1:] = torch.bincount(segment, minlength=tiles * offsets).cumsum(0)
    row, offset = row[order], offset[order]
    return Pairs(neighbours[row, offset], row.int(), start, sources, targets, tile)
