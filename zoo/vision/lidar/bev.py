"""From sparse columns to a bird's-eye-view map, and the residual 2D backbone on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.vision.lidar.voxelise import NORM


def scatter_bev(
    x: Float[Tensor, "voxels width"],
    coords: Int64[Tensor, "voxels 4"],
    size: Sequence[int],
    batch_size: int,
) -> Float[Tensor, "batch channels ny nx"]:
    """Voxels on a dense map, the features of a column's voxels one after another by rising z.

    Args:
        x: features.
        coords: (batch, z, y, x), distinct.
        size: voxels of the grid along x, y, z.
        batch_size: number of frames.
    """
    nx, ny, nz = size
    if x.shape[0] != coords.shape[0]:
        raise DataError(f"{x.shape[0]} features for {coords.shape[0]} voxels; pass those of one set")
    cell = ((coords[:, 0] * ny + coords[:, 2]) * nx + coords[:, 3]) * nz + coords[:, 1]
    bev = x.new_zeros(batch_size * ny * nx * nz, x.shape[1]).index_copy(0, cell, x)
    # Channels last in memory: what convolutions on processors like best, and no copy.
    return bev.view(batch_size, ny, nx, nz * x.shape[1]).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, which is a convolution where `project`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, project: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs, **NORM)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, **NORM)
        self.downsample_layer = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs, **NORM))
            if project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample_layer is None else self.downsample_layer(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + shortcut)


@dataclass(frozen=True)
class BEVConfig:
    """The 2D backbone; per level, named as OpenPCDet's keys in lower case.

    Attributes:
        layer_nums: residual blocks after the first, strided one.
        layer_strides: strides of the levels.
        num_filters: widths of the levels.
        upsample_strides: by which a level is enlarged (below 1: reduced) before all are concatenated.
        num_upsample_filters: widths after that.
    """

    layer_nums: tuple[int, ...] = (1, 2, 2)
    layer_strides: tuple[int, ...] = (1, 2, 2)
    num_filters: tuple[int, ...] = (128, 128, 256)
    upsample_strides: tuple[float | int, ...] = (1, 2, 4)
    num_upsample_filters: tuple[int, ...] = (128, 128, 128)

    def __post_init__(self) -> None:
        names = ("layer_nums", "layer_strides", "num_filters", "upsample_strides", "num_upsample_filters")
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) != 1 or not self.layer_nums:
            raise ConfigError(f"the levels of the 2D backbone differ in number: {lengths}")
        total = 1.0
        scales = []
        for stride, up in zip(self.layer_strides, self.upsample_strides, strict=True):
            total *= stride
            scales.append(total / up)
        if max(scales) - min(scales) > 1e-6:
            raise ConfigError(
                f"strides {self.layer_strides} and upsample_strides {self.upsample_strides} give maps of "
                "different size; each level's product of strides over its upsample stride must be equal"
            )

    @property
    def stride(self) -> int:
        """Stride of the output map."""
        return round(self.layer_strides[0] / self.upsample_strides[0])


class BEVBackbone(nn.Module):
    """Levels of residual blocks, each brought to one resolution and concatenated (BaseBEVResBackbone)."""

    def __init__(self, config: BEVConfig, inputs: int) -> None:
        super().__init__()
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        levels = zip(
            config.layer_nums,
            config.layer_strides,
            config.num_filters,
            config.upsample_strides,
            config.num_upsample_filters,
            strict=True,
        )
        for extra, stride, width, up, out in levels:
            blocks = [ResidualBlock(inputs, width, stride, project=True)]
            self.blocks.append(nn.Sequential(*blocks, *(ResidualBlock(width, width) for _ in range(extra))))
            conv: nn.Module
            if up >= 1:
                conv = nn.ConvTranspose2d(width, out, int(up), int(up), bias=False)
            else:
                conv = nn.Conv2d(width, out, round(1 / up), round(1 / up), bias=False)
            self.deblocks.append(nn.Sequential(conv, nn.BatchNorm2d(out, **NORM), nn.ReLU()))
            inputs = width
        self.width = sum(config.num_upsample_filters)

    def forward(self, x: Float[Tensor, "batch channels ny nx"]) -> Float[Tensor, "batch width *map"]:
        levels = []
        for block, up in zip(self.blocks, self.deblocks, strict=True):
            x = block(x)
            levels.append(up(x))
        return torch.cat(levels, 1)
