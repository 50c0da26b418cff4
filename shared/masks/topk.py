"""Exact selection of the k largest in linear time, with ties decided by position."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Num
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


def rowwise_mask(
    score: Float[Tensor, "out in"], kept: int, before: Bool[Tensor, "out in"] | None = None
) -> Bool[Tensor, "out in"]:
    """Keep the best of each row, `kept` entries in all: every row the same number, but for a remainder, whose
    entries go to the rows with the best next score. Ties go to the lower index.

    Args:
        score: of each entry.
        kept: entries in all.
        before: what an earlier mask kept; nothing else is. Rows that have fewer entries left than their share
            keep all of them, and the others share the rest.

    Raises:
        PatternError: a count that the matrix cannot keep, or scores that are NaN.
    """
    rows, columns = score.shape
    left = rows * columns if before is None else int(before.count_nonzero())
    if not 0 <= kept <= left:
        raise PatternError(f"a matrix {rows}x{columns} keeps 0 to {left} entries; received {kept}")
    if bool(score.isnan().any()):
        raise PatternError(f"{int(score.isnan().sum())} of {score.numel()} scores are NaN")
    if before is None:
        available = torch.full((rows,), columns, device=score.device)
    else:
        score, available = score.masked_fill(~before, -torch.inf), before.sum(1)
    level = 0 if before is not None else kept // max(1, rows)
    while level < columns and int(available.clamp(max=level + 1).sum()) <= kept:
        level += 1
    counts, order = available.clamp(max=level), score.argsort(dim=1, descending=True, stable=True)
    if extra := kept - int(counts.sum()):
        places = order.gather(1, counts.clamp(max=columns - 1).unsqueeze(1))
        following = score.gather(1, places).squeeze(1).masked_fill(available <= level, -torch.inf)
        counts = counts + topk_mask(following, extra)
    ranked = torch.arange(columns, device=score.device) < counts.unsqueeze(1)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, ranked)
