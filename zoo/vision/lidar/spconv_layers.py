"""Sparse convolutions as modules with spconv's names, and its checkpoints.

    net = nn.Sequential(SubMConv3d(4, 16, 3), SparseConv3d(16, 32, 3, stride=2, padding=1))
    load_spconv_state(net, torch.load(path, weights_only=True))

spconv has stored weights in three orders of dimensions: KRSC [out, *kernel, in] since 2.2 and here, RSCK
[*kernel, in, out] in 1.x and RSKC [*kernel, out, in] in between. Where the shape does not tell them apart,
with as many channels out as in, the order must be given; to guess would transpose the weight without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.shared.ops.sparse_conv import sparse_conv, subm_conv

Layout = Literal["KRSC", "RSCK", "RSKC"]


class _SparseConvolution(nn.Module):
    """What the classes below share.

    Args:
        in_channels, out_channels: of the features.
        kernel_size: one size, or one for each dimension.
        stride, padding: of `SparseConv`; a submanifold convolution has neither.
        dilation: between the taps.
        bias: whether there is one.
        indice_key: taken and not needed: rulebooks are found by the sites' content.

    Under autocast the product is computed in the weight's precision.
    """

    dims: int
    submanifold: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        indice_key: str | None = None,
    ) -> None:
        super().__init__()
        kernel = (kernel_size,) * self.dims if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != self.dims:
            raise ConfigError(f"kernel_size has {len(kernel)} numbers for {self.dims} dimensions")
        self.geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        self.weight = nn.Parameter(torch.empty(out_channels, *kernel, in_channels))
        bound = 1 / math.sqrt(in_channels * math.prod(kernel))
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Any) -> Any:
        """The convolution of a `SparseConvTensor`, or of spconv's."""
        if x.features.dtype != self.weight.dtype:
            x = x.replace_feature(x.features.to(self.weight.dtype))
        if self.submanifold:
            return subm_conv(x, self.weight, self.bias, dilation=self.geometry["dilation"])
        return sparse_conv(x, self.weight, self.bias, **self.geometry)


class SubMConv2d(_SparseConvolution):
    """Submanifold convolution on sites of a plane."""

    dims, submanifold = 2, True


class SubMConv3d(_SparseConvolution):
    """Submanifold convolution on sites of a volume."""

    dims, submanifold = 3, True


class SparseConv2d(_SparseConvolution):
    """Sparse convolution on sites of a plane."""

    dims, submanifold = 2, False


class SparseConv3d(_SparseConvolution):
    """Sparse convolution on sites of a volume."""

    dims, submanifold = 3, False


def load_spconv_state(model: nn.Module, state: Mapping[str, Tensor], layout: Layout | None = None) -> None:
    """Load a state dict of spconv's into a model of the modules above and others.

    Args:
        model: whose names are those of the state dict.
        state: names and tensors.
        layout: of the weights of sparse convolutions; None reads it off their shapes.

    Raises:
        ConfigError: a weight that fits no order, or several of them.
        RuntimeError: names or other shapes that do not fit, from torch.
    """
    ours = dict(state)
    for name, module in model.named_modules():
        own = f"{name}.weight" if name else "weight"
        if isinstance(module, _SparseConvolution) and own in ours:
            ours[own] = _as_krsc(own, ours[own], tuple(module.weight.shape), layout)
    model.load_state_dict(ours)


def _as_krsc(name: str, weight: Tensor, wanted: tuple[int, ...], layout: Layout | None) -> Tensor:
    out, *kernel, inner = wanted
    shapes = {"KRSC": wanted, "RSCK": (*kernel, inner, out), "RSKC": (*kernel, out, inner)}
    fitting = [key for key, shape in shapes.items() if tuple(weight.shape) == shape and layout in (None, key)]
    if not fitting:
        raise ConfigError(
            f"{name} is {list(weight.shape)}; a sparse convolution of {inner} to {out} channels has one of "
            f"{ {key: list(shape) for key, shape in shapes.items()} }"
        )
    read = {"KRSC": lambda w: w, "RSCK": lambda w: w.movedim(-1, 0), "RSKC": lambda w: w.movedim(-2, 0)}
    found = [read[key](weight) for key in fitting]
    if any(not torch.equal(found[0], other) for other in found[1:]):
        raise ConfigError(
            f"{name} is {list(weight.shape)}, which fits {' and '.join(fitting)}: say which with layout="
        )
    return found[0].contiguous()
