"""One-D-Piece: an image as an ordered list of tokens whose every beginning decodes to an image.

Miwa et al., One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression, arXiv 2501.10064. A
transformer encoder reads patches and N latent tokens and keeps the latter, a quantiser with both sides of
unit length names a code for each, a transformer decoder paints patches from the first k of them. Tail token
drop is the paper's step: in training k is drawn uniformly from 1..N, once for a batch.

Differs from the paper in: pixels are decoded directly, with a squared error (no codes of a MaskGIT VQGAN
first, no adversarial second stage); codes that no image uses are put where images are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.diffusion.data import load_pictures
from zoo.diffusion.networks.base import STEPS, USUAL, NetworkTask, PaperNetwork, picked, transformer
from zoo.diffusion.networks.photos import crops
from zoo.diffusion.networks.quantiser import Quantiser
from zoo.errors import ConfigError
from zoo.harness.tasks import Progress, TaskResult, register_task
from zoo.shared.train import Drawn, Job, Recipe

SPREAD = 0.5  # of learned places at the start: near 0 all tokens would begin alike


class OneDPiece(PaperNetwork):
    """The tokenizer.

    Args:
        side, channels: of the images.
        patch: side of a patch.
        tokens: N, how many tokens an image has at most.
        codes, code_width: of the quantiser.
        width, depth: of encoder and decoder.
        tail_drop: whether training drops the tail.
    """

    usual = dataclasses.replace(USUAL, steps=700, batch=24)

    def __init__(
        self,
        side: int = 16,
        channels: int = 1,
        patch: int = 4,
        tokens: int = 16,
        codes: int = 128,
        code_width: int = 8,
        width: int = 64,
        depth: int = 2,
        tail_drop: bool = True,
    ) -> None:
        super().__init__()
        if side % patch:
            raise ConfigError(f"side must be a multiple of patch; received {side} and {patch}")
        self.side, self.channels, self.patch = side, channels, patch
        self.tokens, self.codes, self.tail_drop = tokens, codes, tail_drop
        patches = (side // patch) ** 2
        self.into = nn.Conv2d(channels, width, patch, patch)
        self.places = nn.Parameter(SPREAD * torch.randn(patches + 1, width))
        self.class_token = nn.Parameter(SPREAD * torch.randn(width))
        self.latents = nn.Parameter(SPREAD * torch.randn(tokens, width))
        self.encoder = transformer(width, depth)
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, code_width)
        self.quantiser = Quantiser(codes, code_width)
        self.up = nn.Linear(code_width, width)
        self.mask_token = nn.Parameter(SPREAD * torch.randn(width))
        self.masked_places = nn.Parameter(SPREAD * torch.randn(patches + 1, width))
        self.latent_places = nn.Parameter(SPREAD * torch.randn(tokens, width))
        self.decoder = transformer(width, depth)
        self.last_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, channels * patch**2)

    def latent(self, x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n N d"]:
        """The tokens of images before they are quantised.

        Raises:
            ConfigError: images of another size.
        """
        if x.shape[1:] != (self.channels, self.side, self.side):
            wanted = self.channels, self.side, self.side
            raise ConfigError(f"this tokenizer reads images of {wanted}; received {tuple(x.shape[1:])}")
        seen = self.into(x).flatten(2).transpose(1, 2)
        seen = torch.cat([self.class_token.expand(len(x), 1, -1), seen], 1) + self.places
        h = torch.cat([seen, self.latents.expand(len(x), -1, -1)], 1)
        for block in self.encoder:
            h = block(h)
        latent: Tensor = self.down(self.norm(h[:, -self.tokens :]))
        return latent

    def paint(self, codes: Float[Tensor, "n k d"]) -> Float[Tensor, "n C H W"]:
        """Images from the first k codes.

        Raises:
            ConfigError: k outside 1..N.
        """
        k = self._length(codes.shape[1])
        blank = self.mask_token + self.masked_places
        h = torch.cat([blank.expand(len(codes), -1, -1), self.up(codes) + self.latent_places[:k]], 1)
        for block in self.decoder:
            h = block(h)
        patches = self.out(self.last_norm(h[:, 1 : len(blank)])).transpose(1, 2)
        return F.fold(patches, self.side, self.patch, stride=self.patch)

    def encode(self, x: Float[Tensor, "n C H W"]) -> Int[Tensor, "n N"]:
        """The numbers of the tokens of images; see `latent`."""
        indices: Tensor = self.quantiser(self.latent(x))[1]
        return indices

    def decode(self, indices: Int[Tensor, "n k"]) -> Float[Tensor, "n C H W"]:
        """Images from the first k tokens.

        Raises:
            ConfigError: k outside 1..N, or a number that is no code's.
        """
        self._length(indices.shape[1])
        if int(indices.min()) < 0 or int(indices.max()) >= self.codes:
            raise ConfigError(
                f"tokens are 0 to {self.codes - 1}; received {int(indices.min())} to {int(indices.max())}"
            )
        return self.paint(self.quantiser.vectors(indices))

    def reconstruct(
        self, x: Float[Tensor, "n C H W"], length: int | None = None
    ) -> tuple[Float[Tensor, "n C H W"], Float[Tensor, ""]]:
        """(images from their own first tokens, loss of the quantiser).

        Args:
            x: images.
            length: k; by default all, or in training with tail drop one number for the batch, 1 to N.
        """
        if length is None:
            drop = self.training and self.tail_drop
            length = int(torch.randint(1, self.tokens + 1, ())) if drop else self.tokens
        codes, _, loss = self.quantiser(self.latent(x))
        return self.paint(codes[:, : self._length(length)]), loss

    def forward(self, x: Float[Tensor, "n C H W"], length: int | None = None) -> Float[Tensor, "n C H W"]:
        return self.reconstruct(x, length)[0]

    def bits(self, length: int) -> float:
        """What the first tokens take, k log2 K bits."""
        return self._length(length) * math.log2(self.codes)

    def _length(self, length: int) -> int:
        if not 1 <= length <= self.tokens:
            raise ConfigError(f"an image has 1 to {self.tokens} tokens; received {length}")
        return length

    def make_job(
        self, dataset: str, *, recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Job:
        used = recipe or self.usual
        draw = crops(self.side) if dataset == "photos" else picked(load_pictures(dataset).train)
        return Job(Drawn(draw, used.batch, STEPS, 1), token_loss, recipe=used, seed=seed, device=device)


def token_loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
    """Mean squared error of the reconstruction + the loss of the quantiser."""
    network: Any = getattr(model, "module", model)
    made, loss = network.reconstruct(batch[0])
    return F.mse_loss(made, batch[0]) + loss


@register_task
class Tokens(NetworkTask):
    """Reconstruction of the 500 test digits from the first tokens.

    Metrics: `mse` from all tokens, `mse_eighth` from the first eighth of them; pixels are -1 to 1.
    """

    name, primary, network = "diffusion/tokens-digits", "mse", OneDPiece
    higher_is_better = False

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Encode and decode."""
        network, images = self.fitting(model), load_pictures("digits").test
        lengths = {"mse": network.tokens, "mse_eighth": max(1, network.tokens // 8)}
        with torch.no_grad():
            samples = {name: errors(network, images, k).tolist() for name, k in lengths.items()}
        return TaskResult.from_samples(samples, hashlib.sha256(b"digits/500").hexdigest()[:16])

    def example(self, model: Any) -> tuple[Tensor]:
        """A test image."""
        return (load_pictures("digits").test[:1],)


@torch.no_grad()
def errors(network: OneDPiece, images: Float[Tensor, "n C H W"], length: int) -> Float[Tensor, " n"]:
    """Mean squared error of each image from its first tokens."""
    made = torch.cat([network(part, length) for part in images.split(250)])
    return (made - images).square().flatten(1).mean(1)
