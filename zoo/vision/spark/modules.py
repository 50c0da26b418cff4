"""Layers that compute on visible sites: subclasses of the plain ones with the same parameters and names.

`convert` swaps the layers of a network for these by exact type. A layer reads the visible cells from its
`MaskContext` and obeys their mode (`masking.Mode`). With rows, every visible site is a picture of 1x1: layer
norms, activations and pointwise layers then need no change at all, and what a norm averages over are the
visible sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.shared.ops.sparse_conv import sparse_avg_pool, sparse_conv, sparse_max_pool
from zoo.vision.models import PadShortcut
from zoo.vision.spark.masking import MaskContext, Visible, as_rows


def _masked(y: Tensor, visible: Visible) -> Tensor:
    return y * visible.plane(y.shape[-2], y.shape[-1])


class VisibleConv2d(nn.Conv2d):
    """y = conv(x) at visible sites, zero elsewhere; over pairs of sites that is a submanifold convolution
    (strided ones compute at the visible sites of the coarser map)."""

    context: MaskContext
    site_name: str

    def forward(self, x: Tensor) -> Tensor:
        visible = self.context.visible
        if visible.mode == "plain":
            return super().forward(x)
        if visible.mode == "masked":
            return _masked(super().forward(x), visible)
        if self.is_pointwise:
            return as_rows(F.linear(x.flatten(1), self.weight.flatten(1), self.bias))
        if self.has_pairs and visible.over_pairs(self.site_name):
            sites = visible.tensor(x)
            rulebook = visible.rulebook(visible.sites_of(x), self)
            weight = self.weight.permute(0, 2, 3, 1)
            out = sparse_conv(sites, weight, self.bias, groups=self.groups, rulebook=rulebook)
            return as_rows(out.features)
        return visible.gather(super().forward(visible.scatter(x)))

    @property
    def is_pointwise(self) -> bool:
        """Whether each site is for itself."""
        return self.kernel_size == self.stride == (1, 1) and self.groups == 1 and self.padding == (0, 0)

    @property
    def has_pairs(self) -> bool:
        """Whether there are kernels over pairs: for one group or as many as channels, and zero padding."""
        return (
            self.groups in (1, self.in_channels)
            and (self.groups == 1 or self.in_channels == self.out_channels)
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
        )


class VisibleBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics, running ones too, are those of the visible sites."""

    context: MaskContext

    def forward(self, x: Tensor) -> Tensor:
        visible = self.context.visible
        if visible.mode == "plain":
            return super().forward(x)
        rows = x if visible.rows else visible.gather(x)
        normed = as_rows(super().forward(rows.flatten(1)))
        return normed if visible.rows else visible.scatter(normed)

    def _check_input_dim(self, input: Tensor) -> None:
        """A matrix of sites and channels is as good as a map, and twice as fast."""


class VisibleLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each visible site of a map [B, C, h, w]."""

    context: MaskContext

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        visible = self.context.visible
        return _masked(y, visible) if visible.mode == "masked" else y


class VisibleMaxPool2d(nn.MaxPool2d):
    """The largest visible value of each window; what is hidden is no zero that could win."""

    context: MaskContext

    def forward(self, x: Tensor) -> Tensor:
        visible = self.context.visible
        if visible.mode == "plain":
            return super().forward(x)
        if visible.mode == "masked":
            return _masked(self._of_map(x, visible), visible)
        if visible.mode == "pairs":
            rulebook = visible.rulebook(visible.sites_of(x), self)
            kernel = _square(self.kernel_size)
            return as_rows(sparse_max_pool(visible.tensor(x), kernel, rulebook=rulebook).features)
        return visible.gather(self._of_map(visible.scatter(x), visible))

    def _of_map(self, x: Tensor, visible: Visible) -> Tensor:
        lowest = torch.finfo(x.dtype).min
        return super().forward(x.masked_fill(~visible.plane(x.shape[-2], x.shape[-1]), lowest))


class VisibleAvgPool2d(nn.AvgPool2d):
    """The mean over the visible sites of each window."""

    context: MaskContext

    def forward(self, x: Tensor) -> Tensor:
        visible = self.context.visible
        if visible.mode == "plain":
            return super().forward(x)
        if visible.mode == "masked":
            return _masked(self._of_map(x, visible), visible)
        if visible.mode == "pairs" and not self.ceil_mode:
            dilated = _Geometry(self.kernel_size, self.stride, self.padding)
            rulebook = visible.rulebook(visible.sites_of(x), dilated)
            kernel = _square(self.kernel_size)
            return as_rows(sparse_avg_pool(visible.tensor(x), kernel, rulebook=rulebook).features)
        return visible.gather(self._of_map(visible.scatter(x), visible))

    def _of_map(self, x: Tensor, visible: Visible) -> Tensor:
        plane = visible.plane(x.shape[-2], x.shape[-1]).to(x.dtype)
        shares = super().forward(plane)  # of the window that is visible, in the divisor's own count
        return super().forward(x) / shares.masked_fill(shares == 0, 1)


class VisiblePadShortcut(PadShortcut):
    """The parameter-free shortcut of the CIFAR ResNets."""

    context: MaskContext

    def forward(self, x: Tensor) -> Tensor:
        visible = self.context.visible
        if not visible.rows:
            return super().forward(x)
        fewer = visible.strided(x, self.stride)
        return F.pad(fewer, (0, 0, 0, 0, self.before, self.after))


class _Geometry:
    """A pooling layer's geometry where the layer has no dilation."""

    def __init__(self, kernel_size: Any, stride: Any, padding: Any) -> None:
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, 1


def _square(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


#: What `convert` replaces, by exact type.
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: VisibleConv2d,
    nn.BatchNorm2d: VisibleBatchNorm2d,
    nn.MaxPool2d: VisibleMaxPool2d,
    nn.AvgPool2d: VisibleAvgPool2d,
    PadShortcut: VisiblePadShortcut,
}

_HANDLED = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.MaxPool2d, nn.AvgPool2d)
_MIXING = (
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.ConvTranspose2d,
    nn.MultiheadAttention,
    nn.Upsample,
    nn.LocalResponseNorm,
)
_SQUEEZES = (
    "SEModule",
    "SqueezeExcite",
    "SqueezeExciteCl",
    "EffectiveSEModule",
    "EcaModule",
    "CecaModule",
    "CbamModule",
    "GlobalContext",
    "GatherExcite",
    "GlobalResponseNorm",
    "GlobalResponseNormMlp",
)


def check_layers(module: nn.Module, more: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Refuse a part of a network that `convert` could not make see visible sites only.

    Raises:
        ConfigError: a layer that mixes visible and hidden sites and has no visible counterpart.
    """
    for name, layer in module.named_modules():
        _refuse(name, layer, {**REPLACEMENTS, **more})


def convert(module: nn.Module, context: MaskContext, more: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Swap the layers below `module`, in place, for those that see visible sites only.

    Args:
        module: the part of a network that makes its feature maps; see `check_layers`.
        context: shared by all layers of the encoder.
        more: further replacements by exact type; each a subclass of what it replaces.
    """
    table = {**REPLACEMENTS, **more}
    for name, layer in module.named_modules():
        if type(layer) in table:
            # One of a subclass, where it is: parameters, buffers and hooks stay.
            layer.__class__ = table[type(layer)]
            layer.context = context
            layer.site_name = name


def _refuse(name: str, layer: nn.Module, table: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    kind = type(layer)
    if kind in table:
        return
    where = f"layer {name!r} is a {kind.__name__}"
    if isinstance(layer, _MIXING) or kind.__name__ in _SQUEEZES:
        raise ConfigError(
            f"{where}, which averages over hidden sites too, so SparK cannot train it; take a network "
            "without squeeze-and-excitation, group norm or global pooling inside (a ResNet or ConvNeXt)"
        )
    if isinstance(layer, _HANDLED):
        raise ConfigError(
            f"{where}, a subclass of a layer that is replaced by exact type: what it adds would be lost; "
            "take a network with plain layers"
        )
