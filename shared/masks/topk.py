"""Exact selection of the k largest in linear time, with ties decided by position."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Num
from torch import Tensor

from ..errors import PatternError

_HALF = (torch.float16, torch.bfloat16)


def kth_largest(flat: Num[Tensor, " n"], kept: int) -> Tensor:
    """The kept-th largest value of a vector, by selection (linear time), never by a full sort."""
    if flat.device.type != "cpu" or not flat.is_floating_point():
        return flat.kthvalue(flat.numel() - kept + 1).values
    # numpy selects in place on one copy, 20 times as fast as torch.kthvalue (1.3 ms for 0.74 M entries on one
    # core). Negated, as it is no faster itself where the smallest value repeats, as zeros do.
    values = (flat.float() if flat.dtype in _HALF else flat).neg().numpy()
    values.partition(kept - 1)
    return -torch.as_tensor(values[kept - 1]).to(flat.dtype)


def _end_of_first(flags: Tensor, wanted: int) -> int:
    """The length of the shortest prefix of `flags` that holds `wanted` True entries: bisection on counts,
    linear time."""
    low, high = 0, flags.numel()
    while high - low > 1:
        middle = (low + high) // 2
        found = int(flags[low:middle].count_nonzero())
        if found >= wanted:
            high = middle
        else:
            wanted -= found
            low = middle
    return high


def topk_mask(score: Num[Tensor, "*shape"], kept: int) -> Bool[Tensor, "*shape"]:
    """Marks exactly the `kept` largest scores; among equal scores the lower flat (row-major) index is kept.

    Args:
        score: any real tensor in any memory layout; infinities are allowed.
        kept: how many entries are True, 0 <= kept <= numel.

    Raises:
        PatternError: NaN among the scores, or a count out of range.
    """
    total = score.numel()
    if not 0 <= kept <= total:
        raise PatternError(f"cannot keep {kept} of {total} entries; the count must lie between 0 and {total}")
    flat = score.detach().reshape(-1)
    if flat.is_floating_point() and bool(flat.isnan().any()):
        bad = int(flat.isnan().sum())
        raise PatternError(f"{bad} of {total} scores are NaN; repair the weights or gradients they come from")
    if kept in (0, total):
        return torch.full(score.shape, kept > 0, dtype=torch.bool, device=score.device)
    if flat.dtype in _HALF:
        flat = flat.float()
    threshold = kth_largest(flat, kept).to(flat.device)
    mask = flat > threshold
    ties = flat == threshold
    if flat.device.type != "cpu":  # no question that would wait for the device
        mask |= ties & (ties.cumsum(0) <= kept - mask.count_nonzero())
        return mask.view(score.shape)
    missing = kept - int(mask.count_nonzero())
    end = _end_of_first(ties, missing)
    mask[:end] |= ties[:end]
    return mask.view(score.shape)
