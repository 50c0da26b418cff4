"""`gather_linear`, `gather_linear_rows` and `gated_product` in Triton: rows of the weight that are not active
are not read.

No list of active rows is made. A program of one warp that owns 32 consecutive inputs keeps which of them are
active in one word and goes through its bits, a few rows at a time; one that owns an output which nobody wants
ends at once. The host never waits for the device, so that calls can be captured in a CUDA graph.
"""

# A tuple that grows in a kernel is unrolled by Triton.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from ..dense_rows import DenseRows

__all__ = ["gated_product", "gather_linear", "gather_linear_rows"]

_MOST_BATCH = 8
_PARTS = 32  # partial sums that are added at a time
# Inputs that a program of `_output_kernel` holds of each row of x: more spill out of the registers.
_WIDTHS = {1: 1024, 2: 1024, 3: 512, 4: 512, 5: 256, 6: 256, 7: 256, 8: 256}


@triton.jit
def _part_of(raw, scale, kind: tl.constexpr, half: tl.constexpr):
    """Stored values in fp32. kind: 0 float, 1 int8, 2 int4, of which `half` chooses one of each byte."""
    if kind == 0:
        return raw.to(tl.float32)
    if kind == 2:
        raw = ((raw.to(tl.int32) >> (4 * half)) & 15) - 8
    return raw.to(tl.float32) * scale


@triton.jit
def _input_kernel(
    x,
    data,
    scales,
    partial,
    inputs,
    outputs,
    width,
    groups,
    group,
    kind: tl.constexpr,
    B: tl.constexpr,
    N: tl.constexpr,
    U: tl.constexpr,
    ROWS: tl.constexpr,
):
    """partial[part, b, n] = sum of x[b, k] * W[k, n] over the active k of ROWS consecutive ones."""
    PER: tl.constexpr = 2 if kind == 2 else 1  # values of a stored item
    n = tl.program_id(0) * N + tl.arange(0, N)
    part = tl.program_id(1)
    bit = tl.arange(0, 32)
    items = (outputs + PER - 1) // PER
    acc = ()
    for _ in tl.static_range(B * PER):
        acc = acc + (tl.zeros((N,), dtype=tl.float32),)
    for first in range(part * ROWS, tl.minimum(part * ROWS + ROWS, inputs), 32):
        active = tl.zeros((32,), dtype=tl.int1)
        for b in tl.static_range(B):
            active |= tl.load(x + b * inputs + first + bit, mask=first + bit < inputs, other=0) != 0
        left = tl.sum(active.to(tl.uint32) << bit.to(tl.uint32), axis=0)
        while left != 0:
            # All loads of U rows are under way before the first is used.
            rows, some, raws, factors = (), (), (), ()
            for _ in tl.static_range(U):
                here = left != 0
                rest = left & (left - 1)
                lowest = left ^ rest
                # The exponent of a power of two is the place of its bit.
                place = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
                row = (first + tl.where(here, place, 0)).to(tl.int64)
                left = rest
                inside = n < tl.where(here, items, 0)
                raw = tl.load(data + row * width + n, mask=inside, other=0)
                if kind == 0:
                    factor = 1.0
                else:
                    at = scales + row * groups + n * PER // group
                    factor = tl.load(at, mask=inside, other=0).to(tl.float32)
                rows, some = rows + (row,), some + (here,)
                raws, factors = raws + (raw,), factors + (factor,)
            for u in tl.static_range(U):
                added = ()
                for half in tl.static_range(PER):
                    w = _part_of(raws[u], factors[u], kind, half)
                    for b in tl.static_range(B):
                        xb = tl.load(x + b * inputs + rows[u], mask=some[u], other=0).to(tl.float32)
                        added = added + (acc[half * B + b] + w * xb,)
                acc = added
    for half in tl.static_range(PER):
        to = n * PER + half
        for b in tl.static_range(B):
            place = partial + (part * B + b).to(tl.int64) * outputs
            tl.store(place + to, acc[half * B + b], mask=to < outputs)


@triton.jit
def _sum_kernel(
    partial,
    bias,
    out,
    parts,
    outputs,
    BIASED: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """out[b, n] = bias[n] + sum of partial[:, b, n], always in the same order."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    b, batch = tl.program_id(1), tl.num_programs(1)
    p = tl.arange(0, P)
    acc = tl.zeros((P, N), dtype=tl.float32)
    for start in range(0, parts, P):
        inside = (start + p < parts)[:, None] & (n < outputs)[None, :]
        at = ((start + p) * batch + b)[:, None] * outputs + n[None, :]
        acc += tl.load(partial + at, mask=inside, other=0)
    y = tl.sum(acc, axis=0)
    if BIASED:
        y += tl.load(bias + n, mask=n < outputs, other=0).to(tl.float32)
    tl.store(out + b * outputs + n, y, mask=n < outputs)


@triton.jit
def _output_kernel(
    x,
    data,
    scales,
    gate,
    bias,
    out,
    inputs,
    outputs,
    width,
    groups,
    group,
    kind: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
):
    """out[b, r] = bias[r] + sum over k of x[b, k] * W[r, k], times gate[b, r] if GATED, 0 where that is 0."""
    PER: tl.constexpr = 2 if kind == 2 else 1
    r = tl.program_id(0)
    wanted = tl.load(gate + r) != 0
    for b in tl.static_range(1, B):
        wanted |= tl.load(gate + b * outputs + r) != 0
    # An output that no token wants has nothing to add up.
    length = tl.where(wanted, (inputs + PER - 1) // PER, 0)
    acc = ()
    for _ in tl.static_range(B):
        acc = acc + (tl.zeros((K,), dtype=tl.float32),)
    row = r.to(tl.int64)
    for start in range(0, length, K):
        k = start + tl.arange(0, K)
        stored = k * PER < inputs
        raw = tl.load(data + row * width + k, mask=stored, other=0)
        if kind == 0:
            factor = 1.0
        else:
            factor = tl.load(scales + row * groups + k * PER // group, mask=stored, other=0).to(tl.float32)
        for half in tl.static_range(PER):
            w = _part_of(raw, factor, kind, half)
            added = ()
            for b in tl.static_range(B):
                at = k * PER + half
                xs = tl.load(x + b * inputs + at, mask=at < inputs, other=0).to(tl.float32)
                added = added + (acc[b] + xs * w,)
            acc = added
    for b in tl.static_range(B):
        y = tl.sum(acc[b], axis=0)
        if BIASED:
            y += tl.load(bias + r).to(tl.float32)
        g = tl.load(gate + b * outputs + r)
        if GATED:
            y *= g.to(tl.float32)
        tl.store(out + b * outputs + r, tl.where(g != 0, y, 0.0))


def gather_linear(
    x: Float[Tensor, "*batch in"], weight: DenseRows, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """See `zoo.shared.ops.gather_linear.gather_linear`, which has checked the arguments."""
    flat = x.reshape(-1, weight.rows)
    return _input_side(flat, weight, bias, x.dtype).reshape(*x.shape[:-1], weight.cols)


def gather_linear_rows(
    x: Float[Tensor, "*batch in"],
    weight: DenseRows,
    active: Bool[Tensor, "*batch out"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """See `zoo.shared.ops.gather_linear.gather_linear_rows`, which has checked the arguments."""
    flat, wanted = x.reshape(-1, weight.cols), active.reshape(-1, weight.rows).view(torch.uint8)
    return _output_side(flat, weight, wanted, bias, x.dtype, gated=False).reshape(active.shape)


def gated_product(
    x: Float[Tensor, "*batch in"],
    g: Float[Tensor, "*batch hidden"],
    up: DenseRows,
    down: DenseRows,
    up_bias: Float[Tensor, " hidden"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """See `zoo.shared.ops.gated_product.gated_product`, which has checked the arguments."""
    flat, gates = x.reshape(-1, up.cols), g.reshape(-1, up.rows)
    h = _output_side(flat, up, gates, up_bias, torch.float32, gated=True)
    return _input_side(h, down, None, x.dtype).reshape(*x.shape[:-1], down.cols)


def _form(weight: DenseRows) -> tuple[Tensor, Tensor, int, int, int]:
    """Data, scales (any tensor where there are none), items and scales of a row, and the kind's number."""
    kind = {"int8": 1, "int4": 2}.get(weight.kind, 0)
    if weight.scales is None:
        return weight.data, weight.data, weight.data.shape[1], 1, kind
    return weight.data, weight.scales, weight.data.shape[1], weight.scales.shape[1], kind


def _input_side(x: Tensor, weight: DenseRows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = x.new_empty(x.shape[0], weight.cols, dtype=dtype)
    data, scales, items, groups, kind = _form(weight)
    if out.numel() == 0:
        return out
    if weight.rows == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    values = 2 if kind == 2 else 1
    width, depth, unroll = 256, 128, 8
    parts = triton.cdiv(weight.rows, depth)
    for xs, to in zip(x.contiguous().split(_MOST_BATCH), out.split(_MOST_BATCH), strict=True):
        batch = xs.shape[0]
        partial = x.new_empty(parts, batch, weight.cols, dtype=torch.float32)
        _input_kernel[(triton.cdiv(weight.cols, width * values), parts)](
            xs,
            data,
            scales,
            partial,
            weight.rows,
            weight.cols,
            items,
            groups,
            weight.group,
            kind=kind,
            B=batch,
            N=width,
            U=unroll,
            ROWS=depth,
            num_warps=1,
        )
        _sum_kernel[(triton.cdiv(weight.cols, 64), batch)](
            partial,
            xs if bias is None else bias,
            to,
            parts,
            weight.cols,
            BIASED=bias is not None,
            P=_PARTS,
            N=64,
        )
    return out


def _output_side(
    x: Tensor, weight: DenseRows, gate: Tensor, bias: Tensor | None, dtype: torch.dtype, gated: bool
) -> Tensor:
    out = x.new_empty(x.shape[0], weight.rows, dtype=dtype)
    if out.numel() == 0:
        return out
    data, scales, items, groups, kind = _form(weight)
    pieces = (x.contiguous(), gate.contiguous(), out)
    for xs, marks, to in zip(*(piece.split(_MOST_BATCH) for piece in pieces), strict=True):
        batch = xs.shape[0]
        _output_kernel[(weight.rows,)](
            xs,
            data,
            scales,
            marks,
            xs if bias is None else bias,
            to,
            weight.cols,
            weight.rows,
            items,
            groups,
            weight.group,
            kind=kind,
            B=batch,
            K=_WIDTHS[batch],
            BIASED=bias is not None,
            GATED=gated,
            num_warps=1,
        )
    return out
