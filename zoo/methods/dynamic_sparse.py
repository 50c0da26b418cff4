"""Dynamic sparse training: fresh weights under masks that move, by SET (Mocanu et al., 2018) or RigL (Evci et
al., 2020), whose rules are in `zoo.shared.pruning.regrow`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from zoo.methods.moving import train_with_moving_masks
from zoo.methods.training import Pruned, TrainingMethod
from zoo.shared.pruning.budgets import ratio_budget
from zoo.shared.pruning.inventory import prunable_parameters
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Job


@dataclass
class DynamicSparse(TrainingMethod):
    """Train fresh weights under masks that move: the smallest weights are dropped, as many grow elsewhere."""

    growth: Literal["set", "rigl"] = "rigl"
    """Grow at random (SET) or where the dense gradient is largest (RigL)."""

    ratio: Literal["uniform", "uniform+", "er", "erk", "erk+"] = "erk"
    """Shares of the layers."""

    fraction: float = 0.3
    """Share of the kept weights that move at first; RigL lets it fall to 0."""

    every: int = 0
    """Steps between moves; 0 makes 25 moves in all."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        fresh = reinitialised(model, job.seed)
        names = prunable_parameters(fresh)
        train_with_moving_masks(
            fresh,
            job,
            self.sparsity,
            growth=self.growth,
            budget=ratio_budget(names, self.ratio),
            names=names,
            fraction=self.fraction,
            every=self.every,
        )
        return Pruned(fresh)
