"""A classifier made ready for other images: their size, their channels, their classes."""

from __future__ import annotations

import dataclasses

from torch import nn

from zoo.errors import ConfigError
from zoo.shared.structure.relatives import seeded
from zoo.training.transfer import take_over
from zoo.vision.data import SOURCES, load_images
from zoo.vision.domain import dataset_of
from zoo.vision.folders import Spec, is_folder
from zoo.vision.models import Classifier


def fitting_spec(dataset: str, model: nn.Module) -> str:
    """A folder's name with the size and channels of the images that the model was trained on, unless it says
    its own; other data sets as they are."""
    spec = Spec.of(dataset)
    if dataset in SOURCES or not is_folder(dataset) or spec.size:
        return dataset
    shape = load_images(dataset_of(model)).test.images.shape
    return str(dataclasses.replace(spec, size=int(shape[2]), mode="L" if shape[1] == 1 else "RGB"))


def classes_of(dataset: str) -> int:
    """How many classes a set has."""
    return int(load_images(dataset).train.labels.max()) + 1


def for_classes(model: Classifier, classes: int, seed: int) -> tuple[Classifier, list[str]]:
    """The model, or one of its shapes with another number of classes whose head is new.

    The new layer's weights are drawn with `seed`; in a sparse model they are masked by magnitude at the share
    of the layer before it.

    Returns:
        The model, in its mode, with its masks; and the names of the parameters that are new.

    Raises:
        ConfigError: a model that is not built by its number of classes.
    """
    arguments = model.current_arguments()
    if arguments.get("classes") == classes:
        return model, []
    if "classes" not in arguments:
        raise ConfigError(f"{type(model).__name__} has no argument `classes`, so its head cannot be changed")
    with seeded(seed):
        fresh = type(model)(**{**arguments, "classes": classes})
    fresh.zoo_info = getattr(model, "zoo_info", None)  # type: ignore[assignment]
    new = take_over(model, fresh)
    return fresh.train(model.training), new
