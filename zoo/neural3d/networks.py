"""What the papers' networks share: data that a function draws, fresh weights, the maker of bundles, tasks."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.errors import TaskError
from zoo.harness.tasks import Flops, Task
from zoo.methods.contract import Sparsified
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet
from zoo.shared.measure.account import count

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Drawn:
    """Batches that a function draws: what `zoo.shared.train.Fit` takes.

    Args:
        make: (samples, generator) -> a batch.
        batch: samples per step.
        steps: per epoch.
    """

    make: Callable[[int, torch.Generator], Any]
    batch: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def draw(self, generator: torch.Generator) -> Iterator[Any]:
        """The batches of one epoch."""
        for _ in range(self.steps):
            yield self.make(self.batch, generator)

    def example(self) -> tuple[Tensor, ...]:
        """One sample."""
        return (self.make(1, torch.Generator().manual_seed(0)),)


def fresh(kind: Callable[..., N], seed: int, **arguments: Any) -> N:
    """A network with the weights of a seed; the random state outside stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**arguments)


def network(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """Maker: the row's architecture, trained as its own `trained(seed, **recipe)` says."""
    kind: Any = ARCHITECTURES.get(str(row.architecture))
    return Sparsified(kind.trained(seed, **row.arguments, **row.recipe).eval(), MaskSet({}))


class NetworkTask(Task):
    """A task for one kind of network.

    Attributes:
        network: the class.
    """

    domain = "neural3d"
    network: ClassVar[type[nn.Module]]

    def accepts(self, card: Any) -> bool:
        """Models that were measured on this."""
        return card.domain == self.domain and any(m.task == self.name for m in card.metrics)

    def fitting(self, model: nn.Module) -> Any:
        """A copy of the model in single precision, whatever its weights are stored in.

        Raises:
            TaskError: it is of another kind.
        """
        if not isinstance(model, self.network):
            raise TaskError(f"{self.name} takes a {self.network.__name__}; received {type(model).__name__}")
        return copy.deepcopy(model).float()

    @abstractmethod
    def measured_on(self) -> Any:
        """The samples."""

    @abstractmethod
    def example(self, model: Any) -> tuple[Any, ...]:
        """One sample, as the model takes it."""

    def flops(self, model: nn.Module) -> Flops:
        """Operations of one pass over one sample."""
        own = self.fitting(model)
        total = count(own, self.example(own)).total
        return Flops(total.flops, total.flops_kept)
