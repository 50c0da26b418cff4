"""The latent space of TAEF2, a tiny autoencoder of FLUX.2's latents (8 times smaller, 32 channels), and
text-to-image models whose denoiser works there.

The autoencoder's weights were published by others (github.com/madebyollin/taesd, MIT). They are larger than
the denoisers here and are not shipped: they are read below $ZOO_DATA/weights/taef2 and checked by their hash.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.bundles.sources import published_file
from zoo.diffusion.models import TextToImage

CHANNELS, REDUCTION, SIDE = 32, 8, 32
LATENT_SHAPE = (CHANNELS, SIDE // REDUCTION, SIDE // REDUCTION)
ADDRESS = "https://github.com/madebyollin/taesd"
SHA256 = {
    "encoder": "10a4e1021e89d7551eaf161352da8dbd0b1aa83872ae28b150c1df1ce2f147b6",
    "decoder": "0a44a31e1ae59eb9dbf9359d24942fd3ef5928162c1800d97a28c61d51be0ab5",
}


class CodecBlock(nn.Module):
    """Three convolutions beside a shortcut, after a branch of normed features if `pooled`."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
        self.conv = nn.Sequential(*layers[:-1])
        if pooled:
            wide, back = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
            self.pool = nn.Sequential(wide, nn.GroupNorm(4, 256), nn.ReLU(), back)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class Bounded(nn.Module):
    """Latents brought softly into [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


@functools.lru_cache(maxsize=1)
def codec() -> tuple[nn.Module, nn.Module]:
    """TAEF2's encoder (images [n, 3, 8 h, 8 w] in [0, 1] -> latents [n, 32, h, w]) and decoder.

    Raises:
        DataError: their files are not below ZOO_DATA, or are others than those published.
    """

    def conv(inner: int, outer: int, stride: int = 1, bias: bool = True) -> nn.Module:
        return nn.Conv2d(inner, outer, 3, stride, 1, bias=bias)

    def three(pooled: bool = False) -> list[nn.Module]:
        return [CodecBlock(pooled) for _ in range(3)]

    down = [layer for deep in (0, 0, 1) for layer in (conv(64, 64, 2, False), *three(bool(deep)))]
    up = [
        layer for _ in range(2) for layer in (nn.Upsample(scale_factor=2), conv(64, 64, 1, False), *three())
    ]
    encoder = nn.Sequential(conv(3, 64), CodecBlock(False), *down, conv(64, CHANNELS))
    first = [Bounded(), conv(CHANNELS, 64), nn.ReLU(), *three(True)]
    last = [nn.Upsample(scale_factor=2), conv(64, 64, 1, False), CodecBlock(False), conv(64, 3)]
    decoder = nn.Sequential(*first, *up, *last)
    for part, network in (("encoder", encoder), ("decoder", decoder)):
        network.load_state_dict(_published(part))
    return encoder.float().eval().requires_grad_(False), decoder.float().eval().requires_grad_(False)


def _published(part: str) -> dict[str, Tensor]:
    file = f"weights/taef2/taef2_{part}.pth"
    path = published_file({"file": file, "sha256": SHA256[part], "address": ADDRESS})
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


@torch.no_grad()
def encode(images: Float[Tensor, "n 1 H W"], batch: int = 100) -> Float[Tensor, "n 32 h w"]:
    """The latents of grey images in [-1, 1]."""
    encoder, _ = codec()
    return torch.cat([encoder((part / 2 + 0.5).expand(-1, 3, -1, -1)) for part in images.split(batch)])


@torch.no_grad()
def decode(latents: Float[Tensor, "n 32 h w"], batch: int = 100) -> Float[Tensor, "n 1 H W"]:
    """The grey images of latents in [-1, 1], the mean of the decoder's three colours."""
    _, decoder = codec()
    made = torch.cat([decoder(part.float()) for part in latents.split(batch)])
    return 2 * made.mean(1, keepdim=True).clamp(0, 1) - 1


class LatentTextToImage(TextToImage):
    """A text-to-image model whose denoiser works in TAEF2's latent space; see `TextToImage`.

    `side` and `channels` are those of the latents; images are 8 times as high and wide, and grey.
    """

    def decoded(self, made: Float[Tensor, "n 32 h w"]) -> Float[Tensor, "n 1 H W"]:
        """Grey images in [-1, 1] of sampled latents.

        Raises:
            DataError: TAEF2's files are not below ZOO_DATA.
        """
        return decode(made)

    def pipeline(self) -> Any:
        """The same parts as a `DiffusionPipeline`, which shares the weights and decodes what it samples."""
        from zoo.diffusion.pipelines import LatentTextToImagePipeline

        return LatentTextToImagePipeline(self.text_encoder, self.tokenizer, self.unet, self.scheduler)
