"""Methods: what `zoo sparsify --method NAME` does. A method is a dataclass whose fields are its options.

A domain or another package registers one in `zoo.registry.METHODS` (entry points: `zoo.methods`):

    @dataclass
    class MyMethod:
        sparsity: float = 0.9

        def sparsify(self, model: nn.Module) -> Sparsified: ...
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from zoo.shared.masks import MaskSet
from zoo.shared.pruning.sparsifier import sparsify


@dataclasses.dataclass(frozen=True)
class Sparsified:
    """What a method made of a model.

    Attributes:
        model: with zeros where the masks drop; may be another object than the one given.
        masks: of its parameters.
        extras: further tensors that belong to it; a boolean `edges/keep` is the mask of the part `edges`.
        hyperparameters: for the card.
        parts: for the card, parts of the sparsity that have no mask among the above: name -> kept, total,
            pattern.
        arguments: of the architecture, where the model is no longer of the shapes of the one given; None
            leaves those on the card.
    """

    model: nn.Module
    masks: MaskSet
    extras: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    hyperparameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    arguments: dict[str, Any] | None = None


@runtime_checkable
class Method(Protocol):
    """A dataclass with this method."""

    def sparsify(self, model: nn.Module) -> Sparsified: ...


@dataclasses.dataclass
class Prune:
    """Prune at once by any pattern, score and budget, without data and without training.

    The scores here need the weights alone; `zoo.shared.pruning.sparsifier` has those that need gradients
    or activations,
    and schedules over training.
    """

    sparsity: float | None = None
    """Share of zeros over the pruned weights, from 0 up to 1; N:M patterns fix it themselves."""

    pattern: str = "unstructured"
    """Where zeros may lie: unstructured, 2:4 (any N:M), block4x1, channel0, whole."""

    score: Literal["magnitude", "lamp", "random"] = "magnitude"
    """Which weights matter."""

    budget: Literal["global", "uniform", "erk", "er"] = "global"
    """How much is pruned in which layer."""

    names: tuple[str, ...] = ()
    """Which parameters, as names or globs; by default the weights of linear, convolution and embedding
    layers."""

    seed: int = 0
    """Of the random score."""

    def sparsify(self, model: nn.Module) -> Sparsified:
        """Prune `model` in place.

        Raises:
            BudgetError, PatternError, MaskError: a sparsity, pattern or name that is not possible here.
        """
        masks = sparsify(
            model,
            sparsity=self.sparsity,
            pattern=self.pattern,
            score=self.score,
            budget=self.budget,
            names=self.names or None,
            seed=self.seed,
        )
        info = getattr(model, "zoo_info", None)
        options = dataclasses.asdict(self) | {"names": list(self.names)}
        return Sparsified(model, masks, extras=dict(info.extras) if info else {}, hyperparameters=options)
