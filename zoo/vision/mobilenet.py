"""MobileNet-v1 (Howard et al. 2017), whose 1x1 convolutions hold nearly all weights and operations."""

from __future__ import annotations

import copy
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.shared.structure.averaging import recalibrate_norms
from zoo.shared.structure.folding import fold_norms
from zoo.shared.structure.relatives import seeded
from zoo.vision.models import Classifier

# (channels at width 1, stride) of each depthwise-separable block
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)


class MobileNetV1(Classifier):
    """A 3x3 convolution and 13 pairs of a depthwise 3x3 and a pointwise 1x1 convolution, each with batch norm
    and ReLU.

    Args:
        width: factor of all channels, which are rounded to multiples of 8.
        classes: of the output.
        channels: of the input.
        stem_stride: 2 as published; 1 for images of 32 pixels.
    """

    def __init__(
        self, width: float = 1.0, classes: int = 1000, channels: int = 3, stem_stride: int = 2
    ) -> None:
        super().__init__()
        if width <= 0 or stem_stride not in (1, 2):
            raise ConfigError(
                f"MobileNet needs a positive width and a stem stride of 1 or 2; received {width} and "
                f"{stem_stride}"
            )
        self.arguments = {
            "width": width,
            "classes": classes,
            "channels": channels,
            "stem_stride": stem_stride,
        }
        inputs = _channels(32, width)
        layers: list[nn.Module] = _convolution(channels, inputs, 3, stem_stride, 1)
        for base, stride in BLOCKS:
            outputs = _channels(base, width)
            layers += _convolution(inputs, inputs, 3, stride, inputs)
            layers += _convolution(inputs, outputs, 1, 1, 1)
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(inputs, classes)

    @no_type_check  # fx traces it with proxies
    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        return self.linear(self.features(x).mean((2, 3)))

    def wider(self, factor: float | int) -> MobileNetV1:
        return MobileNetV1(**{**self.arguments, "width": self.arguments["width"] * factor})


def _channels(base: int, width: float | int) -> int:
    return max(8, round(base * width / 8) * 8)


def _convolution(inputs: int, outputs: int, size: int, stride: int, groups: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def norms_folded(model: nn.Module) -> Any:
    """A copy for inference whose batch norms are folded into the convolutions before them, which scales each
    row of a weight and so keeps its zeros."""
    return fold_norms(copy.deepcopy(model).eval()).requires_grad_(False)


def random_example(side: int, seed: int = 0) -> tuple[MobileNetV1, Tensor]:
    """An untrained MobileNet-v1 in eval mode whose norms have seen one batch, and an image: for timings."""
    with seeded(seed):
        model, image = MobileNetV1(), torch.randn(1, 3, side, side)
        # Without statistics that fit, a fresh network's outputs all but vanish.
        recalibrate_norms(model, [torch.randn(2, 3, side, side)])
    return model.eval(), image
