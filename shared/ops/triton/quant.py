"""`quant_sparse_linear` in Triton: a program per row goes through the kept four-bit groups of the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from shared.ops.quant_sparse_linear import QuantGroups

__all__ = ["quant_sparse_linear"]

_MOST_BATCH = 8


@triton.jit
def _kernel(
    x, codes, scales, zeros, columns, pointer, out, batch, rows, cols,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """out[b, r] = sum over kept groups g and their inputs j of scale[g] * (q[g, j] - zero[g]) * x[b, j]."""
    r = tl.program_id(0)
    b = tl.program_id(1) * B + tl.arange(0, B)
    j = tl.arange(0, WIDTH)  # a group and, where it is no power of two, some lanes beyond it
    last = tl.load(pointer + r + 1)
    acc = tl.zeros((B,), dtype=tl.float32)
    for start in range(tl.load(pointer + r), last, G):
        g = start + tl.arange(0, G)
        inside = (g < last)[:, None] & (j < GROUP)[None, :]
        byte = tl.load(codes + g[:, None] * (GROUP // 2) + (j // 2)[None, :], mask=inside, other=0)
        q = ((byte.to(tl.int32) >> ((j % 2) * 4)[None, :]) & 15).to(tl.float32)
        zero = tl.load(zeros + g, mask=g < last, other=0).to(tl.float32)
        scale = tl.load(scales + g, mask=g < last, other=0).to(tl.float32)
        w = (q - zero[:, None]) * scale[:, None]
        column = tl.load(columns + g, mask=g < last, other=0).to(tl.int32)[:, None] * GROUP + j[None, :]
        known = (b < batch)[:, None, None] & inside[None, :, :]
        xs = tl.load(x + b[:, None, None] * cols + column[None, :, :], mask=known, other=0).to(tl.float32)
        acc += tl.sum(tl.sum(tl.where(inside[None, :, :], xs * w[None, :, :], 0.0), axis=2), axis=1)
    tl.store(out + b * rows + r, acc, mask=b < batch)


def quant_sparse_linear(
    x: Float[Tensor, "*batch in"], weight: QuantGroups, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """See `shared.ops.quant_sparse_linear.quant_sparse_linear`, which has checked the arguments."""
    rows, cols = weight.shape
    flat = x.reshape(-1, cols).contiguous()
    batch = flat.shape[0]
    out = x.new_empty(batch, rows, dtype=torch.float32)
    block = min(_MOST_BATCH, triton.next_power_of_2(batch))
    width = triton.next_power_of_2(weight.group)
    _kernel[(rows, triton.cdiv(batch, block))](
        flat, weight.codes, weight.scales, weight.zeros, weight.columns, weight.pointer, out, batch, rows,
        cols, GROUP=weight.group, WIDTH=width, B=block, G=max(1, 512 // (width * block)),
    )
    y = out if bias is None else out + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], rows)
