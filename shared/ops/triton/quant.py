"""`quant_sparse_linear` in Triton: a program per row goes through the kept four-bit groups of the row.

Sixteen codes are one 64-bit word, and their inputs lie side by side, so that both are read in few loads.
"""

# A tuple that grows in a kernel is unrolled by Triton.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..quant_sparse_linear import QuantGroups

__all__ = ["quant_sparse_linear"]

_MOST_BATCH = 8


@triton.jit
def _kernel(
    x,
    codes,
    scales,
    zeros,
    columns,
    pointer,
    bias,
    out,
    rows,
    cols,
    WORDS: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    BIASED: tl.constexpr,
):
    """out[b, r] = bias[r] + sum over kept groups g, inputs j of scale[g] (q[g, j] - zero[g]) x[b, j]."""
    r = tl.program_id(0)
    j = tl.arange(0, 16)
    last = tl.load(pointer + r + 1) * WORDS
    acc = ()
    for _ in tl.static_range(B):
        acc = acc + (tl.zeros((G, 16), dtype=tl.float32),)
    for start in range(tl.load(pointer + r) * WORDS, last, G):
        word = start + tl.arange(0, G)
        inside = word < last
        g = word // WORDS
        code = tl.load(codes + word, mask=inside, other=0)
        zero = tl.load(zeros + g, mask=inside, other=0).to(tl.float32)
        scale = tl.load(scales + g, mask=inside, other=0).to(tl.float32)
        column = (tl.load(columns + g, mask=inside, other=0).to(tl.int32) * WORDS + word % WORDS) * 16
        q = ((code[:, None] >> (4 * j)[None, :].to(tl.int64)) & 15).to(tl.int32).to(tl.float32)
        w = (q - zero[:, None]) * scale[:, None]
        added = ()
        for b in tl.static_range(B):
            at = x + b * cols + column[:, None] + j[None, :]
            xs = tl.load(at, mask=inside[:, None], other=0).to(tl.float32)
            added = added + (acc[b] + xs * w,)
        acc = added
    for b in tl.static_range(B):
        y = tl.sum(tl.sum(acc[b], axis=1), axis=0)
        if BIASED:
            y += tl.load(bias + r).to(tl.float32)
        tl.store(out + b * rows + r, y)


def quant_sparse_linear(
    x: Float[Tensor, "*batch in"], weight: QuantGroups, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """See `zoo.shared.ops.quant_sparse_linear.quant_sparse_linear`, which has checked the arguments."""
    rows, cols = weight.shape
    flat = x.reshape(-1, cols).contiguous()
    out = x.new_empty(flat.shape[0], rows)
    words = weight.codes.view(torch.int64)
    for xs, to in zip(flat.split(_MOST_BATCH), out.split(_MOST_BATCH), strict=True):
        _kernel[(rows,)](
            xs,
            words,
            weight.scales,
            weight.zeros,
            weight.columns,
            weight.pointer,
            xs if bias is None else bias,
            to,
            rows,
            cols,
            WORDS=weight.group // 16,
            B=xs.shape[0],
            G=32,
            BIASED=bias is not None,
            num_warps=1,
        )
    return out.reshape(*x.shape[:-1], rows)
