"""Jobs on the image sets, the super-resolution patches and the point clouds of the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.bundles.sources import Source
from zoo.errors import ConfigError
from zoo.registry import DATASETS
from zoo.shared.train import Job, Recipe, device_named
from zoo.vision import data, slots, superres
from zoo.vision.data import ImageBatches, Images, accuracy, load_images
from zoo.vision.folders import is_folder
from zoo.vision.lidar.data import KITTI, KITTI_TRAIN, SOURCE, real_frame, scene_frames
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.frames import frames_source, is_frames, own_frames
from zoo.vision.lidar.train import detector_job
from zoo.vision.superres import PatchBatches, l1_loss, load_t91
from zoo.vision.tasks import measured_on_images
from zoo.vision.upscalers import Upscaler

SCENES = 240  # generated scenes, unless told otherwise
SOURCES: dict[str, Source] = {**data.SOURCES, "t91": superres.SOURCE, "scenes": SOURCE, "kitti": KITTI}
SOURCES["sprites"] = slots.SOURCE


def make_job(
    dataset: str | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    model: nn.Module | None = None,
    limit: int = 0,
) -> Job:
    """Classification, super-resolution or detection, as the data say.

    Args:
        dataset: digits, cifar10-jpeg, cifar10-true or a folder of images to classify; t91 for patches to
            enlarge; sprites for models of slots; scenes (generated), kitti (9 of its 13 frames) or a folder
            of frames (`zoo.vision.lidar.frames`) for boxes in point clouds. By default what the model is made
            for: the images of the first figure on its card, t91 for an upscaler, scenes for a detector.
        recipe: by default that of its kind.
        seed: of order and augmentation.
        device: where models are trained.
        model: whose scale patches have; by default 2.
        limit: use the first so many training images or frames; 0 for all (240 generated scenes).

    Raises:
        ConfigError: no data set is named, and the model has no card.
        DataError: an unknown name, or data that are not at hand.
    """
    dataset, device = dataset or dataset_of(model), device_named(device)
    known = {Upscaler: ("t91",), Detector: ("scenes", "kitti")}
    for kind, names in known.items():
        own = kind is Detector and is_frames(dataset)
        if isinstance(model, kind) and dataset not in names and not own:
            raise ConfigError(f"{kind.__name__.lower()}s train on {' or '.join(names)}; received {dataset!r}")
    if dataset == "t91":
        pairs = load_t91(int(getattr(model, "scale", 2)))[: limit or None]
        recipe = recipe or Recipe(lr=1e-3, batch=8, weight_decay=0.0, optimizer="adam")
        patches = PatchBatches(pairs, batch=recipe.batch, device=device)
        return Job(patches, l1_loss, None, recipe, seed, device)
    if dataset == "sprites":
        return slots.slot_job(recipe, seed, device)
    if dataset == "scenes":
        return detector_job(scene_frames("train", limit or SCENES), recipe, seed, device)
    if dataset == "kitti":
        frames = [real_frame("lidar-kitti-mini", name) for name in KITTI_TRAIN[: limit or None]]
        return detector_job(frames, recipe, seed, device)
    if is_frames(dataset):
        return detector_job(own_frames(dataset, "train")[: limit or None], recipe, seed, device)
    images = load_images(dataset)
    return image_job(images.subset(limit) if limit else images, recipe, seed, device)


def dataset_of(model: nn.Module | None) -> str:
    """What a model is trained on unless told otherwise, see `make_job`.

    Raises:
        ConfigError: an image classifier without a card.
    """
    if isinstance(model, Upscaler):
        return "t91"
    if isinstance(model, Detector):
        return "scenes"
    known: Any = getattr(model, "zoo_info", None)
    if known is None:
        raise ConfigError("This model has no card that names its images: give the option dataset.")
    task = str(known.card.metrics[0].task)
    return task.removeprefix("images:") if task.startswith("images:") else task.partition("/")[2]


def example_of(model: nn.Module) -> Tensor | None:
    """An image of noise of the size that a model is made for; None where the name of its data does not tell
    that size."""
    shape = data.SHAPES.get(dataset_of(model))
    return None if shape is None else torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def source_of(dataset: str) -> Source:
    """What a card says of a data set by name or folder."""
    if is_frames(dataset):
        return frames_source(dataset)
    return SOURCES[dataset] if dataset in SOURCES else data.source_named(dataset)


def measured(dataset: str) -> tuple[str | None, Source]:
    """The task that is measured on images or frames by name or folder, and what a card says of them; no task
    for patches, which models train on only."""
    if (task := measured_on_frames(dataset)) is not None:
        return task, source_of(dataset)
    if dataset == "sprites":
        return "vision/sprites", source_of(dataset)
    if dataset in SOURCES and dataset not in data.SOURCES:
        return None, SOURCES[dataset]
    return measured_on_images(dataset)


def measured_on_frames(dataset: str) -> str | None:
    """The task that is measured on point clouds by name or folder; None for other data."""
    if is_frames(dataset):
        return f"frames:{dataset}"
    return {"scenes": "vision/lidar-scenes", "kitti": "vision/kitti"}.get(dataset)


def image_job(
    images: Images, recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu"
) -> Job:
    """Classification of images; the score is the accuracy on the validation part."""
    there, recipe = images.to(device_named(device)), recipe or Recipe()

    def score(model: nn.Module) -> float:
        return accuracy(model, there, there.val)

    return Job(ImageBatches(there, recipe.batch), score=score, recipe=recipe, seed=seed, device=device)


def content(dataset: str) -> Any:
    """What the digest of images or own point clouds on a card is taken of; None for patches, sprites and
    scenes."""
    if is_frames(dataset):
        return Path(dataset)
    if dataset not in data.SOURCES and not is_folder(dataset) and f"vision/{dataset}" not in DATASETS:
        return None
    images = load_images(dataset)
    return [[part.images, part.labels] for part in (images.train, images.val, images.test)]
