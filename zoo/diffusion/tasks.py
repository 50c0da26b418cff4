"""Tasks: do images show the prompt, are they like real ones, how far from the dense model's, at what cost?"""

from __future__ import annotations

import hashlib
import time
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.bundles.catalog import find
from zoo.bundles.store import load_bundle
from zoo.diffusion.classifier import frechet_distance, load_judge
from zoo.diffusion.data import load_pictures
from zoo.diffusion.flows import Flow
from zoo.diffusion.latents import LATENT_SHAPE
from zoo.diffusion.models import TextToImage
from zoo.diffusion.paired import drift, images_of
from zoo.errors import TaskError
from zoo.harness.tasks import Flops, Measure, Progress, Task, TaskResult, register_task
from zoo.shared.measure.account import count
from zoo.shared.measure.peak import peak_bytes

IMAGES = 500
STEPS = 10
BATCH = 100
DRIFTS = 200
ROUNDS = 5
SAMPLED = ("diffusion/text-to-image", "diffusion/mlp-flow", "diffusion/unet-flow")


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
        made = network.decoded(images_of(network, noise, steps=STEPS, batch=BATCH, progress=progress))
        return F.adaptive_avg_pool2d(made, load_pictures(self.pictures).shape[-2:]), labels

    def noise(self) -> tuple[Tensor, Tensor]:
        """The fixed starting noise, and the class of each prompt."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn((IMAGES, *self.sampled_shape()), generator=generator), torch.arange(IMAGES) % 10

    def sampled_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what a model samples."""
        return load_pictures(self.pictures).shape

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
        shape = self.sampled_shape()
        if model.sample_shape != shape:
            raise TaskError(f"{self.name} samples values of {shape}; this model makes {model.sample_shape}")
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
class MnistLatents(TextToImageTask):
    """Prompts of the digits, drawn in TAEF2's latent space, decoded, brought to 16x16 and judged on MNIST."""

    name, pictures = "diffusion/t2i-latents", "mnist"

    def sampled_shape(self) -> tuple[int, int, int]:
        """Of the latents of 32x32 images."""
        return LATENT_SHAPE


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


class Drift(Task):
    """How far the images of 200 noises are from those that the dense model makes of the same noises.

    Metric: `drift`, the mean squared difference of an image in [-1, 1], with a value per image (lower is
    better; the dense model has none).
    """

    domain, primary, higher_is_better = "diffusion", "drift", False
    dense: ClassVar[str]

    def accepts(self, card: Any) -> bool:
        """The dense model, and those that stand beside it."""
        return card.domain == self.domain and self.dense in (card.name, card.dense_twin)

    def measured_on(self) -> str:
        """The digest of the dense model's weights."""
        return find(self.dense).card.weights.sha256

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Sample both and compare image by image."""
        dense = load_bundle(find(self.dense)).eval()
        if not isinstance(dense, TextToImage | Flow):
            raise TaskError(f"{self.dense} is a {type(dense).__name__}, which makes no images of noise")
        kind, shape = TextToImage if isinstance(dense, TextToImage) else Flow, dense.sample_shape
        if not isinstance(model, kind) or model.sample_shape != shape:
            raise TaskError(
                f"{self.name} takes a {kind.__name__} of images of {shape}; received {type(model).__name__}"
            )
        noise = torch.randn((DRIFTS, *shape), generator=torch.Generator().manual_seed(0))
        own = images_of(model, noise, steps=STEPS, batch=BATCH, progress=progress)
        distances = drift(own, images_of(dense, noise, steps=STEPS, batch=BATCH))
        return TaskResult.from_samples({"drift": distances.tolist()}, f"{DRIFTS}/{STEPS}/0")


@register_task
class DriftDigits(Drift):
    """Drift from the dense text-to-image model of the digits, the digits in turn."""

    name, dense = "diffusion/drift-t2i-digits", "diffusion/dense-t2i-digits"


@register_task
class DriftFlow(Drift):
    """Drift from the dense flow of the digits; each flow takes its own number of steps."""

    name, dense = "diffusion/drift-flow-digits", "diffusion/dense-flow-digits"


@register_task
class SamplingCost(Task):
    """Time and memory of sampling ten images at once: ten steps of a text-to-image model, a flow's own steps.

    Metrics: `seconds` of a run on this machine, each of five after a first one, and `peak_bytes`, the most
    that the tensors of a run take at once beside the weights, which is the same each time (lower is better).
    """

    name, domain, primary, higher_is_better = "diffusion/sampling-cost", "diffusion", "seconds", False
    repeatable = False

    def accepts(self, card: Any) -> bool:
        """Text-to-image models and flows."""
        return card.domain == self.domain and card.architecture.name in SAMPLED

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Run once for the memory, then for the time."""
        if not isinstance(model, TextToImage | Flow):
            raise TaskError(f"{self.name} takes text-to-image models and flows; got a {type(model).__name__}")
        noise = torch.randn((10, *model.sample_shape), generator=torch.Generator().manual_seed(0))
        peak, seconds = peak_bytes(lambda: images_of(model, noise, steps=STEPS)), []
        for done in range(ROUNDS):
            if progress is not None:
                progress(done, ROUNDS, "sampling")
            start = time.perf_counter()
            images_of(model, noise, steps=STEPS)
            seconds.append(time.perf_counter() - start)
        result = TaskResult.from_samples({"seconds": seconds})
        result.metrics["peak_bytes"] = Measure(float(peak))
        return result


def flow_distances(made: Tensor, pictures: str) -> dict[str, float]:
    """Frechet distances of images to a set's test images, by the classifier's features and by pixels."""
    judge, real = load_judge(pictures), load_pictures(pictures).test
    with torch.no_grad():
        features = judge.features(made), judge.features(real)
    return {
        "frechet": frechet_distance(*features),
        "pixel_frechet": frechet_distance(made.flatten(1), real.flatten(1)),
    }
