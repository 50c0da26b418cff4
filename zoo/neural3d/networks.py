"""What the papers' networks share: fresh weights, the maker of bundles, tasks."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.harness import network_task as harness
from zoo.methods.contract import Sparsified
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet
from zoo.shared.structure.relatives import seeded

N = TypeVar("N", bound=nn.Module)


def fresh(kind: Callable[..., N], seed: int, **arguments: Any) -> N:
    """A network with the weights of a seed; the random state outside stays as it was."""
    with seeded(seed):
        return kind(**arguments)


def network(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """Maker: the row's architecture, trained as its own `trained(seed, **recipe)` says."""
    kind: Any = ARCHITECTURES.get(str(row.architecture))
    return Sparsified(kind.trained(seed, **row.arguments, **row.recipe).eval(), MaskSet({}))


class NetworkTask(harness.NetworkTask):
    """A task for one kind of network, computed in single precision whatever its weights are stored in."""

    domain = "neural3d"

    def fitting(self, model: nn.Module) -> Any:
        """A copy of the model in single precision."""
        return copy.deepcopy(super().fitting(model)).float()

    @abstractmethod
    def measured_on(self) -> Any:
        """The samples."""
