"""Convolutions and pooling on the active sites of a grid, in 1, 2 and 3 dimensions.

Weights have spconv's layout [out, *kernel, in] (a dense convolution's weight is `weight.movedim(-1, 1)`).
Results are the same for any number of threads, also in the backward pass.

A rulebook is looked up by the sites' tensor, or made. Under `torch.compile(fullgraph=True)` or `torch.export`
it must be passed (`submanifold_rulebook`, `conv_rulebook`): looking it up is not an operation on tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from . import dispatch
from .pair_channel_ops import depthwise_op, max_pool_op
from .pair_ops import convolve, plan, sparse_conv_op
from .rulebook import Pairs, Rulebook, conv_rulebook, submanifold_rulebook
from .sparse_tensor import SparseConvTensor, like

Weight = Float[Tensor, "out ..."]


def subm_conv(
    x: Any,
    weight: Weight,
    bias: Float[Tensor, " out"] | None = None,
    *,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    rulebook: Rulebook | None = None,
) -> Any:
    """Submanifold convolution (Graham and van der Maaten 2017): outputs at the input's sites only.

    y[p] = bias + sum over offsets k of W[k] x[p + (k - centre) * dilation], over the sites that are there.

    Args:
        x: a `SparseConvTensor`, or spconv's.
        weight: [out, *kernel, in], odd kernel sizes; depthwise [channels, *kernel, 1], groups = channels.
        rulebook: of these sites and this geometry.

    Returns:
        A tensor of x's type on the same sites.

    Raises:
        OpError: bad sites, weights that do not fit, groups other than 1 and the number of channels.
    """
    kernel = _kernel(x, weight, bias, groups)
    if rulebook is None:
        rulebook = submanifold_rulebook(x.indices, x.spatial_shape, x.batch_size, kernel, dilation)
    features = _convolve(x.features, weight, bias, groups, rulebook, rulebook.forward, rulebook.backward)
    return like(x, features, x.indices, x.spatial_shape)


def sparse_conv(
    x: Any,
    weight: Weight,
    bias: Float[Tensor, " out"] | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    rulebook: Rulebook | None = None,
) -> Any:
    """Sparse convolution: outputs at every site that some input reaches, in row-major order.

    Arguments as in `subm_conv`; with a bias, cells that no input reaches stay empty.

    Raises:
        OpError: bad sites, weights or geometry that do not fit.
    """
    kernel = _kernel(x, weight, bias, groups)
    if rulebook is None:
        rulebook = conv_rulebook(x.indices, x.spatial_shape, x.batch_size, kernel, stride, padding, dilation)
    features = _convolve(x.features, weight, bias, groups, rulebook, rulebook.forward, rulebook.backward)
    return like(x, features, rulebook.indices, rulebook.spatial_shape)


def inverse_conv(
    x: Any,
    weight: Weight,
    bias: Float[Tensor, " out"] | None = None,
    *,
    fine: Any,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    rulebook: Rulebook | None = None,
) -> Any:
    """Undo the change of sites of a `sparse_conv`: from its output sites back to its input sites.

    Args:
        x: on the sites that `sparse_conv(fine, ...)` with this geometry gave.
        fine: the tensor (or any tensor on its sites) that the convolution was applied to.
        rulebook: that of the convolution.

    Raises:
        OpError: x does not have the sites of that convolution's output.
    """
    kernel = _kernel(x, weight, bias, 1)
    if rulebook is None:
        rulebook = conv_rulebook(
            fine.indices, fine.spatial_shape, fine.batch_size, kernel, stride, padding, dilation
        )
    if x.indices.shape != rulebook.indices.shape or not torch.equal(x.indices, rulebook.indices):
        raise OpError(
            f"the {x.indices.shape[0]} sites of x are not the {rulebook.indices.shape[0]} output sites of "
            "the convolution to be undone: pass the same fine sites and the same geometry"
        )
    features = _convolve(x.features, weight, bias, 1, rulebook, rulebook.backward, rulebook.forward)
    return like(fine, features, fine.indices, fine.spatial_shape)


def sparse_max_pool(
    x: Any,
    kernel: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    rulebook: Rulebook | None = None,
) -> Any:
    """The largest active value per channel in each window that holds a site; default stride: the kernel's.

    NaN is largest; the gradient of equal values goes to the first in the window's row-major order.
    """
    rulebook = _pool_rulebook(x, kernel, stride, padding, dilation, rulebook)
    there, back = rulebook.forward, rulebook.backward
    features, _ = max_pool_op(
        x.features, rulebook.geometry.offsets, *_lists(there), *_lists(back)[:3], back.tile
    )
    return like(x, features, rulebook.indices, rulebook.spatial_shape)


def sparse_avg_pool(
    x: Any,
    kernel: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    rulebook: Rulebook | None = None,
) -> Any:
    """The mean over the active sites of each window that holds one; default stride: the kernel's."""
    rulebook = _pool_rulebook(x, kernel, stride, padding, dilation, rulebook)
    there, back = rulebook.forward, rulebook.backward
    ones = x.features.new_ones(rulebook.geometry.offsets, x.features.shape[1])
    lists = (*_lists(there), *_lists(back)[:3], back.tile)
    sums = depthwise_op(x.features, ones, None, *lists, rulebook.flipped)
    counts = torch.zeros(there.targets, dtype=torch.int64, device=sums.device).index_add(
        0, there.target, torch.ones_like(there.target, dtype=torch.int64)
    )
    features = sums / counts[:, None].to(sums.dtype)
    return like(x, features, rulebook.indices, rulebook.spatial_shape)


def _pool_rulebook(
    x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, rulebook: Rulebook | None
) -> Rulebook:
    _check_features(x)
    if rulebook is not None:
        return rulebook
    stride = kernel if stride is None else stride
    return conv_rulebook(x.indices, x.spatial_shape, x.batch_size, kernel, stride, padding, dilation)


def _lists(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, int, int]:
    return pairs.source, pairs.target, pairs.start, pairs.targets, pairs.tile


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    rulebook: Rulebook,
    there: Pairs,
    back: Pairs,
) -> Tensor:
    if x.shape[0] != there.sources or weight[0, ..., 0].numel() != rulebook.geometry.offsets:
        raise OpError(
            f"the rulebook is for {there.sources} sites and a kernel {rulebook.geometry.kernel}. "
            f"Received: {x.shape[0]} sites, weight {tuple(weight.shape)}."
        )
    lists = (*_lists(there), *_lists(back)[:3], back.tile)
    dispatch.refuse_tangents(weight, bias)
    if groups == 1 and dispatch.direct(x, weight, bias, there.source):
        return convolve(x, weight.flatten(1, -2), bias, there, transposed=False, flipped=False)
    if groups == 1:
        return sparse_conv_op(x, weight.flatten(1, -2), bias, *lists, rulebook.flipped)
    return depthwise_op(x, weight.flatten(1).T.contiguous(), bias, *lists, rulebook.flipped)


def _check_features(x: Any) -> None:
    features, indices = x.features, x.indices
    dispatch.refuse_tangents(features)
    if features.ndim != 2 or features.shape[0] != indices.shape[0] or not features.is_floating_point():
        raise OpError(
            f"features must be floating-point, [{indices.shape[0]} sites, channels]. "
            f"Received: {tuple(features.shape)}, {features.dtype}."
        )
    if features.device != indices.device:
        raise OpError(f"features are on {features.device}, indices on {indices.device}: move them together")


def _kernel(x: Any, weight: Tensor, bias: Tensor | None, groups: int) -> tuple[int, ...]:
    """The kernel's extents, once features, weight and bias fit together."""
    _check_features(x)
    channels, dims = x.features.shape[1], len(x.spatial_shape)
    if groups not in (1, channels):
        raise OpError(f"groups must be 1 or the number of channels, {channels}. Received: {groups}.")
    fits = weight.ndim == dims + 2 and weight.shape[-1] * groups == channels
    if not fits or (groups > 1 and weight.shape[0] != groups):
        raise OpError(
            f"weight must be [out, {dims} kernel sizes, {channels // groups}] for {channels} channels and "
            f"groups = {groups}. Received: {tuple(weight.shape)}."
        )
    if weight.dtype != x.features.dtype or weight.device != x.features.device:
        raise OpError(f"weight is {weight.dtype} on {weight.device}, features {x.features.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise OpError(
            f"bias must be [{weight.shape[0]}], {weight.dtype}. Received: {tuple(bias.shape)}, {bias.dtype}."
        )
    return tuple(weight.shape[1:-1])


def _explain_pool(x: Any, *_args: Any, **_options: Any) -> dispatch.Plan:
    return plan(x.features, x.features, x.features.shape[0])


def _explain(x: Any, weight: Tensor, *_args: Any, **_options: Any) -> dispatch.Plan:
    return plan(x.features, weight, x.features.shape[0])


def _examples(name: str) -> Iterator[dispatch.Example]:
    for shape in ((9,), (6, 7), (4, 5, 5)):
        sites = (torch.rand(2, *shape) < 0.3).nonzero().int()
        call = functools.partial(_example_call, name, sites, shape)
        x, kernel = torch.randn(len(sites), 5), (3,) * len(shape)
        if name in _POOLS:
            yield dispatch.Example(call, (x,))
            continue
        yield dispatch.Example(call, (x, torch.randn(6, *kernel, 5), torch.randn(6)))
        if name != "inverse_conv":
            yield dispatch.Example(call, (x, torch.randn(5, *kernel, 1), torch.randn(5)))


def _example_call(name: str, sites: Tensor, shape: tuple[int, ...], x: Tensor, *weights: Tensor) -> Tensor:
    grid = SparseConvTensor(x, sites, shape, 2)
    groups = x.shape[1] if weights and weights[0].shape[-1] == 1 else 1
    if name in _POOLS:
        result = _POOLS[name](grid, 3, stride=2, padding=1)
    elif name == "subm_conv":
        result = subm_conv(grid, *weights, groups=groups)
    elif name == "sparse_conv":
        result = sparse_conv(grid, *weights, stride=2, padding=1, groups=groups)
    else:
        ones = x.new_ones(5, *weights[0].shape[1:-1], 5)
        there = sparse_conv(grid, ones, stride=2, padding=1)
        result = inverse_conv(there, *weights, fine=grid, stride=2, padding=1)
    return cast(Tensor, result.features)


_POOLS = {"sparse_max_pool": sparse_max_pool, "sparse_avg_pool": sparse_avg_pool}
for _name in ("subm_conv", "sparse_conv", "inverse_conv", *_POOLS):
    _pools = _name in _POOLS
    dispatch.register(
        _name,
        plan=_explain_pool if _pools else _explain,
        examples=functools.partial(_examples, _name),
    )
