"""What the studies of image classifiers share: the images, training, and what a method makes of a model."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from zoo.methods.contract import Method
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Cost, Recipe, clock
from zoo.vision.data import Images, correct, load_images
from zoo.vision.domain import image_job
from zoo.vision.models import Classifier


def trained(model: Classifier, images: Images, recipe: Recipe, seed: int) -> tuple[Classifier, Cost]:
    """The model itself after training, and what that cost."""
    job = image_job(images, recipe, seed, images.device)
    job.fit(model).run()
    return model, job.cost


def fresh(model: Classifier, images: Images, recipe: Recipe, seed: int) -> Classifier:
    """The model with the fresh weights of a seed, trained."""
    return trained(reinitialised(model, seed), images, recipe, seed)[0]


def made(method: Method, model: Classifier, images: Images, recipe: Recipe, seed: int) -> tuple[Any, Cost]:
    """What a method makes of a copy of the model with a recipe, and what that cost, choosing included."""
    job = image_job(images, recipe, seed, images.device)
    start = clock(images.device)
    found = method.sparsify(model, job).model
    job.cost.seconds = clock(images.device) - start
    return found, job.cost


def figures(model: Classifier, images: Images, cost: Cost) -> dict[str, Any]:
    """The figures of a finished network; which test images it gets right as bits in hexadecimal."""
    right = correct(model, images, images.test).cpu()
    masks = masks_of(model) or MaskSet({})
    return {
        "accuracy": float(right.double().mean()),
        "correct": np.packbits(right.numpy()).tobytes().hex(),
        "images": len(right),
        "sparsity": masks.sparsity(),
        "empty_layers": sum(mask.kept == 0 for mask in masks.values()),
        "flops": cost.flops,
        "seconds": cost.seconds,
        "device": images.device.type,
    }


def unpacked(row: dict[str, Any]) -> np.ndarray:
    """Which test images were right, as 0 and 1."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["correct"]), np.uint8))
    return bits[: row["images"]].astype(float)


@functools.cache
def digits() -> Images:
    """The embedded digits."""
    return load_images("digits")


def content(images: Images) -> list[Any]:
    """What a digest of images is taken of."""
    return [[part.images, part.labels] for part in (images.train, images.val, images.test)]
