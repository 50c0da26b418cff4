"""What studies on text-to-image models share: the pruned model, and what is measured of images."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.bundles.catalog import find
from zoo.bundles.store import load_bundle
from zoo.diffusion.classifier import accuracy, frechet_distance, load_judge
from zoo.diffusion.data import load_pictures
from zoo.diffusion.models import TextToImage
from zoo.diffusion.paired import drift, images_of
from zoo.errors import ConfigError
from zoo.studies.view import Row, Value

DENSE = "diffusion/dense-t2i-digits"
STEPS, BATCH = 10, 100
DRIFT = Value("drift", 1.0, 5, "log ratio", 2, lower=True, log=True)
FRECHET = Value("frechet", 1.0, 1, "of the distance", 1, lower=True)
FRECHET_RATIO = Value("frechet", 1.0, 1, "log ratio", 2, lower=True, log=True)
ACCURACY = Value("accuracy", 100.0, 1)
NOTE = (
    "The model that is pruned is the shipped text-to-image model of scikit-learn's 8x8 digits; a seed "
    "decides the noise of the images, calibration and learning, so that the spread is over these, not over "
    "trainings of the dense model. Images by ten DDIM steps without guidance from the same noise for every "
    "arm. Drift is the mean squared difference from the dense model's image of the same noise; Frechet "
    "distances are of a small classifier's features over few images, biased upward alike for all arms. Log "
    "ratios are natural: 0.69 is twice, 1.61 is 5 times, 2.30 is 10 times, 3.00 is 20 times."
)


def shipped(name: str) -> TextToImage:
    """A text-to-image model of the zoo, as a bundle holds it: cut, or with its masks."""
    model = load_bundle(find(name))
    if not isinstance(model, TextToImage):
        raise ConfigError(f"{name} is a {type(model).__name__}, no text-to-image model")
    return model.eval()


@functools.lru_cache(maxsize=1)
def _dense() -> TextToImage:
    return shipped(DENSE)


def victim() -> TextToImage:
    """A copy of the shipped dense model, to be pruned."""
    return copy.deepcopy(_dense())


def data(options: Any, where: Mapping[str, Any]) -> str:
    """What the cells' digest of the data is taken of: the dense weights (which were trained on them)."""
    return find(DENSE).card.weights.sha256


def images(model: TextToImage, seed: int, count: int) -> Tensor:
    """Images of the digits in turn, from the noise of a seed, [count, C, H, W]."""
    noise = torch.randn((count, *model.sample_shape), generator=torch.Generator().manual_seed(1000 + seed))
    return images_of(model, noise, steps=STEPS, batch=BATCH)


@functools.lru_cache(maxsize=4)
def _dense_images(seed: int, count: int) -> Tensor:
    return images(_dense(), seed, count)


def figures(model: TextToImage, seed: int, count: int) -> Row:
    """Accuracy, Frechet distance and drift of a model's images."""
    own = images(model.eval(), seed, count)
    return {**quality(own), "drift": float(drift(own, _dense_images(seed, count)).mean())}


def quality(made: Tensor) -> Row:
    """Accuracy of images of the digits in turn, and their Frechet distance to as many test images."""
    judge = load_judge("digits")
    with torch.no_grad():
        real = judge.features(load_pictures("digits").test[: len(made)])
        distance = frechet_distance(judge.features(made), real)
    return {"accuracy": accuracy(judge, made, torch.arange(len(made)) % 10), "frechet": distance}


def share_left(model: TextToImage) -> float:
    """Share of the dense denoiser's parameters that a cut one has."""
    whole, own = (sum(p.numel() for p in net.unet.parameters()) for net in (_dense(), model))
    return own / whole
