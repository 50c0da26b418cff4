"""`sparse_linear` of bitmask weights in Triton: loaded sparse, computed dense.

A byte of the mask is spread to eight nibbles; one multiplication turns them into the rank of each column
among the kept ones of the byte, and a running sum over bytes says where the byte's values begin. The tile
spread in this way is multiplied like a dense one: by a batch of a few rows on the ordinary units, by a larger
one on the tensor cores.
"""

# A tuple that grows in a kernel is unrolled by Triton.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..layout import PANEL

__all__ = ["MOST_PLAIN_BATCH", "multiply", "multiply_wide"]

MOST_PLAIN_BATCH = 8


@triton.jit
def _ranks(byte):
    """How many columns of a byte are kept before each of the eight, in nibbles; and how many in all."""
    spread = byte.to(tl.uint32)
    spread = (spread | (spread << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    upto = spread * 0x11111111
    return upto << 4, (upto >> 28).to(tl.int32)


@triton.jit
def _kernel(
    x,
    values,
    bits,
    pointer,
    bias,
    out,
    rows,
    cols,
    PANEL: tl.constexpr,
    S: tl.constexpr,
    B: tl.constexpr,
    BIASED: tl.constexpr,
):
    """out[b, r] = bias[r] + sum over c of x[b, c] * W[r, c], S bytes of the mask at a time."""
    r = tl.program_id(0)
    i = tl.arange(0, 8)
    acc = ()
    for _ in tl.static_range(B):
        acc = acc + (tl.zeros((S, 8), dtype=tl.float32),)
    for panel in range(0, tl.cdiv(cols, PANEL)):
        segment = (panel * rows + r).to(tl.int64)
        begin = tl.load(pointer + segment)
        for start in range(0, tl.cdiv(tl.minimum(PANEL, cols - panel * PANEL), 8), S):
            s = start + tl.arange(0, S)
            byte = tl.load(bits + segment * (PANEL // 8) + s, mask=s < PANEL // 8, other=0)
            rank, count = _ranks(byte)
            before = begin + tl.cumsum(count, axis=0) - count
            begin += tl.sum(count, axis=0)
            kept = ((byte.to(tl.int32)[:, None] >> i[None, :]) & 1) != 0
            place = before[:, None] + ((rank[:, None] >> (4 * i).to(tl.uint32)[None, :]) & 15).to(tl.int32)
            w = tl.load(values + place, mask=kept, other=0).to(tl.float32)
            column = panel * PANEL + (s * 8)[:, None] + i[None, :]
            added = ()
            for b in tl.static_range(B):
                xs = tl.load(x + b * cols + column, mask=column < cols, other=0).to(tl.float32)
                # A dropped weight does not meet its x, which may be infinite.
                added = added + (acc[b] + tl.where(kept, xs * w, 0.0),)
            acc = added
    for b in tl.static_range(B):
        y = tl.sum(tl.sum(acc[b], axis=1), axis=0)
        if BIASED:
            y += tl.load(bias + r).to(tl.float32)
        tl.store(out + b * rows + r, y)


@triton.jit
def _wide_kernel(
    x,
    values,
    bits,
    pointer,
    bias,
    out,
    batch,
    rows,
    cols,
    PANEL: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    B: tl.constexpr,
    BIASED: tl.constexpr,
):
    """The same for a block of B x R through the tensor cores (fp32 in full precision)."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    b = tl.program_id(1) * B + tl.arange(0, B)
    i = tl.arange(0, 8)
    acc = tl.zeros((B, R), dtype=tl.float32)
    for panel in range(0, tl.cdiv(cols, PANEL)):
        segment = (panel * rows + r).to(tl.int64)
        begin = tl.load(pointer + segment, mask=r < rows, other=0)
        for start in range(0, tl.cdiv(tl.minimum(PANEL, cols - panel * PANEL), 8), S):
            s = start + tl.arange(0, S)
            inside = (r < rows)[:, None] & (s < PANEL // 8)[None, :]
            byte = tl.load(bits + segment[:, None] * (PANEL // 8) + s[None, :], mask=inside, other=0)
            rank, count = _ranks(byte)
            before = begin[:, None] + tl.cumsum(count, axis=1) - count
            begin += tl.sum(count, axis=1)
            kept = ((byte.to(tl.int32)[:, :, None] >> i[None, None, :]) & 1) != 0
            shift = (4 * i).to(tl.uint32)[None, None, :]
            place = before[:, :, None] + ((rank[:, :, None] >> shift) & 15).to(tl.int32)
            w = tl.reshape(tl.load(values + place, mask=kept, other=0), (R, S * 8))
            column = panel * PANEL + start * 8 + tl.arange(0, S * 8)
            known = (b < batch)[:, None] & (column < cols)[None, :]
            xs = tl.load(x + b[:, None] * cols + column[None, :], mask=known, other=0)
            acc += tl.dot(xs, tl.trans(w.to(xs.dtype)), input_precision="ieee")
    if BIASED:
        acc += tl.load(bias + r, mask=r < rows, other=0).to(tl.float32)[None, :]
    tl.store(out + b[:, None] * rows + r[None, :], acc, mask=(b < batch)[:, None] & (r < rows)[None, :])


def multiply(
    flat: Tensor, values: Tensor, index: Tensor, pointer: Tensor, rows: int, bias: Tensor | None
) -> Tensor:
    """x W^T + bias for x [batch, in] and a weight in the bitmask layout of `zoo.shared.ops.layout`."""
    out = flat.new_empty(flat.shape[0], rows)
    for xs, to in zip(flat.split(MOST_PLAIN_BATCH), out.split(MOST_PLAIN_BATCH), strict=True):
        _kernel[(rows,)](
            xs,
            values,
            index,
            pointer,
            flat if bias is None else bias,
            to,
            rows,
            flat.shape[1],
            PANEL=PANEL,
            S=128,
            B=xs.shape[0],
            BIASED=bias is not None,
            num_warps=1,
        )
    return out


def multiply_wide(
    flat: Tensor, values: Tensor, index: Tensor, pointer: Tensor, rows: int, bias: Tensor | None
) -> Tensor:
    """The same by the tensor cores, for a batch of sixteen and more; x must be finite, as a dropped weight
    meets its x here."""
    batch, cols = flat.shape
    block = min(64, max(16, triton.next_power_of_2(batch)))
    out = flat.new_empty(batch, rows)
    _wide_kernel[(triton.cdiv(rows, 32), triton.cdiv(batch, block))](
        flat,
        values,
        index,
        pointer,
        flat if bias is None else bias,
        out,
        batch,
        rows,
        cols,
        PANEL=PANEL,
        R=32,
        S=16,
        B=block,
        BIASED=bias is not None,
        num_warps=4,
    )
    return out
