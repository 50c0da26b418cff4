"""Sparse-IFT (Thangarasa et al., ICML 2024): a wider network, so sparse that it costs what the dense one
did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from zoo.methods.moving import train_with_moving_masks
from zoo.methods.training import Pruned, TrainingMethod, example_of
from zoo.shared.errors import BudgetError, MaskError
from zoo.shared.masks import masks_of, set_masks
from zoo.shared.measure.account import count
from zoo.shared.pruning.budgets import Uniform
from zoo.shared.pruning.choose import random_masks
from zoo.shared.pruning.inventory import inner_weights
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job
from zoo.shared.train.device import device_of


def forward_macs(model: nn.Module, example: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of one forward pass with the masks that the model carries."""
    return count(model, example).total.macs_kept


@dataclass
class SparseIFT(TrainingMethod):
    """Sparse-Wide: every inner width times 1 / sqrt(1 - sparsity), every inner weight at `sparsity`, trained
    from fresh weights under masks that move.

    The model must know its wider relative: `model.wider(factor) -> nn.Module`. Inner layers then cost what
    the dense ones did. The first and the last layer are dense and wider, too, so that `sparsity` is raised
    until the whole network costs no more than the dense one: equal FLOPs are counted, not assumed.
    """

    recipe: ClassVar[Mapping[str, Any]] = {**TrainingMethod.recipe, "lr": 0.1}

    sparsity: float = 0.75
    """Share of zeros of the inner weights from which the width follows."""

    growth: Literal["rigl", "set", "static"] = "rigl"
    """How masks move: grow where the dense gradient is largest, at random, or not at all."""

    fraction: float = 0.3
    """Share of the kept weights that move at first."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        wide = self.widened(model, job)
        names = inner_weights(wide)
        level = self.matched(model, wide, names, job)
        train_with_moving_masks(
            wide, job, level, growth=self.growth, budget=Uniform(), names=names, fraction=self.fraction
        )
        return Pruned(wide)

    def widened(self, model: nn.Module, job: Job) -> nn.Module:
        """The fresh wide network.

        Raises:
            MaskError: the model has no wider relative, or masks that have no place in it.
        """
        if not callable(wider := getattr(model, "wider", None)):
            raise MaskError(
                f"Sparse-IFT trains a wider network in place of the given one; {type(model).__name__} has no "
                "method wider(factor) that makes it; give it one, or use another method"
            )
        if masks_of(model):
            raise MaskError(
                "the model carries masks, which have no place in a wider network; start from the dense "
                "model, or give them up by set_masks(model, None)"
            )
        with seeded(job.seed):
            made: nn.Module = wider((1 - self.sparsity) ** -0.5)
        return made.to(device_of(model))

    def matched(self, model: nn.Module, wide: nn.Module, names: list[str], job: Job) -> float:
        """The least sparsity of the inner weights at which the wide network costs no more than the dense
        one.

        Raises:
            BudgetError: its dense layers alone cost more.
        """
        example = example_of(job)
        goal = forward_macs(model, example)
        low, high = 0.0, 1.0
        shapes = {name: tuple(wide.get_parameter(name).shape) for name in names}
        for _ in range(20):
            middle = (low + high) / 2
            set_masks(wide, None)
            set_masks(wide, random_masks(wide, Uniform().allocate(shapes, middle), job.seed))
            fits = forward_macs(wide, example) <= goal
            low, high = (low, middle) if fits else (middle, high)
        set_masks(wide, None)
        if high > 0.999:
            raise BudgetError(
                f"at {self.sparsity} the wide network's first and last layers alone cost more than the dense "
                "network; choose a lower sparsity"
            )
        return high
