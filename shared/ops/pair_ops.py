"""Operators over pair lists: convolution, depthwise convolution and maximum, forward and backward.

`sparse_conv.py` has the functions for users; here tensors are plain and rulebooks are already made. In every
operator `source`, `target`, `start`, `targets` and `tile` are the fields of `rulebook.Pairs`; those of the
opposite direction, which the gradient of the input needs, start with `b_`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch
from .rulebook import Pairs

_NATIVE_TYPES = (torch.float32, torch.float64)
_PAIRS = "Tensor source, Tensor target, Tensor start, int targets, int tile"
_BACK = "Tensor b_source, Tensor b_target, Tensor b_start, int b_tile"


def plan(x: Tensor, weight: Tensor, targets: int) -> dispatch.Plan:
    """The backend of a convolution over pair lists."""
    native = ["native"] if x.dtype in _NATIVE_TYPES and x.device.type == "cpu" else []
    sizes = (float(targets + 1), float(weight.numel() + 1))
    return dispatch.choose("sparse_conv", x.device, (*native, "reference"), str(x.dtype)[6:], sizes)


def convolve_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs, transposed: bool, flipped: bool
) -> Tensor:
    """The definition: y[t] = bias + sum over pairs (s, t) at offset k of W[:, k, :] x[s]."""
    offsets = weight.shape[1]
    y = x.new_zeros(pairs.targets, weight.shape[2 if transposed else 0])
    for k, at in enumerate(_pairs_by_offset(pairs, offsets)):
        matrix = weight[:, offsets - 1 - k if flipped else k]
        messages = x[pairs.source[at].long()] @ (matrix if transposed else matrix.T)
        y = y.index_add(0, pairs.target[at].long(), messages)
    return y if bias is None else y + bias


def _offset_of_pair(pairs: Pairs, offsets: int) -> Tensor:
    segments = torch.arange(pairs.start.numel() - 1, device=pairs.start.device)
    return segments.repeat_interleave(pairs.start.diff(), output_size=pairs.source.numel()) % offsets


def _pairs_by_offset(pairs: Pairs, offsets: int) -> tuple[Tensor, ...]:
    """The positions of each offset's pairs, in their order; a GPU is waited for once, not once per offset."""
    of_pair = _offset_of_pair(pairs, offsets)
    counts = torch.bincount(of_pair, minlength=offsets).tolist()
    return of_pair.argsort(stable=True).split(counts)


def _arguments(source: Tensor, target: Tensor, start: Tensor) -> tuple[int, int, int]:
    return source.data_ptr(), target.data_ptr(), start.data_ptr()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(
    x: Tensor, source: Tensor, target: Tensor, start: Tensor, targets: int, tile: int, offsets: int
) -> None:
    """Refuse lists that no rulebook can have made: the kernels trust their indices."""
    segments = -(-targets // tile) * offsets if tile > 0 else -1
    kinds = (source.dtype, target.dtype, start.dtype)
    if start.numel() != segments + 1 or kinds != (torch.int32, torch.int32, torch.int64):
        raise OpError(f"these pair lists are not for {targets} targets and a kernel of {offsets} offsets")
    for each in (source, target, start):
        if not each.is_contiguous() or each.dim() != 1 or each.device != x.device:
            raise OpError(f"pair lists must be contiguous vectors on {x.device}, received {each.device}")
    if source.device.type == "cpu" and source.shape == target.shape and _native.available():
        numbers = (source.numel(), offsets, x.shape[0], targets, tile, _native.threads())
        if not _native.value("zoo_pairs_check", "pppiiiiii")(*_arguments(source, target, start), *numbers):
            return
    if source.shape != target.shape or int(start[-1]) != source.numel():
        raise OpError(f"pair lists of {source.numel()} and {target.numel()} entries, not {int(start[-1])}")
    if int(start[0]) != 0 or bool((start[1:] < start[:-1]).any()):
        raise OpError("the starts of pair lists begin at 0 and never fall")
    if source.numel():
        (low, high), (first, last) = source.aminmax(), target.aminmax()
        if int(low) < 0 or int(high) >= x.shape[0] or int(first) < 0 or int(last) >= targets:
            raise OpError(
                f"the pair lists name sites {int(low)} to {int(high)} of {x.shape[0]} "
                f"and outputs {int(first)} to {int(last)} of {targets}"
            )
    segment = torch.arange(segments, device=start.device).repeat_interleave(start.diff())
    falls = (target[1:] <= target[:-1]) & (segment[1:] == segment[:-1])
    if bool((target.long() // tile != segment // max(offsets, 1)).any()) or bool(falls.any()):
        raise OpError("a pair stands in the segment of another tile of targets, or its targets do not rise")


@dispatch.in_own_precision
def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs, transposed: bool, flipped: bool
) -> Tensor:
    """The convolution itself, by the backend that `plan` says."""
    out, offsets, channels = weight.shape
    _check(x, *pairs[:3], pairs.targets, pairs.tile, offsets)
    if plan(x, weight, pairs.targets).backend == "reference":
        return convolve_reference(x, weight, bias, pairs, transposed, flipped)
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(pairs.targets, channels if transposed else out)
    _native.function("zoo_sparse_conv", "pppppppiiiiiiiii")(
        *_arguments(*pairs[:3]),
        x.data_ptr(),
        weight.data_ptr(),
        _pointer(bias),
        y.data_ptr(),
        pairs.targets,
        offsets,
        pairs.tile,
        out,
        channels,
        int(transposed),
        int(flipped),
        x.element_size(),
        _native.threads(),
    )
    return y


@torch.library.custom_op(
    "zoo::sparse_conv",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {_PAIRS}, {_BACK}, bool flipped) -> Tensor",
)
def sparse_conv_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: Tensor,
    target: Tensor,
    start: Tensor,
    targets: int,
    tile: int,
    b_source: Tensor,
    b_target: Tensor,
    b_start: Tensor,
    b_tile: int,
    flipped: bool,
) -> Tensor:
    """y [targets, out] from x [sources, in] and weight [out, offsets, in]; `flipped`: the backward pairs."""
    return convolve(x, weight, bias, Pairs(source, target, start, x.shape[0], targets, tile), False, False)


@sparse_conv_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Any, source: Any, target: Any, start: Any, targets: int, *_: Any
) -> Tensor:
    return x.new_empty(targets, weight.shape[0])


@torch.library.custom_op(
    "zoo::sparse_conv_grad_x",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor weight, {_PAIRS}, bool flipped) -> Tensor",
)
def _grad_x(
    grad: Tensor,
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    start: Tensor,
    targets: int,
    tile: int,
    flipped: bool,
) -> Tensor:
    """The pairs are those from output sites to input sites."""
    pairs = Pairs(source, target, start, grad.shape[0], targets, tile)
    return convolve(grad, weight, None, pairs, True, flipped)


@_grad_x.register_fake
def _(
    grad: Tensor, weight: Tensor, source: Tensor, target: Tensor, start: Tensor, targets: int, *_: Any
) -> Tensor:
    return grad.new_empty(targets, weight.shape[2])


@torch.library.custom_op(
    "zoo::sparse_conv_grad_weight",
    mutates_args=(),
    schema=f"(Tensor x, Tensor grad, int offsets, {_PAIRS}) -> Tensor",
)
@dispatch.in_own_precision
def _grad_weight(
    x: Tensor,
    grad: Tensor,
    offsets: int,
    source: Tensor,
    target: Tensor,
    start: Tensor,
    targets: int,
    tile: int,
) -> Tensor:
    """[out, offsets, in]: sum over pairs (s, t) of the offset of grad[t] x[s]^T."""
    _check(x, source, target, start, targets, tile, offsets)
    x, grad = x.contiguous(), grad.contiguous()
    out, channels = grad.shape[1], x.shape[1]
    result = x.new_zeros(out, offsets, channels)
    if plan(x, result, targets).backend == "reference":
        pairs = Pairs(source, target, start, x.shape[0], targets, tile)
        for k, at in enumerate(_pairs_by_offset(pairs, offsets)):
            result[:, k] = grad[target[at].long()].T @ x[source[at].long()]
        return result
    _native.function("zoo_sparse_conv_grad_weight", "ppppppiiiiiii")(
        *_arguments(source, target, start),
        x.data_ptr(),
        grad.data_ptr(),
        result.data_ptr(),
        targets,
        offsets,
        tile,
        out,
        channels,
        x.element_size(),
        _native.threads(),
    )
    return result


@_grad_weight.register_fake
def _(x: Tensor, grad: Tensor, offsets: int, *_: Any) -> Tensor:
    return x.new_empty(grad.shape[1], offsets, x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *lists, ctx.flipped = inputs
    tensors = [each for each in lists if isinstance(each, Tensor)]
    ctx.numbers = [each for each in lists if not isinstance(each, Tensor)]
    ctx.save_for_backward(x, weight, *tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, source, target, start, b_source, b_target, b_start = ctx.saved_tensors
    targets, tile, b_tile = ctx.numbers
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _grad_x(grad, weight, b_source, b_target, b_start, x.shape[0], b_tile, ctx.flipped)
    if ctx.needs_input_grad[1]:
        grad_weight = _grad_weight(x, grad, weight.shape[1], source, target, start, targets, tile)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0)
    return grad_x, grad_weight, grad_bias, *(None,) * 10


sparse_conv_op.register_autograd(_backward, setup_context=_save)
