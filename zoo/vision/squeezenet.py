"""SqueezeNet v1.0 (Iandola et al. 2016), and how the one of Deep Compression (Han et al. 2016) is read.

The published file holds, for each of its 26 layers, how many weights are not zero, a codebook of 256 values,
the biases, one code per weight that is not zero, and how far each lies behind the one before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import DataError
from zoo.vision.models import Classifier

# (squeezed channels, channels of each of the two expansions) of fire2 to fire9
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


class Fire(nn.Module):
    """1x1 convolutions that squeeze the channels, then 1x1 and 3x3 ones side by side."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    @no_type_check  # fx traces it with proxies
    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        x = self.squeeze1x1(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


class SqueezeNet(Classifier):
    """SqueezeNet v1.0: a 7x7 convolution, eight `Fire` modules, a 1x1 convolution to the classes, the mean.

    Takes RGB images of 227 pixels in 0..255 minus (123, 117, 104), as Caffe's networks do but for the order
    of the colours.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.

    Args:
        classes: of the output.
    """

    full_precision: ClassVar[bool] = True

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.arguments = {"classes": classes}
        self.conv1 = nn.Conv2d(3, 96, 7, 2)
        inputs = 96
        for index, (squeezed, expanded) in enumerate(FIRES):
            self.add_module(f"fire{index + 2}", Fire(inputs, squeezed, expanded))
            inputs = 2 * expanded
        self.conv10 = nn.Conv2d(
            inputs, classes, 1, padding=1
        )  # the padding is Caffe's, and counts in the mean
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    @no_type_check  # fx traces it with proxies
    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B classes"]:
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.fire4(self.fire3(self.fire2(x))))
        x = self.pool(self.fire8(self.fire7(self.fire6(self.fire5(x)))))
        return self.conv10(self.fire9(x)).relu().mean((2, 3))


def read_deep_compression(path: Path) -> SqueezeNet:
    """The network of `compressed_SqueezeNet.net`, its zeros where the file has no weight.

    Raises:
        DataError: the file is shorter or longer than its own counts say.
    """
    model = SqueezeNet()
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    stored, place = np.fromfile(path, np.uint8), 4 * len(layers)
    counts = stored[:place].view("<u4").tolist()

    def take(count: int, dtype: str) -> np.ndarray:
        nonlocal place
        size = count * np.dtype(dtype).itemsize
        if place + size > len(stored):
            raise DataError(f"{path} ends after {len(stored)} bytes, within a layer: fetch it again")
        part, place = stored[place : place + size].copy().view(dtype), place + size
        return part

    with torch.no_grad():
        for layer, count in zip(layers, counts, strict=True):
            codebook, bias = take(256, "<f4"), take(layer.out_channels, "<f4")
            codes, packed = take(count, "u1"), take(-(-count // 2), "u1")
            gaps = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:count].astype(int)
            values = np.zeros(layer.weight.numel(), np.float32)
            where = np.cumsum(gaps + 1) - 1
            if count and where[-1] >= len(values):
                raise DataError(f"{path} has a weight behind the end of its layer: fetch it again")
            values[where] = codebook[codes]
            layer.weight.copy_(torch.from_numpy(values).view_as(layer.weight))
            layer.bias = nn.Parameter(torch.from_numpy(bias))
        model.conv1.weight.copy_(model.conv1.weight[:, [2, 1, 0]].clone())  # from BGR
    if place != len(stored):
        raise DataError(f"{path} has {len(stored) - place} bytes behind its last layer: fetch it again")
    return model.eval()
