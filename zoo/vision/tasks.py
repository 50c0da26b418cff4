"""Image classification on the domain's sets, as harness tasks."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from zoo.bundles.sources import Source
from zoo.errors import TaskError
from zoo.harness.tasks import Flops, Progress, Task, TaskResult, register_task
from zoo.registry import TASKS
from zoo.shared.measure.account import count
from zoo.shared.measure.modes import eval_mode
from zoo.vision.data import Images, correct, load_images, ranks, source_named


class Classification(Task):
    """Top-1 accuracy on the test images of one set, whole and not augmented. Subclasses name the set."""

    domain = "vision"
    primary = "accuracy"
    images: str

    def accepts(self, card: Any) -> bool:
        """Models that were measured on these images."""
        return self.is_on(card)

    def measured_on(self) -> Any:
        """The test images and labels, and how they are normalised."""
        data = load_images(self.images)
        return [data.test.images, data.test.labels, data.mean, data.std, data.scale]

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Accuracy with its standard error; samples are 1 for right and 0 for wrong."""
        data = self._fitting(model)
        right = correct(model, data, data.test)
        digest = hashlib.sha256(data.test.images.numpy().tobytes()).hexdigest()[:16]
        return TaskResult.from_samples({"accuracy": right.double().tolist()}, digest)

    def flops(self, model: nn.Module) -> Flops:
        """Operations for one image; masked weights are not among the sparse ones."""
        data = self._fitting(model)
        total = count(model, (data.normalised(data.test.images[:1]),)).total
        return Flops(total.flops, total.flops_kept)

    def _fitting(self, model: nn.Module) -> Images:
        data = load_images(self.images)
        channels, classes = data.test.images.shape[1], int(data.test.labels.max()) + 1
        first = next((p for p in model.parameters() if p.dim() == 4), None)
        if first is not None and first.shape[1] != channels:
            raise TaskError(
                f"{self.name} has images of {channels} channels and {classes} classes; the first convolution "
                f"of this {type(model).__name__} takes {first.shape[1]} channels"
            )
        try:
            with torch.no_grad(), eval_mode(model):
                logits = model(data.normalised(data.test.images[:1]))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            shape = tuple(data.test.images.shape[1:])
            raise TaskError(
                f"{self.name} has images {shape}, which {type(model).__name__} does not take: {error}"
            ) from error
        if logits.shape[1] != classes:
            raise TaskError(
                f"{self.name} has {classes} classes, this {type(model).__name__} {logits.shape[1]}. Give it "
                f"a new head: zoo finetune vision --model NAME --dataset {self.images} --out DIR."
            )
        return data


@register_task
class Digits(Classification):
    """scikit-learn's digits: 500 test images of 8x8."""

    name, images = "vision/digits", "digits"


@register_task
class CifarJpeg(Classification):
    """CIFAR-10 as JPEG copies: 10,000 test images; never compared with results on true pixels."""

    name, images = "vision/cifar10-jpeg", "cifar10-jpeg"


@register_task
class CifarTrue(Classification):
    """CIFAR-10, the 932 test images whose true pixels are at hand."""

    name, images = "vision/cifar10-true", "cifar10-true"


@register_task
class ImageNetPhotos(Classification):
    """1,000 ImageNet photos, one of each class, probably from its training set: to check weights by, not to
    compare with papers."""

    name, images = "vision/imagenet-one-per-class", "imagenet-one-per-class"

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Top-1 and top-5 accuracy with their standard errors."""
        data = self._fitting(model)
        found = ranks(model, data, data.test, batch=10)
        digest = hashlib.sha256(data.test.images.numpy().tobytes()).hexdigest()[:16]
        samples = {"accuracy": (found == 0).double().tolist(), "top5": (found < 5).double().tolist()}
        return TaskResult.from_samples(samples, digest)


@register_task
class Own(Classification):
    """The test images of a folder of your own, `images:FOLDER`, or of a plug-in's set, `images:NAME`."""

    name = "images"

    def __init__(self, images: str) -> None:
        self.images, self.name = images, f"images:{images}"

    def accepts(self, card: Any) -> bool:
        """Any model of the domain; one with other classes is refused when it is run."""
        return bool(card.domain == self.domain)


def measured_on_images(dataset: str) -> tuple[str, Source]:
    """The task that is measured on images by name or folder, and what a card says of them."""
    source = source_named(dataset)
    return (f"vision/{dataset}" if f"vision/{dataset}" in TASKS else f"images:{dataset}"), source
