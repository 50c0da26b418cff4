"""timm's convnets as SparK encoders; timm is optional (`pip install 'sparse-model-zoo[vision]'`)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.optional import import_timm
from zoo.vision.spark.encoder import Trunk
from zoo.vision.spark.masking import MaskContext

STAGES = 4  # the paper takes the maps at strides 4 to 32


def timm_trunk(model: nn.Module) -> Trunk:
    """The feature maps of a timm network: the last module at each of its last four strides.

    Raises:
        ConfigError: it names no maps.
    """
    last: dict[int, str] = {}
    for entry in _entries(model):
        last[int(entry["reduction"])] = str(entry["module"])
    if len(last) < 2:
        raise ConfigError(f"{type(model).__name__} names fewer than two feature maps in its feature_info")
    stages = tuple(last[stride] for stride in sorted(last)[-STAGES:])
    layered = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    return Trunk(_features, stages, "layer" if layered else "batch", _head(model))


def _entries(model: Any) -> list[dict[str, Any]]:
    info = model.feature_info
    return list(info) if isinstance(info, list) else [info[i] for i in range(len(info))]


def _features(model: Any, x: Tensor) -> object:
    return model.forward_features(x)


def _head(model: Any) -> tuple[str, ...]:
    classifier = getattr(model, "default_cfg", {}).get("classifier", "fc")
    names = classifier if isinstance(classifier, (list, tuple)) else [classifier]
    return (*(f"{name.partition('.')[0]}." for name in names), "global_pool.")


def replacements() -> Mapping[type[nn.Module], type[nn.Module]]:
    """Visible counterparts of timm's own layers, by exact type."""
    import_timm()
    layers: Any = importlib.import_module("timm.layers")
    convnext: Any = importlib.import_module("timm.models.convnext")

    class VisibleBatchNormAct2d(layers.BatchNormAct2d):
        """Norm and activation over visible sites."""

        context: MaskContext

        def forward(self, x: Tensor) -> Tensor:
            visible = self.context.visible
            if visible.rows or visible.mode == "plain":
                return super().forward(x)
            return visible.scatter(super().forward(visible.gather(x)))

    class VisibleLayerNorm2d(layers.LayerNorm2d):
        """Norm over the channels of visible sites."""

        context: MaskContext

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            visible = self.context.visible
            return y * visible.plane(y.shape[-2], y.shape[-1]) if visible.mode == "masked" else y

    class VisibleConvNeXtBlock(convnext.ConvNeXtBlock):
        """The block's norm and perceptron give hidden sites a bias, which goes before the next block."""

        context: MaskContext

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            visible = self.context.visible
            return y * visible.plane(y.shape[-2], y.shape[-1]) if visible.mode == "masked" else y

    class VisibleDropPath(layers.DropPath):
        """Drops a branch for whole images, also where features are rows of sites."""

        context: MaskContext

        def forward(self, x: Tensor) -> Tensor:
            visible = self.context.visible
            if not visible.rows:
                return super().forward(x)
            scale = super().forward(x.new_ones(visible.cells.shape[0], 1, 1, 1))
            return x * scale[visible.sites_of(x).indices[:, 0].long()]

    return {
        layers.BatchNormAct2d: VisibleBatchNormAct2d,
        layers.LayerNorm2d: VisibleLayerNorm2d,
        convnext.ConvNeXtBlock: VisibleConvNeXtBlock,
        layers.DropPath: VisibleDropPath,
    }
