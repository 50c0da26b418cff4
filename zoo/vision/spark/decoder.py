"""From the maps of visible sites back to whole images: densify, and a light U-Net (SparK, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.vision.spark.encoder import NormKind
from zoo.vision.spark.masking import MaskContext, Visible
from zoo.vision.spark.modules import VisibleBatchNorm2d, VisibleLayerNorm


class Densify(nn.Module):
    """Fills the hidden sites of one map with a learned token and projects it to the decoder's width.

    Args:
        inputs: channels of the map.
        outputs: channels of the decoder there.
        norm: of the visible sites.
        kernel: of the projection; 1 for the coarsest map, 3 for the others.
        context: of the encoder.
    """

    def __init__(self, inputs: int, outputs: int, norm: NormKind, kernel: int, context: MaskContext) -> None:
        super().__init__()
        self.norm = VisibleBatchNorm2d(inputs) if norm == "batch" else VisibleLayerNorm(inputs, eps=1e-6)
        self.norm.context = context
        self.token = nn.Parameter(torch.zeros(1, inputs, 1, 1))
        nn.init.trunc_normal_(self.token, std=0.02, a=-0.02, b=0.02)
        same = kernel == 1 and inputs == outputs
        self.proj = nn.Identity() if same else nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, visible: Visible) -> Float[Tensor, "B D h w"]:
        normed = self.norm(x)
        full = visible.scatter(normed) if visible.rows else normed
        filled = torch.where(visible.plane(*full.shape[-2:]), full, self.token.to(full.dtype))
        return self.proj(filled)


class UpBlock(nn.Module):
    """Twice the resolution and half the width."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 4, 2, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E H W"]:
        return self.conv(self.up(x))


class LightDecoder(nn.Module):
    """A U-Net's way up: at each stride the densified map is added, then a block doubles the resolution.

    Args:
        widths, strides: of the encoder's maps, finest first.
        norm: of the encoder.
        width: of the decoder at the coarsest map; it halves with each block.
        channels: of the images.
        scales: how many maps are used, from the coarsest; 0 for all (1 is the paper's single-scale ablation).
        context: of the encoder.

    Raises:
        ConfigError: a width that cannot be halved so often, or a number of scales that there is not.
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        norm: NormKind,
        width: int,
        channels: int,
        scales: int,
        context: MaskContext,
    ) -> None:
        super().__init__()
        blocks = round(math.log2(strides[-1]))
        if width < 1 or width % 2**blocks:
            raise ConfigError(f"the decoder's width must be a multiple of {2**blocks}; received {width}")
        if not 0 <= scales <= len(widths):
            raise ConfigError(f"the encoder has {len(widths)} scales; received {scales}")
        used = scales or len(widths)
        self.densify = nn.ModuleList()
        for index, inputs in enumerate(reversed(widths[-used:] if used else widths)):
            self.densify.append(Densify(inputs, width >> index, norm, 1 if index == 0 else 3, context))
        self.blocks = nn.ModuleList(UpBlock(width >> i, width >> (i + 1)) for i in range(blocks))
        self.out = nn.Conv2d(width >> blocks, channels, 1)
        _initialise(self)

    def forward(self, maps: Sequence[Tensor], visible: Visible) -> Float[Tensor, "B C H W"]:
        """Images from the encoder's maps, finest first."""
        filled = [one(m, visible) for one, m in zip(self.densify, reversed(maps), strict=False)]
        x = filled[0]
        for index, block in enumerate(self.blocks, start=1):
            x = block(x)
            if index < len(filled):
                x = x + filled[index]
        return self.out(x)


def _initialise(decoder: nn.Module) -> None:
    """Convolutions from a normal of 0.02 cut at two deviations, transposed ones He's, biases zero."""
    for module in decoder.modules():
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
