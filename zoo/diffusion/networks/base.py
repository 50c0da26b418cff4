"""Base of the papers' networks: a network that knows what it learns from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from diffusers.models.attention import BasicTransformerBlock
from jaxtyping import Float
from torch import Tensor, nn

from zoo.harness import network_task as harness
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job, Recipe

N = TypeVar("N", bound="PaperNetwork")
Draw = Callable[[int, torch.Generator], tuple[Tensor, ...]]


STEPS = 50  # of an epoch: the data are drawn without end

#: What the trainings of these networks share; each says its steps, its batch and what differs.
USUAL = Recipe(lr=2e-3, optimizer="adamw", weight_decay=0.01, warmup=0.1, decay="cosine", clip=1.0)


def sine_cosine(places: Float[Tensor, "*n 2"], width: int) -> Float[Tensor, "*n width"]:
    """Sines and cosines of each coordinate at frequencies 10000^(-4k / width), k below width / 4."""
    quarter = width // 4
    rates = 10000.0 ** (-torch.arange(quarter).to(places) / quarter)
    angles = places[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


class PaperNetwork(nn.Module, ABC):
    """A network with a training of its own; `make_job` and `zoo make` ask it.

    Attributes:
        usual: the recipe of its training, unless another is given.
        full_precision: that it computes in float32, also on weights stored in float16.
    """

    usual: ClassVar[Recipe]
    full_precision: ClassVar[bool] = True

    @classmethod
    def fresh(cls: type[N], seed: int, **arguments: Any) -> N:
        """The network with the fresh weights of a seed; the random state outside stays as it was."""
        with seeded(seed):
            return cls(**arguments)

    @abstractmethod
    def make_job(
        self, dataset: str, *, recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Job:
        """The job that trains the network, or goes on training one.

        Raises:
            DataError: an unknown data set, or files that are not there.
        """

    def learn(
        self, dataset: str, *, recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Job:
        """Train from the start, all stages; arguments and errors as for `make_job`.

        Returns:
            The job of the last stage, with the cost of all.
        """
        job = self.make_job(dataset, recipe=recipe, seed=seed, device=device)
        job.fit(self).run()
        self.eval()
        return job


def picked(images: Tensor) -> Draw:
    """Draws images uniformly, with repetition."""
    return lambda n, generator: (images[torch.randint(len(images), (n,), generator=generator)],)


def transformer(width: int, depth: int, heads: int = 4, **options: Any) -> nn.ModuleList:
    """Pre-norm transformer blocks of diffusers with GELU feed-forwards."""
    blocks = (
        BasicTransformerBlock(width, heads, width // heads, activation_fn="gelu", **options)
        for _ in range(depth)
    )
    return nn.ModuleList(blocks)


class NetworkTask(harness.NetworkTask):
    """A task for one kind of network of the papers."""

    domain = "diffusion"
    network: ClassVar[type[PaperNetwork]]
