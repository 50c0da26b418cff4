"""Layers whose forward and backward products use different sparse copies of one dense weight (BDWP).

A layer multiplies its weight twice: with the inputs going forward, with the gradients of the outputs going
back. N:M hardware saves work only where zeros lie along the axis that a product sums over, which is the input
axis forward and the output axis backward; so each product gets its own mask of the same weight. The weight's
own gradient is dense and goes to all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...errors import MaskError, PatternError
from ...masks import MaskSet
from ...masks.patterns import NM
from ..gates.base import WeightGate, harden


class _TwoWeights(torch.autograd.Function):
    """y from w_forward, dx from w_backward, dw as for a dense layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, w_forward: Tensor, w_backward: Tensor, convolution: Any
    ) -> Tensor:
        ctx.save_for_backward(x, w_backward)
        ctx.convolution = convolution
        if convolution is None:
            return F.linear(x, w_forward)
        return F.conv2d(x, w_forward, None, *convolution)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        (grad,) = grads
        x, w_backward = ctx.saved_tensors
        if ctx.convolution is None:
            dx = grad @ w_backward
            dw = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            return dx, dw, None, None, None
        stride, padding, dilation, groups = ctx.convolution
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad, x, w_backward, None, stride, padding, dilation, False, [0, 0], groups, (True, True, False)
        )
        return dx, dw, None, None, None


def two_weights(
    x: Float[Tensor, ...],
    weight: Float[Tensor, ...],
    keep_forward: Bool[Tensor, ...],
    keep_backward: Bool[Tensor, ...],
    convolution: tuple[Any, ...] | None = None,
) -> Float[Tensor, ...]:
    """A product whose forward pass uses keep_forward * w and whose input gradient uses keep_backward * w.

    The gradient of `weight` is the dense dy^T x, whatever the masks are. It is biased on purpose; finite
    differences do not agree with it.

    Args:
        x: inputs, [..., in] or [B, I, H, W].
        weight: dense, [out, in] or [O, I / groups, kh, kw].
        keep_forward, keep_backward: masks of the weight's shape.
        convolution: (stride, padding, dilation, groups) of a two-dimensional one; None for a linear layer.
    """
    w = weight.detach()
    return _TwoWeights.apply(x, weight, w * keep_forward, w * keep_backward, convolution)


class _ForwardMask(WeightGate):
    """What hardening folds into the weight of a `Bidirectional` layer: its forward mask."""

    def __init__(self, pattern: NM) -> None:
        super().__init__()
        self.pattern = pattern

    def keep(self, weight: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        return self.pattern.keep(weight.detach().abs(), 0)

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return weight if self.training else weight * self.keep(weight)


class Bidirectional(nn.Module):
    """A linear or convolution layer trained with n:m weights along the inputs forward, along the outputs
    backward. Made by `make_bidirectional`; both masks follow the magnitudes of the dense weight at each
    step."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, n: int, m: int) -> None:
        super().__init__()
        self.layer = layer
        self.forward_pattern, self.backward_pattern = NM(n, m, dim=1), NM(n, m, dim=0)
        for pattern in (self.forward_pattern, self.backward_pattern):
            pattern.check_shape(tuple(layer.weight.shape))

    @property
    def weight(self) -> Tensor:
        """The dense weight, whose dtype some networks (T5) look up before they call the layer."""
        return self.layer.weight

    @property
    def bias(self) -> None:
        """Raises MaskError: a network that asks (Mamba) computes the layer's product by itself."""
        raise MaskError(
            "a network that multiplies by a layer's weight and adds its bias without calling the layer would "
            "train it densely; sr-ste and pgf mask the weight itself"
        )

    def forward(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        layer, magnitude = self.layer, self.layer.weight.detach().abs()
        keep = self.forward_pattern.keep(magnitude, 0)
        convolution = None
        if isinstance(layer, nn.Conv2d):
            convolution = (layer.stride, layer.padding, layer.dilation, layer.groups)
        y = two_weights(x, layer.weight, keep, self.backward_pattern.keep(magnitude, 0), convolution)
        if layer.bias is None:
            return y
        return y + (layer.bias if convolution is None else layer.bias.view(-1, 1, 1))


def make_bidirectional(model: nn.Module, names: Iterable[str], n: int, m: int) -> list[Bidirectional]:
    """Replace the layers of these weights by `Bidirectional` ones, in place, until `finish_bidirectional`.

    Raises:
        MaskError: a weight that is not that of a linear or a two-dimensional convolution layer.
        PatternError: m divides one of the two axes not.
    """
    made = []
    for name in names:
        path, _, attribute = name.rpartition(".")
        layer = model.get_submodule(path)
        if attribute != "weight" or not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise MaskError(f"{name!r} is not the weight of a Linear or a Conv2d, so it has no two products")
        try:
            module = Bidirectional(layer, n, m)
        except PatternError as error:
            raise PatternError(f"{name!r}: {error}") from None
        _replace(model, path, module)
        made.append(module)
    return made


def finish_bidirectional(model: nn.Module) -> MaskSet:
    """Put the plain layers back, with their forward masks folded in; the model carries them."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Bidirectional):
            _replace(model, path, module.layer)
            nn.utils.parametrize.register_parametrization(
                module.layer, "weight", _ForwardMask(module.forward_pattern)
            )
    return harden(model)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
