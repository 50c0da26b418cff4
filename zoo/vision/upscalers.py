"""Super-resolution networks in the style of EDSR and SwinIR: small images [B, 3, h, w] in [0, 1] to images
`scale` times as large.

Both add what they compute to the bicubically enlarged input, which the originals do not; short trainings
start from bicubic quality that way.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.shared.structure.relatives import seeded
from zoo.shared.train.device import device_of


class Upscaler(nn.Module):
    """Base: features, a body with a long shortcut, pixel shuffle, and the enlarged input on top.

    Attributes:
        arguments: what the constructor was called with.
        scale: by which width and height grow.
    """

    arguments: dict[str, Any]

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        if width < 1 or scale not in (2, 3, 4):
            raise ConfigError(
                f"an upscaler needs a width of at least 1 and a scale of 2, 3 or 4; received "
                f"{width} and {scale}"
            )
        self.scale = scale
        self.conv_first = nn.Conv2d(3, width, 3, 1, 1)
        self.body: nn.Module = nn.Sequential()
        self.conv_after_body = nn.Conv2d(width, width, 3, 1, 1)
        self.conv_last = nn.Conv2d(width, 3 * scale**2, 3, 1, 1)
        nn.init.zeros_(self.conv_last.weight)  # starts as bicubic enlargement
        nn.init.zeros_(self.conv_last.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B 3 H W"]:
        features = self.conv_first(x)
        features = features + self.conv_after_body(self.body(features))
        large = F.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)
        return large + F.pixel_shuffle(self.conv_last(features), self.scale)

    def current_arguments(self) -> dict[str, Any]:
        """The arguments that build a model of the present shapes."""
        return dict(self.arguments)

    def fresh(self, seed: int) -> Upscaler:
        """The same network with new weights; the caller's random state is left alone."""
        with seeded(seed):
            fresh = type(self)(**self.arguments)
        return fresh.to(device_of(self))


class ResidualBlock(nn.Module):
    """Two convolutions without norm, with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return x + self.conv2(F.relu(self.conv1(x)))


class EDSR(Upscaler):
    """Residual blocks of two 3x3 convolutions (Lim et al. 2017).

    Args:
        blocks: how many.
        width: channels.
        scale: 2, 3 or 4.
    """

    def __init__(self, blocks: int = 8, width: int = 32, scale: int = 2) -> None:
        super().__init__(width, scale)
        self.arguments = {"blocks": blocks, "width": width, "scale": scale}
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))


class WindowBlock(nn.Module):
    """Attention inside windows and a feed-forward layer on [B, C, h, w] maps, each after a norm and with a
    shortcut. `shift` moves the windows by padding, so that neighbours differ from block to block."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        x = x + self._attend(x)
        tokens = x.movedim(1, -1)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(tokens)))).movedim(-1, 1)

    def _attend(self, x: Tensor) -> Tensor:
        batch, width, height, length = x.shape
        size, before = self.window, self.shift
        bottom, right = (-(height + before)) % size, (-(length + before)) % size
        padded = F.pad(x, (before, right, before, bottom), mode="replicate").movedim(1, -1)
        rows, columns = padded.shape[1] // size, padded.shape[2] // size
        windows = padded.view(batch, rows, size, columns, size, width).transpose(2, 3)
        tokens = self.norm1(windows.reshape(-1, size * size, width))
        qkv = self.qkv(tokens).view(len(tokens), size * size, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(tokens.shape)
        made = self.proj(mixed).view(batch, rows, columns, size, size, width).transpose(2, 3)
        made = made.reshape(batch, rows * size, columns * size, width).movedim(-1, 1)
        return made[:, :, before : before + height, before : before + length]


class SwinIR(Upscaler):
    """Windowed transformer blocks whose windows alternate between two grids (Liang et al. 2021), without
    relative position bias.

    Args:
        blocks: how many.
        width: channels; divisible by `heads`.
        heads: of the attention.
        window: side of a window in pixels of the small image.
        scale: 2, 3 or 4.
    """

    def __init__(
        self, blocks: int = 4, width: int = 32, heads: int = 4, window: int = 8, scale: int = 2
    ) -> None:
        super().__init__(width, scale)
        if width % heads:
            raise ConfigError(f"SwinIR: {heads} heads do not divide the width {width}")
        self.arguments = {
            "blocks": blocks,
            "width": width,
            "heads": heads,
            "window": window,
            "scale": scale,
        }
        self.body = nn.Sequential(
            *(WindowBlock(width, heads, window, window // 2 * (index % 2)) for index in range(blocks))
        )
