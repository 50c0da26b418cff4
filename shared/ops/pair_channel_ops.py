"""Operators over pair lists that keep channels apart: depthwise convolution and maximum.

The arguments are those of `pair_ops.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from .pair_ops import _BACK, _PAIRS, _arguments, _check, _offset_of_pair, _pointer, plan
from .rulebook import Pairs


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs, flipped: bool) -> Tensor:
    """y[t] = bias + sum over pairs (s, t) at offset k of weight[k] * x[s]; weight [offsets, channels]."""
    offsets, channels = weight.shape
    _check(x, *pairs[:3], pairs.targets, pairs.tile, offsets)
    if plan(x, weight, pairs.targets).backend == "reference":
        each = (weight.flip(0) if flipped else weight)[_offset_of_pair(pairs, offsets)]
        y = x.new_zeros(pairs.targets, channels)
        y = y.index_add(0, pairs.target.long(), each * x[pairs.source.long()])
        return y if bias is None else y + bias
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(pairs.targets, channels)
    _native.function("zoo_sparse_depthwise", "pppppppiiiiiii")(
        *_arguments(*pairs[:3]),
        x.data_ptr(),
        weight.data_ptr(),
        _pointer(bias),
        y.data_ptr(),
        pairs.targets,
        offsets,
        pairs.tile,
        channels,
        int(flipped),
        x.element_size(),
        _native.threads(),
    )
    return y


@torch.library.custom_op(
    "zoo::sparse_depthwise",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {_PAIRS}, {_BACK}, bool flipped) -> Tensor",
)
def depthwise_op(
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
    """y [targets, channels] from x [sources, channels] and weight [offsets, channels]."""
    return _depthwise(x, weight, bias, Pairs(source, target, start, x.shape[0], targets, tile), False)


@depthwise_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Any, source: Any, target: Any, start: Any, targets: int, *_: Any
) -> Tensor:
    return x.new_empty(targets, weight.shape[1])


@torch.library.custom_op(
    "zoo::sparse_depthwise_grad_x",
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
    pairs = Pairs(source, target, start, grad.shape[0], targets, tile)
    return _depthwise(grad, weight, None, pairs, flipped)


@_grad_x.register_fake
def _(
    grad: Tensor, weight: Tensor, source: Tensor, target: Tensor, start: Tensor, targets: int, *_: Any
) -> Tensor:
    return grad.new_empty(targets, weight.shape[1])


@torch.library.custom_op(
    "zoo::sparse_depthwise_grad_weight",
    mutates_args=(),
    schema=f"(Tensor x, Tensor grad, int offsets, {_PAIRS}) -> Tensor",
)
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
    _check(x, source, target, start, targets, tile, offsets)
    x, grad = x.contiguous(), grad.contiguous()
    result = x.new_zeros(offsets, x.shape[1])
    if plan(x, result, targets).backend == "reference":
        of_pair = _offset_of_pair(Pairs(source, target, start, x.shape[0], targets, tile), offsets)
        return result.index_add(0, of_pair, grad[target.long()] * x[source.long()])
    _native.function("zoo_sparse_depthwise_grad_weight", "ppppppiiiiii")(
        *_arguments(source, target, start),
        x.data_ptr(),
        grad.data_ptr(),
        result.data_ptr(),
        targets,
        offsets,
        tile,
        x.shape[1],
        x.element_size(),
        _native.threads(),
    )
    return result


@_grad_weight.register_fake
def _(x: Tensor, grad: Tensor, offsets: int, *_: Any) -> Tensor:
    return x.new_empty(offsets, x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *lists, ctx.flipped = inputs
    ctx.numbers = [each for each in lists if not isinstance(each, Tensor)]
    ctx.save_for_backward(x, weight, *(each for each in lists if isinstance(each, Tensor)))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, source, target, start, b_source, b_target, b_start = ctx.saved_tensors
    targets, tile, b_tile = ctx.numbers
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _grad_x(grad, weight, b_source, b_target, b_start, x.shape[0], b_tile, ctx.flipped)
    if ctx.needs_input_grad[1]:
        grad_weight = _grad_weight(x, grad, weight.shape[0], source, target, start, targets, tile)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0)
    return grad_x, grad_weight, grad_bias, *(None,) * 10


depthwise_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "zoo::sparse_max_pool",
    mutates_args=(),
    schema=f"(Tensor x, int offsets, {_PAIRS}, {_BACK}) -> (Tensor, Tensor)",
)
def max_pool_op(
    x: Tensor,
    offsets: int,
    source: Tensor,
    target: Tensor,
    start: Tensor,
    targets: int,
    tile: int,
    b_source: Tensor,
    b_target: Tensor,
    b_start: Tensor,
    b_tile: int,
) -> tuple[Tensor, Tensor]:
    """The maxima [targets, channels] and, int32, the source that has each: of equals the lowest offset's."""
    _check(x, source, target, start, targets, tile, offsets)
    channels = x.shape[1]
    if plan(x, x, targets).backend == "reference":
        index = target.long()[:, None].expand(-1, channels)
        values, rows = x[source.long()], source.long()[:, None].expand(-1, channels)
        y = x.new_zeros(targets, channels).scatter_reduce(0, index, values, "amax", include_self=False)
        attained = (values == y[target.long()]) | values.isnan()
        of_pair = _offset_of_pair(Pairs(source, target, start, x.shape[0], targets, tile), offsets)
        rank = torch.where(attained, of_pair[:, None], offsets)
        first = rank.new_full(y.shape, offsets).scatter_reduce(0, index, rank, "amin")
        chosen = attained & (rank == first[target.long()])
        arg = torch.full_like(y, -1, dtype=torch.int64)
        arg = arg.scatter_reduce(0, index, torch.where(chosen, rows, -1), "amax")
        return y, arg.int()
    x = x.contiguous()
    y, arg = x.new_empty(targets, channels), torch.empty(targets, channels, dtype=torch.int32)
    _native.function("zoo_sparse_max_pool", "ppppppiiiiii")(
        *_arguments(source, target, start),
        x.data_ptr(),
        y.data_ptr(),
        arg.data_ptr(),
        targets,
        offsets,
        tile,
        channels,
        x.element_size(),
        _native.threads(),
    )
    return y, arg


@max_pool_op.register_fake
def _(
    x: Tensor, offsets: int, source: Tensor, target: Tensor, start: Tensor, targets: int, *_: Any
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(targets, x.shape[1])
    return y, torch.empty_like(y, dtype=torch.int32)


@torch.library.custom_op(
    "zoo::sparse_max_pool_grad",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor arg, int offsets, {_PAIRS}) -> Tensor",
)
def _max_pool_grad(
    grad: Tensor,
    arg: Tensor,
    offsets: int,
    source: Tensor,
    target: Tensor,
    start: Tensor,
    targets: int,
    tile: int,
) -> Tensor:
    """The pairs are those from output sites to input sites."""
    _check(grad, source, target, start, targets, tile, offsets)
    grad = grad.contiguous()
    if plan(grad, grad, targets).backend == "reference":
        flow = torch.where(arg[source.long()] == target[:, None], grad[source.long()], 0)
        return grad.new_zeros(targets, grad.shape[1]).index_add(0, target.long(), flow)
    result = grad.new_empty(targets, grad.shape[1])
    _native.function("zoo_sparse_max_pool_grad", "ppppppiiiiii")(
        *_arguments(source, target, start),
        grad.data_ptr(),
        arg.data_ptr(),
        result.data_ptr(),
        targets,
        offsets,
        tile,
        grad.shape[1],
        grad.element_size(),
        _native.threads(),
    )
    return result


@_max_pool_grad.register_fake
def _(
    grad: Tensor, arg: Tensor, offsets: int, source: Any, target: Any, start: Any, targets: int, *_: Any
) -> Tensor:
    return grad.new_empty(targets, grad.shape[1])


def _save_max(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.offsets, _, _, _, _, _, b_source, b_target, b_start, ctx.tile = inputs
    ctx.sites = x.shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], b_source, b_target, b_start)


def _backward_max(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    arg, source, target, start = ctx.saved_tensors
    grad_x = _max_pool_grad(grad, arg, ctx.offsets, source, target, start, ctx.sites, ctx.tile)
    return grad_x, *(None,) * 10


max_pool_op.register_autograd(_backward_max, setup_context=_save_max)
