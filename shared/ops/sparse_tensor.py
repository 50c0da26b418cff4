"""Features at the active sites of a grid: the tensor that sparse convolutions take and return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from ..errors import OpError
from . import _native

DIMENSIONS = (1, 2, 3)


@dataclass(frozen=True, eq=False)
class SparseConvTensor:
    """Features of the active sites of a batch of grids, with the fields of spconv's class of the same name.

    The convolutions also accept spconv's own object (anything with these four attributes) and then return one
    of its type.

    Attributes:
        features: one row per site.
        indices: (batch, [z, [y,]] x) of each site, int32; distinct, in any order.
        spatial_shape: extents of the grid, in the order of the coordinates.
        batch_size: number of grids.
    """

    features: Float[Tensor, "sites channels"]
    indices: Int32[Tensor, "sites one_plus_dims"]
    spatial_shape: tuple[int, ...] | list[int]
    batch_size: int

    def replace_feature(self, features: Float[Tensor, "sites other_channels"]) -> SparseConvTensor:
        """The same sites with other features."""
        return replace(self, features=features)

    def dense(self, channels_first: bool = True) -> Float[Tensor, "batch ..."]:
        """The dense grid, zero where there is no site."""
        shape = (self.batch_size, *self.spatial_shape, self.features.shape[1])
        index = tuple(self.indices.long().unbind(1))
        grid = self.features.new_zeros(shape).index_put(index, self.features)
        return grid.movedim(-1, 1).contiguous() if channels_first else grid

    @classmethod
    def from_dense(cls, grid: Float[Tensor, "batch channels ..."]) -> SparseConvTensor:
        """The sites at which any channel is not zero."""
        last = grid.movedim(1, -1)
        indices = (last != 0).any(-1).nonzero()
        features = last[tuple(indices.unbind(1))]
        return cls(features, indices.int().contiguous(), tuple(grid.shape[2:]), grid.shape[0])


def like(x: Any, features: Tensor, indices: Tensor, spatial_shape: Sequence[int]) -> Any:
    """A tensor of x's kind on other sites."""
    if isinstance(x, SparseConvTensor):
        return SparseConvTensor(features, indices, tuple(spatial_shape), x.batch_size)
    return type(x)(features, indices, list(spatial_shape), x.batch_size)


def check_sites(indices: Tensor, spatial_shape: Sequence[int], batch_size: int) -> None:
    """Refuse coordinates that are no set of sites of the grid.

    Raises:
        OpError: dtype, shape, a site outside of the grid, a site that is there twice, or too large a grid.
    """
    dims = len(spatial_shape)
    if indices.dtype != torch.int32:
        raise OpError(f"site indices must be int32. Received: {indices.dtype} (use indices.int()).")
    if dims not in DIMENSIONS or indices.ndim != 2 or indices.shape[1] != 1 + dims:
        raise OpError(
            f"site indices must be [sites, 1 + {dims}] for a grid {tuple(spatial_shape)}, which has 1 to 3 "
            f"dimensions. Received: {tuple(indices.shape)}."
        )
    if min((batch_size, *spatial_shape)) < 0 or batch_size * math.prod(spatial_shape) >= 2**62:
        raise OpError(f"{batch_size} grids of extents {tuple(spatial_shape)} cannot be numbered")
    problem, row, other = _find_problem(indices, spatial_shape, batch_size)
    if problem == 1:
        raise OpError(
            f"site {row} lies at {indices[row].tolist()}, "
            f"outside of {batch_size} grids of {tuple(spatial_shape)}"
        )
    if problem == 2:
        raise OpError(f"sites {row} and {other} are both at {indices[row].tolist()}: sites must be distinct")


def _find_problem(indices: Tensor, shape: Sequence[int], batch: int) -> tuple[int, int, int]:
    if indices.device.type == "cpu" and _native.available():
        result = torch.zeros(3, dtype=torch.int64)
        extents = torch.tensor(tuple(shape), dtype=torch.int64)
        place = indices.contiguous()
        _native.function("zoo_sites_check", "piiipp")(
            place.data_ptr(),
            indices.shape[0],
            len(shape),
            batch,
            extents.data_ptr(),
            result.data_ptr(),
        )
        problem, row, other = result.tolist()
        return problem, row, other
    limits = torch.tensor((batch, *shape), device=indices.device)
    outside = ((indices < 0) | (indices >= limits)).any(1)
    if bool(outside.any()):
        return 1, int(outside.int().argmax()), 0
    keys, order = site_keys(indices, shape).sort(stable=True)
    equal = (keys[1:] == keys[:-1]).nonzero()
    if equal.numel():
        second = order[1:][equal[:, 0]]
        at = int(second.argmin())
        return 2, int(order[int(equal[at])]), int(second[at])
    return 0, 0, 0


def site_keys(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Row-major number of each site's cell over the whole batch, int64."""
    keys = indices[:, 0].long()
    for dim, extent in enumerate(shape):
        keys = keys * extent + indices[:, dim + 1]
    return keys


def sites_of_keys(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `site_keys`, int32."""
    columns = []
    for extent in reversed(tuple(shape)):
        columns.append(keys % extent)
        keys = keys // extent
    return torch.stack([keys, *reversed(columns)], 1).int()
