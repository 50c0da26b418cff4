"""Text-to-image tasks: does the image show what the prompt says, and are the images like real ones?"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.diffusion.classifier import frechet_distance, load_judge
from zoo.diffusion.data import captions, load_pictures
from zoo.diffusion.flows import Flow
from zoo.diffusion.models import TextToImage
from zoo.diffusion.sampling import sample
from zoo.errors import TaskError
from zoo.harness.tasks import Flops, Measure, Progress, Task, TaskResult, register_task
from zoo.shared.measure.account import count

IMAGES = 500
STEPS = 10
BATCH = 100


class TextToImageTask(Task):
    """500 images, 50 of each class, from fixed noise in ten DDIM steps without guidance.

    Metrics: `accuracy`, the share that the classifier assigns to the class of the prompt; `frechet`, the
    Frechet distance of the classifier's features to those of as many test images (lower is better; two halves
    of the test images have a distance, too: see `floor`).
    """

    domain = "diffusion"
    primary = "accuracy"
    pictures: ClassVar[str]

    def accepts(self, card: Any) -> bool:
        """Models that were measured on these pictures."""
        return self.is_on(card)

    def direction(self, metric: str) -> int:
        """Accuracy is better high, a distance low."""
        return -1 if metric == "frechet" else 1

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Sample, classify, compare."""
        images, labels = self.images(model, progress)
        judge = load_judge(self.pictures)
        with torch.no_grad():
            right = (judge(images).argmax(1) == labels).double()
            made, real = judge.features(images), judge.features(load_pictures(self.pictures).test[:IMAGES])
        result = TaskResult.from_samples({"accuracy": right.tolist()}, self._sample_set())
        result.metrics["frechet"] = Measure(frechet_distance(made, real))
        return result

    def images(self, model: nn.Module, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """(images [500, C, H, W], classes) that the model makes of the fixed noise."""
        network = self._fitting(model)
        noise, labels = self.noise()
        made = []
        with torch.no_grad():
            for start in range(0, IMAGES, BATCH):
                if progress is not None:
                    progress(start, IMAGES, "sampling")
                ids = network.tokenise(captions(labels[start : start + BATCH]))
                condition = network.encode(ids)
                x = noise[start : start + BATCH].to(condition.dtype)
                made.append(sample(network, x, condition, steps=STEPS).float())
        return torch.cat(made), labels

    def noise(self) -> tuple[Tensor, Tensor]:
        """The fixed starting noise, and the class of each prompt."""
        shape = load_pictures(self.pictures).shape
        generator = torch.Generator().manual_seed(0)
        return torch.randn((IMAGES, *shape), generator=generator), torch.arange(IMAGES) % 10

    def floor(self) -> float:
        """The Frechet distance of as many other real images (of the training set) to the test images."""
        data, judge = load_pictures(self.pictures), load_judge(self.pictures)
        with torch.no_grad():
            pair = judge.features(data.train[:IMAGES]), judge.features(data.test[:IMAGES])
        return frechet_distance(*pair)

    def flops(self, model: nn.Module) -> Flops:
        """Operations of the denoiser and the text encoder for one sampling step of one image."""
        network = self._fitting(model)
        image = torch.zeros(1, *network.sample_shape, dtype=network.unet.dtype)
        example = image, torch.tensor([0]), network.tokenise(["one"])
        total = count(network, example).total
        return Flops(total.flops, total.flops_kept)

    def _sample_set(self) -> str:
        return hashlib.sha256(f"{self.pictures}/{IMAGES}/{STEPS}".encode()).hexdigest()[:16]

    def _fitting(self, model: nn.Module) -> TextToImage:
        if not isinstance(model, TextToImage):
            raise TaskError(f"{self.name} takes text-to-image models; received {type(model).__name__}")
        shape = load_pictures(self.pictures).shape
        if model.sample_shape != shape:
            raise TaskError(f"{self.name} has images of {shape}; this model makes {model.sample_shape}")
        return model


@register_task
class Digits(TextToImageTask):
    """Prompts of the digits, judged on scikit-learn's 8x8 images."""

    name, pictures = "diffusion/t2i-digits", "digits"


@register_task
class Mnist(TextToImageTask):
    """Prompts of the digits, judged on MNIST at 16x16."""

    name, pictures = "diffusion/t2i-mnist", "mnist"


@register_task
class FlowDigits(Task):
    """1,000 images from fixed noise in the number of steps that the flow is made for.

    Metrics: `frechet`, of the classifier's features to those of the 500 test images, and `pixel_frechet`,
    of the pixels themselves, since the classifier overlooks noise that a step left (lower is better).
    """

    name, domain, primary, higher_is_better = "diffusion/flow-digits", "diffusion", "frechet", False

    def accepts(self, card: Any) -> bool:
        """Models that were measured on it."""
        return self.is_on(card)

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Sample and compare."""
        flow = self._fitting(model)
        noise = torch.randn((1000, *flow.sample_shape), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made = flow.images(noise.to(next(flow.parameters()).dtype)).float()
        distances = flow_distances(made, self.name.rpartition("-")[2])
        metrics = {name: Measure(value) for name, value in distances.items()}
        return TaskResult(metrics, n=len(made), sample_set="digits/1000/0")

    def flops(self, model: nn.Module) -> Flops:
        """Operations of all steps of one image."""
        flow = self._fitting(model)
        total = count(flow, (torch.zeros(1, *flow.sample_shape), torch.tensor([0.0]))).total
        return Flops(flow.steps * total.flops, flow.steps * total.flops_kept)

    def _fitting(self, model: nn.Module) -> Flow:
        if not isinstance(model, Flow) or model.sample_shape != load_pictures("digits").shape:
            raise TaskError(f"{self.name} takes flows of 8x8 images; received {type(model).__name__}")
        return model


def flow_distances(made: Tensor, pictures: str) -> dict[str, float]:
    """Frechet distances of images to a set's test images, by the classifier's features and by pixels."""
    judge, real = load_judge(pictures), load_pictures(pictures).test
    with torch.no_grad():
        features = judge.features(made), judge.features(real)
    return {
        "frechet": frechet_distance(*features),
        "pixel_frechet": frechet_distance(made.flatten(1), real.flatten(1)),
    }
