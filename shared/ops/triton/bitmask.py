"""`sparse_linear` of bitmask weights in Triton: loaded sparse, computed dense.

A block of rows goes through its panels a few columns at a time. The mask bits say which columns are kept and,
added up along the row, where their values lie; the tile spread in this way is multiplied like a dense one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from shared.ops.layout import PANEL
from shared.ops.weights import SparseWeight

__all__ = ["sparse_linear"]

_DOT_BATCH = 16  # the least that tl.dot takes


@triton.jit
def _kernel(
    x, values, bits, pointer, out, batch, rows, cols,
    PANEL: tl.constexpr, R: tl.constexpr, C: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out[b, r] = sum over c of x[b, c] * W[r, c] for a block of B x R."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    b = tl.program_id(1) * B + tl.arange(0, B)
    acc = tl.zeros((B, R), dtype=tl.float32)
    for panel in range(0, tl.cdiv(cols, PANEL)):
        segment = panel * rows + r
        at = tl.load(pointer + segment, mask=r < rows, other=0)
        for start in range(0, tl.minimum(PANEL, cols - panel * PANEL), C):
            c = start + tl.arange(0, C)
            column = panel * PANEL + c
            inside = (r < rows)[:, None] & (column < cols)[None, :]
            byte = tl.load(bits + segment[:, None] * (PANEL // 8) + (c // 8)[None, :], mask=inside, other=0)
            kept = (byte.to(tl.int32) >> (c % 8)[None, :]) & 1
            place = at[:, None] + tl.cumsum(kept, axis=1) - kept
            w = tl.load(values + place, mask=kept != 0, other=0).to(tl.float32)
            at += tl.sum(kept, axis=1)
            known = (b < batch)[:, None] & (column < cols)[None, :]
            xs = tl.load(x + b[:, None] * cols + column[None, :], mask=known, other=0).to(tl.float32)
            if DOT:
                acc += tl.dot(xs, tl.trans(w), input_precision="ieee")
            else:
                # A dropped weight does not meet its x, which may be infinite.
                acc += tl.sum(tl.where((kept != 0)[None, :, :], xs[:, None, :] * w[None, :, :], 0.0), axis=2)
    tl.store(out + b[:, None] * rows + r[None, :], acc, mask=(b < batch)[:, None] & (r < rows)[None, :])


def sparse_linear(
    x: Float[Tensor, "*batch in"], weight: SparseWeight, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """See `shared.ops.sparse_linear.sparse_linear`, which has checked the arguments; bitmask layout only."""
    rows, cols = weight.shape
    flat = x.reshape(-1, cols).contiguous()
    batch = flat.shape[0]
    out = x.new_empty(batch, rows, dtype=torch.float32)
    # Zero times infinity is not zero, so that a dense product must not meet one.
    dot = batch >= _DOT_BATCH and bool(torch.isfinite(flat).all())
    block = 16 if dot else min(4, triton.next_power_of_2(batch))
    high = 32 if dot else 16
    _kernel[(triton.cdiv(rows, high), triton.cdiv(batch, block))](
        flat, weight.values, weight.index, weight.pointer, out, batch, rows, cols,
        PANEL=PANEL, R=high, C=64, B=block, DOT=dot,
    )
    y = out if bias is None else out + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], rows)
