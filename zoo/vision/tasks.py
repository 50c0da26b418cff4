"""Image classification on the domain's sets, as harness tasks."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

from torch import nn

from zoo.errors import TaskError
from zoo.harness.tasks import Flops, Progress, Task, TaskResult, register_task
from zoo.shared.measure.account import count
from zoo.vision.data import Images, correct, load_images


class Classification(Task):
    """Top-1 accuracy on the test images of one set, whole and not augmented. Subclasses name the set."""

    domain = "vision"
    primary = "accuracy"
    images: ClassVar[str]

    def accepts(self, card: Any) -> bool:
        """Models that were measured on these images."""
        return card.domain == self.domain and any(m.task == self.name for m in card.metrics)

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
