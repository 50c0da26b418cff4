"""Masks of sharded parameters (DTensor, as FSDP2 makes them): each process holds its part of the zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """The memory that this process holds: of a DTensor its part, otherwise the tensor itself."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return part


def local_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The part of a whole mask that belongs to `local_part(like)`, on its device.

    Args:
        mask: of the whole shape, the same in every process.
        like: a parameter, a gradient or state of an optimiser.
    """
    if not is_sharded(like):
        return mask.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(
        mask.to(sharded.to_local().device), sharded.device_mesh, sharded.placements, src_data_rank=None
    ).to_local()


def any_part(flag: bool, like: Tensor) -> bool:
    """Whether a flag is true in any of the processes that hold parts of `like`; all of them must ask."""
    if not is_sharded(like):
        return flag
    sharded: Any = like
    found = torch.tensor(int(flag), device=sharded.to_local().device)
    for dim in range(sharded.device_mesh.ndim):
        group = sharded.device_mesh.get_group(dim)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
    return bool(found)
