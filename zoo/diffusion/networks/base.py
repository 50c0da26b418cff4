"""Base of the papers' networks: a network that knows what it learns from, and data that are drawn."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from diffusers.models.attention import BasicTransformerBlock
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import TaskError
from zoo.harness.tasks import Flops, Task
from zoo.shared.measure.account import count
from zoo.shared.train import Job, Recipe

N = TypeVar("N", bound="PaperNetwork")
Draw = Callable[[int, torch.Generator], tuple[Tensor, ...]]


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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
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


@dataclass(frozen=True)
class Drawn:
    """Batches that a function draws: (count, generator) -> tensors.

    Args:
        make: draws so many samples.
        inputs: how many of its tensors the model takes, for counting operations.
        batch: samples per step.
        steps: per epoch.
    """

    make: Draw
    inputs: int = 1
    batch: int = 64
    steps: int = 50

    def __len__(self) -> int:
        return self.steps

    def sized(self, batch: int) -> Drawn:
        """The same data in batches of another size."""
        return dataclasses.replace(self, batch=batch)

    def draw(self, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        """The batches of one epoch."""
        for _ in range(self.steps):
            yield self.make(self.batch, generator)

    def example(self) -> tuple[Tensor, ...]:
        """One sample, as the model takes it."""
        return self.make(1, torch.Generator().manual_seed(0))[: self.inputs]


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


class NetworkTask(Task):
    """A task for one kind of network.

    Attributes:
        network: the class.
    """

    domain = "diffusion"
    network: ClassVar[type[PaperNetwork]]

    def accepts(self, card: Any) -> bool:
        """Models that were measured on this."""
        return card.domain == self.domain and any(m.task == self.name for m in card.metrics)

    def fitting(self, model: nn.Module) -> Any:
        """The model itself.

        Raises:
            TaskError: it is of another kind.
        """
        if not isinstance(model, self.network):
            raise TaskError(f"{self.name} takes a {self.network.__name__}; received {type(model).__name__}")
        return model

    @abstractmethod
    def example(self, model: Any) -> tuple[Any, ...]:
        """One sample, as the model takes it."""

    def flops(self, model: nn.Module) -> Flops:
        """Operations of one pass over one sample."""
        total = count(model, self.example(self.fitting(model))).total
        return Flops(total.flops, total.flops_kept)
