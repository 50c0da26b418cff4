"""`gather_linear` and `gather_linear_rows` in Triton: rows of the weight that are not active are not read.

The list of active rows is made on the device and its length is read there, so that the host never waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from shared.ops.dense_rows import DenseRows

__all__ = ["gather_linear", "gather_linear_rows"]

_MOST_BATCH = 8
# One token makes few blocks of outputs; cutting the active rows into parts fills the processors of a GPU.
_SPLIT = 8


@triton.jit
def _load_tile(data, scales, rows, cols, inside, stride, group, kind: tl.constexpr):
    """W[rows, cols] in fp32; `rows` is [R, 1] and `cols` [1, C]. kind: 0 float, 1 int8, 2 int4."""
    if kind == 2:
        byte = tl.load(data + rows * (stride // 2) + cols // 2, mask=inside, other=0)
        w = ((byte.to(tl.int32) >> ((cols % 2) * 4)) & 15).to(tl.float32) - 8
    else:
        w = tl.load(data + rows * stride + cols, mask=inside, other=0).to(tl.float32)
    if kind != 0:
        w *= tl.load(scales + rows * (stride // group) + cols // group, mask=inside, other=0).to(tl.float32)
    return w


@triton.jit
def _input_kernel(
    x, data, scales, active, count, partial, inputs, outputs, stride, group,
    kind: tl.constexpr, B: tl.constexpr, K: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """partial[part, b, n] = sum over every SPLIT-th block of active k of x[b, k] * W[k, n]."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    part = tl.program_id(1)
    b = tl.arange(0, B)
    total = tl.load(count)
    acc = tl.zeros((B, N), dtype=tl.float32)
    for start in range(part * K, total, SPLIT * K):
        at = start + tl.arange(0, K)
        k = tl.load(active + at, mask=at < total, other=0)
        xs = tl.load(x + b[:, None] * inputs + k[None, :], mask=(at < total)[None, :], other=0).to(tl.float32)
        inside = (at < total)[:, None] & (n < outputs)[None, :]
        w = _load_tile(data, scales, k[:, None], n[None, :], inside, stride, group, kind)
        acc += tl.sum(xs[:, :, None] * w[None, :, :], axis=1)
    to = partial + (part * B + b[:, None]) * outputs + n[None, :]
    tl.store(to, acc, mask=(n < outputs)[None, :])


@triton.jit
def _output_kernel(
    x, data, scales, active, count, out, inputs, outputs, stride, group,
    kind: tl.constexpr, B: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[b, r] = sum over k of x[b, k] * W[r, k] for the active rows r."""
    total = tl.load(count)
    at = tl.program_id(0) * R + tl.arange(0, R)
    b = tl.arange(0, B)
    r = tl.load(active + at, mask=at < total, other=0)
    acc = tl.zeros((B, R), dtype=tl.float32)
    # The grid is made for all rows; a block beyond the active ones has nothing to add up.
    length = tl.where(tl.program_id(0) * R < total, inputs, 0)
    for start in range(0, length, K):
        k = start + tl.arange(0, K)
        xs = tl.load(x + b[:, None] * inputs + k[None, :], mask=(k < inputs)[None, :], other=0).to(tl.float32)
        inside = (at < total)[:, None] & (k < inputs)[None, :]
        w = _load_tile(data, scales, r[:, None], k[None, :], inside, stride, group, kind)
        acc += tl.sum(xs[:, None, :] * w[None, :, :], axis=2)
    tl.store(out + b[:, None] * outputs + r[None, :], acc, mask=(at < total)[None, :])


def gather_linear(
    x: Float[Tensor, "*batch in"], weight: DenseRows, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """See `shared.ops.gather_linear.gather_linear`, which has checked the arguments."""
    flat = x.reshape(-1, weight.rows)
    outs = [_input_side(part, weight) for part in flat.split(_MOST_BATCH)]
    y = torch.cat(outs) if outs else flat.new_zeros(0, weight.cols, dtype=torch.float32)
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.cols)


def gather_linear_rows(
    x: Float[Tensor, "*batch in"],
    weight: DenseRows,
    active: Bool[Tensor, "*batch out"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """See `shared.ops.gather_linear.gather_linear_rows`, which has checked the arguments."""
    flat, wanted = x.reshape(-1, weight.cols), active.reshape(-1, weight.rows)
    parts = zip(flat.split(_MOST_BATCH), wanted.split(_MOST_BATCH), strict=True)
    outs = [_output_side(part, marks, weight) for part, marks in parts]
    y = torch.cat(outs) if outs else flat.new_zeros(0, weight.rows, dtype=torch.float32)
    y = y if bias is None else y + bias.float()
    return torch.where(wanted, y, 0).to(x.dtype).reshape(active.shape)


def _indices(marks: Tensor) -> tuple[Tensor, Tensor]:
    """The marked positions, in order, in a list as long as all of them, and how many they are."""
    places = marks.cumsum(0)
    order = torch.arange(marks.numel(), device=marks.device, dtype=torch.int32)
    listed = torch.zeros(marks.numel() + 1, device=marks.device, dtype=torch.int32)
    listed.scatter_(0, torch.where(marks, places - 1, marks.numel()), order)
    return listed, places[-1:].to(torch.int32)


def _padded(x: Tensor) -> tuple[Tensor, int]:
    """x with a power of two of rows, the added ones zero."""
    batch = triton.next_power_of_2(x.shape[0])
    return torch.nn.functional.pad(x, (0, 0, 0, batch - x.shape[0])).contiguous(), batch


def _form(weight: DenseRows) -> tuple[Tensor, int]:
    """Scales (any tensor where there are none) and the number of the kind for the kernels."""
    kind = {"int8": 1, "int4": 2}.get(weight.kind, 0)
    return weight.data if weight.scales is None else weight.scales, kind


def _input_side(x: Tensor, weight: DenseRows) -> Tensor:
    if x.numel() == 0 or weight.cols == 0:
        return x.new_zeros(x.shape[0], weight.cols, dtype=torch.float32)
    xs, batch = _padded(x)
    active, count = _indices((x != 0).any(0))
    scales, kind = _form(weight)
    partial = x.new_empty(_SPLIT, batch, weight.cols, dtype=torch.float32)
    block = 128
    _input_kernel[(triton.cdiv(weight.cols, block), _SPLIT)](
        xs, weight.data, scales, active, count, partial, weight.rows, weight.cols, weight.stride,
        weight.group, kind=kind, B=batch, K=max(4, 32 // batch), N=block, SPLIT=_SPLIT,
    )
    return partial.sum(0)[: x.shape[0]]


def _output_side(x: Tensor, wanted: Tensor, weight: DenseRows) -> Tensor:
    out = x.new_zeros(triton.next_power_of_2(max(1, x.shape[0])), weight.rows, dtype=torch.float32)
    if x.numel() == 0 or weight.rows == 0:
        return out[: x.shape[0]]
    xs, batch = _padded(x)
    active, count = _indices(wanted.any(0))
    scales, kind = _form(weight)
    block = max(4, 16 // batch)
    _output_kernel[(triton.cdiv(weight.rows, block),)](
        xs, weight.data, scales, active, count, out, weight.cols, weight.rows, weight.stride, weight.group,
        kind=kind, B=batch, R=block, K=128,
    )
    return out[: x.shape[0]]
