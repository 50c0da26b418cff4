"""Magnitude pruning of a trained network: at once or gradually, with any allocation over the layers.

Global magnitude (Gupta et al., arXiv 2209.14624) pools all weights; uniform, Erdos-Renyi and layer-adaptive
(LAMP) allocations stand beside it, and a random choice at the same budget as the control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from zoo.errors import ConfigError
from zoo.methods.training import Pruned, TrainingMethod, train_gradually
from zoo.shared.pruning.budgets import BUDGETS, Budget, Floor
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.train import Job


@dataclass
class MagnitudePruning(TrainingMethod):
    """Cut the smallest weights of a trained network and train on with the zeros held; without a job, only
    cut.

    `floor` is the minimum threshold of Global Magnitude Pruning (its 0.05 % is 0.0005). Where the paper then
    scales all layers' sparsities alike, the other layers here share one new global threshold.
    """

    needs_job: ClassVar[bool] = False

    allocation: Literal["global", "uniform", "erk", "lamp"] = "global"
    """How much is cut where: by one global threshold, the same share everywhere, Erdos-Renyi-kernel, or one
    global threshold on layer-adaptive magnitudes."""

    floor: float = 0.0
    """Least weights that every layer keeps (or all it has), as a share of all weights: against layers that
    lose everything."""

    gradual: bool = False
    """Cut over the first 60 % of the steps, by a cubic schedule, instead of at once."""

    score: Literal["magnitude", "random"] = "magnitude"
    """`random` is the control: the same counts per layer as the allocation gives for random scores."""

    def axes(self) -> dict[str, Any]:
        """Score and budget that the options name."""
        lamp = self.allocation == "lamp"
        budget: Budget = BUDGETS["global" if lamp else self.allocation]()
        return {
            "score": "lamp" if lamp and self.score == "magnitude" else self.score,
            "budget": Floor(budget, kept=0, share=self.floor) if self.floor else budget,
        }

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        if self.gradual:
            train_gradually(model, job, self.sparsity, **self.axes())
        else:
            sparsify(model, sparsity=self.sparsity, seed=job.seed, **self.axes())
            job.fit_masked(model)
        return Pruned(model)

    def prune_at_once(self, model: nn.Module) -> nn.Module:
        if self.gradual:
            raise ConfigError("gradual pruning trains and needs a job; leave `gradual` out to cut at once")
        sparsify(model, sparsity=self.sparsity, **self.axes())
        return model
