"""Sparse-IFT (Thangarasa et al., ICML 2024): a wider network, so sparse that it costs what the dense one
did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from zoo.shared.errors import BudgetError
from zoo.shared.masks import set_masks
from zoo.shared.measure.account import count
from zoo.shared.pruning.budgets import Budget, Uniform
from zoo.shared.pruning.regrow import SET, RigL
from zoo.shared.pruning.sparsifier import Sparsifier
from zoo.vision.base import Pruned, VisionMethod, inner_weights
from zoo.vision.models import Classifier, device_of, seeded
from zoo.vision.random_pruning import random_masks
from zoo.vision.train import Trainer, step_macs


def forward_macs(model: nn.Module, example: tuple[torch.Tensor, ...]) -> int:
    """Multiply-accumulates of one forward pass with the masks that the model carries."""
    return count(model, example).total.macs_kept


@dataclass
class SparseIFT(VisionMethod):
    """Sparse-Wide: every inner width times 1 / sqrt(1 - sparsity), every inner weight at `sparsity`, trained
    from fresh weights under masks that move.

    Inner layers then cost what the dense ones did. The first and the last layer are dense and wider, too, so
    that `sparsity` is raised until the whole network costs no more than the dense one: equal FLOPs are
    counted, not assumed.
    """

    sparsity: float = 0.75
    """Share of zeros of the inner weights from which the width follows."""

    growth: Literal["rigl", "set", "static"] = "rigl"
    """How masks move: grow where the dense gradient is largest, at random, or not at all."""

    fraction: float = 0.3
    """Share of the kept weights that move at first."""

    lr: float = 0.1
    """Peak of the learning rate of SGD."""

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        example = trainer.fit(model).batches.example()
        wide = self.widened(model)
        names = inner_weights(wide)
        budget: Budget = Uniform()
        level = self.matched(model, wide, names, example)
        fit = trainer.fit(wide)
        end = max(1, int(0.75 * fit.steps))
        every = max(1, end // 25)
        rules = {"rigl": RigL(end, self.fraction), "set": SET(end, self.fraction), "static": None}
        if self.growth == "rigl":  # the steps before an update need the dense weight gradient
            fit.macs = lambda: (
                (1 - 1 / every) * step_macs(wide, example) + step_macs(wide, example, True) / every
            )
        with Sparsifier(
            wide,
            fit.optimizer,
            sparsity=level,
            score="random",
            budget=budget,
            regrow=rules[self.growth],
            names=names,
            every=every,
            seed=self.seed,
        ) as sparsifier:
            fit.run(sparsifier.step)
        return Pruned(wide)

    def widened(self, model: Classifier) -> Classifier:
        """The fresh wide network."""
        with seeded(self.seed):
            return model.wider((1 - self.sparsity) ** -0.5).to(device_of(model))

    def matched(
        self, model: Classifier, wide: Classifier, names: list[str], example: tuple[torch.Tensor, ...]
    ) -> float:
        """The least sparsity of the inner weights at which the wide network costs no more than the dense
        one.

        Raises:
            BudgetError: its dense layers alone cost more.
        """
        goal = forward_macs(model, example)
        low, high = 0.0, 1.0
        shapes = {name: tuple(wide.get_parameter(name).shape) for name in names}
        for _ in range(20):
            middle = (low + high) / 2
            set_masks(wide, random_masks(wide, Uniform().allocate(shapes, middle), self.seed))
            fits = forward_macs(wide, example) <= goal
            low, high = (low, middle) if fits else (middle, high)
        set_masks(wide, None)
        if high > 0.999:
            raise BudgetError(
                f"at {self.sparsity} the wide network's first and last layers alone cost more than the dense "
                "network; choose a lower sparsity"
            )
        return high
