"""The job of the domain: images by name, cross-entropy, accuracy on the validation images."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.devices import checked_device
from zoo.errors import ConfigError
from zoo.shared.train import Job, Recipe
from zoo.vision.data import load_images
from zoo.vision.superres import PatchBatches, l1_loss, load_t91
from zoo.vision.train import ImageBatches, accuracy
from zoo.vision.upscalers import Upscaler


def make_job(
    dataset: str | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str = "cpu",
    model: nn.Module | None = None,
) -> Job:
    """The job of training on these images.

    Args:
        dataset: digits, cifar10-jpeg or cifar10-true, or t91 for upscalers; by default those of the first
            figure on the model's card, and t91 for an upscaler.
        recipe: how to train.
        seed: of order, augmentation and fresh weights.
        device: where to train.
        model: for whom.

    Raises:
        ConfigError: no data set is named and the model has no card, or there is no such device.
        DataError: no such images, or they are not at hand.
    """
    recipe = recipe or Recipe()
    place = checked_device(device)
    if isinstance(model, Upscaler):
        if dataset not in (None, "t91"):
            raise ConfigError(f"upscalers train on t91; received {dataset!r}")
        patches = PatchBatches(load_t91(model.scale), batch=recipe.batch, device=place)
        return Job(patches, loss=l1_loss, recipe=recipe, seed=seed, device=device)
    data = load_images(dataset or dataset_of(model)).to(place)
    return Job(
        ImageBatches(data, recipe.batch),
        score=lambda made: accuracy(made, data, data.val),
        recipe=recipe,
        seed=seed,
        device=device,
    )


def dataset_of(model: nn.Module | None) -> str:
    """The images of the first figure on the card of a model from the zoo.

    Raises:
        ConfigError: the model is not from the zoo.
    """
    info: Any = getattr(model, "zoo_info", None)
    if info is None:
        raise ConfigError("This model has no card that names its images: give the option dataset.")
    return str(info.card.metrics[0].task).partition("/")[2]
