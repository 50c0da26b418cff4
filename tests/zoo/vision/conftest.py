"""Small images and networks for the tests of the vision domain."""

from __future__ import annotations

import pytest
import torch

from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Job, Recipe
from zoo.vision.data import Images, Split
from zoo.vision.domain import image_job
from zoo.vision.models import ConvNet


def make_images(count: int = 96, size: int = 8, classes: int = 4, seed: int = 0) -> Images:
    """Images whose class is the bright quarter, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 9, (count, 1, size, size), generator=generator)
    half = size // 2
    for index, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        images[index, 0, row * half : (row + 1) * half, column * half : (column + 1) * half] += 7
    whole = Split(images.to(torch.uint8), labels)
    parts = [whole.take(torch.arange(start, count, 3)) for start in range(3)]
    return Images("quarters", *parts, (0.3,), (0.3,), 16.0, augment=False)


@pytest.fixture
def images() -> Images:
    """Ninety-six images in three parts."""
    return make_images()


@pytest.fixture
def job(images: Images) -> Job:
    """Two epochs of batches of 16."""
    return image_job(images, Recipe(epochs=2, lr=0.05, batch=16))


@pytest.fixture
def net() -> ConvNet:
    """A net of three convolutions with fresh weights."""
    return reinitialised(ConvNet((8, 16, 16), (1, 2, 1), classes=4), 0)
