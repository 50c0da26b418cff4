"""Real images that small networks train on in seconds: a part of MNIST and CIFAR-10 at half their size."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.bundles.sources import Source
from zoo.mnist import read_mnist
from zoo.shared.train import Job, Recipe
from zoo.studies.options import StudyOptions
from zoo.vision.data import Images, Split, held_out, load_images, statistics
from zoo.vision.domain import image_job
from zoo.vision.models import ConvNet


@dataclass(frozen=True)
class SmallOptions(StudyOptions):
    """Options of studies on small images.

    Args:
        dataset: an image set by name; MNIST is averaged to 14x14, CIFAR-10 to 16x16.
        train_images: the first so many; 0 for all.
        test_images: the first so many; 0 for all.
    """

    dataset: str = "mnist"
    train_images: int = 2000
    test_images: int = 2000

    def images(self) -> Images:
        """The images, without augmentation."""
        return _small(self.dataset, self.train_images, self.test_images)

    def model(self) -> ConvNet:
        """The network of the studies, three convolutions, with fresh weights."""
        return ConvNet((16, 32, 64), (1, 2, 2), channels=3 if self.dataset.startswith("cifar10") else 1)

    def job(self, recipe: Recipe, seed: int) -> Job:
        """Classification of the training images."""
        return image_job(self.images(), recipe, seed)


@functools.lru_cache(2)
def _small(name: str, train: int, test: int) -> Images:
    data = load_images(name)
    parts: dict[str, Any] = {
        "train": _first(data.train, train),
        "val": _first(data.val, 1000),
        "test": _first(data.test, test),
    }
    if name == "mnist" or name.startswith("cifar10"):
        parts = {part: halved(split) for part, split in parts.items()}
    return replace(data, augment=False, **parts)


def _first(split: Split, count: int) -> Split:
    return split.take(torch.arange(min(count or len(split), len(split))))


def halved(split: Split) -> Split:
    """Images of half the size, each pixel the mean of four."""
    small = torch.nn.functional.avg_pool2d(split.images.float(), 2).round().to(torch.uint8)
    return Split(small, split.labels)


def whole(images: Images, part: str = "train") -> tuple[Float[Tensor, "n C H W"], Tensor]:
    """All images of a part as networks see them, and their labels."""
    split = getattr(images, part)
    return images.normalised(split.images), split.labels


def mnist() -> Images:
    """MNIST: 60,000 digits of 28x28 in a fixed order, a tenth of them for validation, and 10,000 for testing.

    Raises:
        DataError: ZOO_DATA is not set, or has no folder mnist with the four IDX files.
    """
    train = _part("train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    train, val = held_out(train.take(order))
    mean, std = statistics(train.images, 255.0)
    return Images("mnist", train, val, _part("t10k"), mean, std, augment=False)


mnist.source = Source("MNIST", "LeCun, Cortes and Burges", "not stated")  # type: ignore[attr-defined]


def _part(name: str) -> Split:
    images, labels = read_mnist(name)
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels))
