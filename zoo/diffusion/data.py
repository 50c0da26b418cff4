"""Pictures with captions: scikit-learn's digits, embedded, and MNIST below $ZOO_DATA, in pixels or latents.

A caption is a template filled with the word of a class; the vocabulary is that of the templates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.bundles.sources import Source
from zoo.errors import DataError
from zoo.mnist import read_mnist

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ENCODED = {"latents": 20_000, "few-latents": 320}  # images: to train on, to calibrate on
TEMPLATES = ("a photo of a {}", "the digit {}", "a {}", "a drawing of the number {}", "{}")
SOURCES = {
    "digits": Source(
        "scikit-learn digits (1,797 images of 8x8)",
        "UCI Optical Recognition of Handwritten Digits, through scikit-learn",
        "CC BY 4.0",
    ),
    "mnist": Source("MNIST, 16x16 (padded to 32, 2x2 mean)", "LeCun, Cortes and Burges", "not stated"),
    "latents": Source(
        "the first 20,000 images of MNIST, 32x32, in TAEF2's latent space",
        "LeCun, Cortes and Burges",
        "not stated",
    ),
    "few-latents": Source(
        "the first 320 images of MNIST, 32x32, in TAEF2's latent space",
        "LeCun, Cortes and Burges",
        "not stated",
    ),
    "digit-triples": Source(
        "three scikit-learn digits side by side (8x24)",
        "UCI Optical Recognition of Handwritten Digits, through scikit-learn",
        "CC BY 4.0",
    ),
}


@dataclass(frozen=True)
class Pictures:
    """Images [n, C, H, W] in [-1, 1] with their classes.

    Attributes:
        name: of the set.
        train, test: images; `test` is never trained on.
        train_labels, test_labels: classes, indices of `WORDS`.
    """

    name: str
    train: Float[Tensor, "n C H W"]
    train_labels: Int[Tensor, " n"]
    test: Float[Tensor, "m C H W"]
    test_labels: Int[Tensor, " m"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return tuple(self.train.shape[1:])  # type: ignore[return-value]


@functools.lru_cache(maxsize=4)
def load_pictures(name: str) -> Pictures:
    """The set of that name.

    Raises:
        DataError: an unknown name, or files that are not below ZOO_DATA.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(bunch.images.astype(np.float32))[:, None] / 8 - 1
        labels = torch.from_numpy(bunch.target.astype(np.int64))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
        return Pictures(name, images[500:], labels[500:], images[:500], labels[:500])
    if name == "digit-triples":
        return _triples(load_pictures("digits"))
    if name == "mnist":
        return Pictures(name, *_mnist("train"), *_mnist("t10k"))
    if name in ENCODED:
        return Pictures(name, *_latents("train", ENCODED[name]), *_latents("t10k", 100))
    raise DataError(f"Unknown picture set {name!r}. There are: {', '.join(SOURCES)}.")


def _triples(digits: Pictures) -> Pictures:
    """Canvases of three digits side by side, three in ten of them blank; the class is that of one of them."""
    generator = torch.Generator().manual_seed(1)

    def drawn(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (count, 3), generator=generator)
        blank = torch.rand(count, 3, generator=generator) < 0.3
        named = torch.randint(3, (count,), generator=generator)
        blank[torch.arange(count), named] = False
        tiles = torch.where(blank[:, :, None, None, None], -1.0, images[chosen])
        return torch.cat(tiles.unbind(1), dim=-1), labels[chosen[torch.arange(count), named]]

    train, test = drawn(digits.train, digits.train_labels, 4000), drawn(digits.test, digits.test_labels, 500)
    return Pictures("digit-triples", *train, *test)


def _mnist(part: str) -> tuple[Tensor, Tensor]:
    padded, labels = _padded(part)
    return F.avg_pool2d(padded, 2), labels


def _padded(part: str) -> tuple[Tensor, Tensor]:
    """MNIST with a border of two pixels, 32x32."""
    images, labels = read_mnist(part)
    padded = F.pad(torch.from_numpy(images).float()[:, None] / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return padded, torch.from_numpy(labels)


def _latents(part: str, count: int) -> tuple[Tensor, Tensor]:
    from zoo.diffusion.latents import encode  # which needs models, and they this module

    images, labels = _padded(part)
    return encode(images[:count]), labels[:count]


def captions(labels: Int[Tensor, " n"], generator: torch.Generator | None = None) -> list[str]:
    """A caption for each class: the first template, or one that a generator draws."""
    chosen = [0] * len(labels)
    if generator is not None:
        chosen = torch.randint(len(TEMPLATES), (len(labels),), generator=generator).tolist()
    return [TEMPLATES[t].format(WORDS[label]) for t, label in zip(chosen, labels.tolist(), strict=True)]


@dataclass(frozen=True)
class CaptionedNoise:
    """Training batches of a text-to-image model: (images, noise, time steps, token ids).

    Time steps are drawn uniformly; a tenth of the captions is empty, for guidance.

    Args:
        pictures: the data.
        tokenise: captions -> ids [n, tokens].
        times: time steps of the noise schedule.
        batch: images per step.
        steps: steps per epoch.
    """

    pictures: Pictures
    tokenise: object
    times: int
    batch: int = 64
    steps: int = 50

    def __len__(self) -> int:
        return self.steps

    def sized(self, batch: int) -> CaptionedNoise:
        """The same data in batches of another size."""
        return CaptionedNoise(self.pictures, self.tokenise, self.times, batch, self.steps)

    def draw(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The batches of one epoch."""
        images, labels = self.pictures.train, self.pictures.train_labels
        for _ in range(self.steps):
            chosen = torch.randint(len(images), (self.batch,), generator=generator)
            noise = torch.randn(images[chosen].shape, generator=generator)
            times = torch.randint(self.times, (self.batch,), generator=generator)
            texts = captions(labels[chosen], generator)
            empty = torch.rand(self.batch, generator=generator) < 0.1
            texts = ["" if gone else text for gone, text in zip(empty.tolist(), texts, strict=True)]
            yield images[chosen], noise, times, self.tokenise(texts)  # type: ignore[operator]

    def example(self) -> tuple[Tensor, Tensor, Tensor]:
        """One noisy image with its time and caption, as the model takes it."""
        return self.pictures.train[:1], torch.tensor([0]), self.tokenise([""])  # type: ignore[operator]
