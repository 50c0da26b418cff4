"""Reprogramming of frozen classifiers (Stefanski et al., 2023, for lottery tickets): a new head, or a frame.

A linear probe trains a new last layer. A visual prompt (ILM-VP, Chen et al., CVPR 2023) trains the border
around the image instead and reads the source's own classes by a map that is found anew before each epoch.
What the released code does wrong is done right here: the best epoch is not chosen on test data, and the
calibration error is that of probabilities over all samples.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError, DataError
from zoo.shared.measure.modes import eval_mode
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job


class Frozen(nn.Module):
    """A network in eval mode, whatever is asked of it, without gradients of its weights."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.net.eval()
        return self


class Prompt(Frozen):
    """Images [n, c, h, w] in [0, 1] in the middle of a learned frame, to logits of target classes.

    Args:
        net: the source: images of `side` pixels to logits.
        side: of the frame, larger than the images.
        channels: of the frame.
        mean, std: by which the source's images are normalised.
        classes: of the target, no more than those of the source.
    """

    def __init__(
        self, net: nn.Module, side: int, channels: int, mean: Tensor, std: Tensor, classes: int
    ) -> None:
        super().__init__(net)
        self.side = side
        self.border = nn.Parameter(torch.zeros(channels, side, side))
        self.mean: Tensor
        self.std: Tensor
        self.places: Tensor
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1))
        self.register_buffer("places", torch.arange(classes))

    def source_logits(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n sources"]:
        """Logits of all classes of the source.

        Raises:
            ConfigError: a frame that is not larger than the images.
        """
        height, width = images.shape[2:]
        if max(height, width) >= self.side:
            raise ConfigError(f"a frame of {self.side} pixels is not larger than images of {height}x{width}")
        top, left = (self.side - height) // 2, (self.side - width) // 2
        framed = self.border.sigmoid().expand(len(images), -1, -1, -1).clone()
        framed[:, :, top : top + height, left : left + width] = images
        found: Tensor = self.net((framed - self.mean) / self.std)
        return found

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        return self.source_logits(images)[:, self.places]


class Probe(Frozen):
    """A network with a new last linear layer for other classes."""

    def __init__(self, net: nn.Module, classes: int, seed: int) -> None:
        super().__init__(net)
        name, old = [(n, m) for n, m in self.net.named_modules() if isinstance(m, nn.Linear)][-1]
        with seeded(seed):
            self.net.set_submodule(name, nn.Linear(old.in_features, classes))

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        found: Tensor = self.net(images)
        return found


def class_map(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], sources: int, classes: int) -> Tensor:
    """The source class of each target class: of the counts of pairs the largest is taken, its row and column
    are struck out, and again.

    Raises:
        ConfigError: more target than source classes.
        DataError: a target class without a sample.
    """
    if classes > sources:
        raise ConfigError(f"{classes} target classes cannot be read from {sources} source classes")
    if len(missing := set(range(classes)) - set(labels.tolist())):
        raise DataError(f"target class {min(missing)} has no sample to find its source class by")
    counts = torch.zeros(sources, classes)
    counts.index_put_((predicted, labels), torch.ones(len(labels)), accumulate=True)
    found = torch.zeros(classes, dtype=torch.long)
    for _ in range(classes):
        source, target = divmod(int(counts.argmax()), classes)
        found[target] = source
        counts[source], counts[:, target] = -1.0, -1.0
    return found


def train_prompt(prompt: Prompt, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], job: Job) -> Prompt:
    """Train the frame on all samples of a target, in place; the map of classes is found before each epoch."""

    def find(_: object) -> None:
        with torch.no_grad(), eval_mode(prompt):
            logits = prompt.source_logits(x)
        prompt.places = class_map(logits.argmax(1), y, logits.shape[1], len(prompt.places))

    find(None)
    job.fit(prompt, parameters=[prompt.border]).run(on_epoch=find)
    return prompt.eval()


def train_probe(probe: Probe, job: Job) -> Probe:
    """Train the new head, in place."""
    job.fit(probe, parameters=[p for p in probe.parameters() if p.requires_grad]).run()
    return probe.eval()


def calibration_error(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): mean |accuracy - confidence| of the samples' bins."""
    sure, best = functional.softmax(logits, 1).max(1)
    place = (sure * bins).ceil().long().clamp(1, bins) - 1
    right = (best == labels).double()
    gap = torch.zeros(bins, dtype=torch.double).index_add_(0, place, right - sure.double())
    return float(gap.abs().sum() / len(labels))
