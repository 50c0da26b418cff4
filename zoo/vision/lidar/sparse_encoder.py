"""A SECOND-like encoder (Yan et al. 2018) on the sparse-op core: submanifold and strided 3D convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.shared.measure.account import Counting, Macs, register_counter
from zoo.shared.ops.rulebook import Rulebook, conv_rulebook, submanifold_rulebook
from zoo.shared.ops.sparse_conv import sparse_conv, subm_conv
from zoo.shared.ops.sparse_tensor import SparseConvTensor
from zoo.vision.lidar.voxelise import NORM

# Strided convolutions halve z and leave x and y as they are.
_DOWN: dict[str, Any] = {"stride": (2, 1, 1), "padding": (0, 0, 0)}


class SparseConvolution(nn.Module):
    """A 3D convolution on sites, batch norm, ReLU: submanifold 3x3x3, or 2x1x1 with stride 2 along z."""

    def __init__(self, inputs: int, outputs: int, down: bool = False) -> None:
        super().__init__()
        self.down = down
        self.kernel = (2, 1, 1) if down else (3, 3, 3)
        self.shape = (outputs, *self.kernel, inputs)
        # The offsets as one dimension: formats of memory for images do not apply.
        self.weight = nn.Parameter(torch.empty(outputs, math.prod(self.kernel), inputs))
        nn.init.normal_(self.weight, std=math.sqrt(2 / (inputs * math.prod(self.kernel))))
        self.norm = nn.BatchNorm1d(outputs, **NORM)

    def rulebook(self, x: SparseConvTensor) -> Rulebook:
        """The pairs of the convolution of x (made once per set of sites and shared by the layers)."""
        place = (x.indices, x.spatial_shape, x.batch_size, self.kernel)
        return conv_rulebook(*place, **_DOWN) if self.down else submanifold_rulebook(*place)

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        book = self.rulebook(x)
        if self.down:
            out = sparse_conv(x, self.weight.view(self.shape), rulebook=book, **_DOWN)
        else:
            out = subm_conv(x, self.weight.view(self.shape), rulebook=book)
        return out.replace_feature(torch.relu(self.norm(out.features)))


def _macs(
    module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], _output: Any, counting: Counting
) -> Macs:
    """One product with a weight per pair of sites at its offset."""
    layer = cast(SparseConvolution, module)
    pairs, offsets = layer.rulebook(args[0]).forward, layer.weight.shape[1]
    segments = torch.arange(len(pairs.start) - 1) % offsets
    counts = torch.zeros(offsets, dtype=torch.int64).index_add(0, segments, pairs.start.diff().cpu())
    return counting.pairs(layer.weight.transpose(0, 1), counts.tolist())


register_counter(SparseConvolution, _macs)


class SparseEncoder(nn.Module):
    """Stages of submanifold convolutions, z halved between stages.

    Args:
        size: voxels along x, y, z.
        inputs: features of a voxel.
        widths: channels per stage.
        layers: submanifold convolutions per stage.
    """

    def __init__(self, size: Sequence[int], inputs: int, widths: Sequence[int], layers: int = 2) -> None:
        super().__init__()
        if size[2] % 2 ** (len(widths) - 1) or layers < 1 or not widths:
            raise ConfigError(
                f"{len(widths)} stages halve z {len(widths) - 1} times: {size[2]} voxels do not divide; "
                f"choose another voxel height or fewer stages"
            )
        self.size = (size[0], size[1], size[2] // 2 ** (len(widths) - 1))
        self.shape = tuple(size[::-1])
        stages: list[nn.Module] = []
        for stage, width in enumerate(widths):
            if stage:
                stages.append(SparseConvolution(inputs, width, down=True))
                inputs = width
            for _ in range(layers):
                stages.append(SparseConvolution(inputs, width))
                inputs = width
        self.layers = nn.Sequential(*stages)
        self.width = inputs

    def forward(
        self, x: Float[Tensor, "voxels width"], coords: Int64[Tensor, "voxels 4"], batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Features and (batch, z, y, x) of the last stage's sites."""
        out = self.layers(SparseConvTensor(x, coords.int().contiguous(), self.shape, batch_size))
        return out.features, out.indices.long()
