"""`sparse_linear` in Triton through the column of each kept weight: work grows with the kept weights only.

One warp goes through the kept weights of a row, panel by panel, and gathers their x from the cache. Bitmask
weights come with their columns written out (two more bytes per kept weight).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import PANEL

__all__ = ["multiply"]

_MOST_BATCH = 8


@triton.jit
def _kernel(
    x,
    values,
    columns,
    pointer,
    bias,
    out,
    rows,
    cols,
    PANEL: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
    BIASED: tl.constexpr,
):
    """out[b, r] = bias[r] + sum over the kept weights of row r of their value times x[column, b]."""
    r = tl.program_id(0)
    b = tl.arange(0, B)
    acc = tl.zeros((P, B), dtype=tl.float32)
    for panel in range(0, tl.cdiv(cols, PANEL)):
        begin, end = tl.load(pointer + panel * rows + r), tl.load(pointer + panel * rows + r + 1)
        # From a multiple of eight and up to one, for loads of sixteen bytes; storage is padded behind.
        for start in range(begin // 8 * 8, end, P):
            at = start + tl.arange(0, P)
            stored = at < (end + 7) // 8 * 8
            inside = (at >= begin) & (at < end)
            value = tl.load(values + at, mask=stored, other=0).to(tl.float32)
            column = tl.load(columns + at, mask=stored, other=0).to(tl.int32) + panel * PANEL
            if B == 1:
                xs = tl.load(x + column, mask=inside, other=0).to(tl.float32)[:, None]
            else:
                to = x + column[:, None] * B + b[None, :]
                xs = tl.load(to, mask=inside[:, None], other=0).to(tl.float32)
            acc += tl.where(inside, value, 0.0)[:, None] * xs
    y = tl.sum(acc, axis=0)
    if BIASED:
        y += tl.load(bias + r).to(tl.float32)
    tl.store(out + b * rows + r, y)


def multiply(
    flat: Tensor, values: Tensor, index: Tensor, pointer: Tensor, rows: int, bias: Tensor | None
) -> Tensor:
    """x W^T + bias for x [batch, in] and a weight in the csr layout of `zoo.shared.ops.layout`."""
    batch, cols = flat.shape
    out = flat.new_empty(triton.cdiv(batch, _MOST_BATCH) * _MOST_BATCH, rows)
    for start in range(0, batch, _MOST_BATCH):
        xs = flat[start : start + _MOST_BATCH]
        size = triton.next_power_of_2(xs.shape[0])
        xs = torch.nn.functional.pad(xs, (0, 0, 0, size - xs.shape[0])).t().contiguous()
        _kernel[(rows,)](
            xs,
            values,
            index,
            pointer,
            flat if bias is None else bias,
            out[start:],
            rows,
            cols,
            PANEL=PANEL,
            P=512 if size == 1 else 128,
            B=size,
            BIASED=bias is not None,
            num_warps=1,
        )
    return out[:batch]
