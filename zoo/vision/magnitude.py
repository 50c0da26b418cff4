"""Magnitude pruning of a trained network: at once or gradually, with any allocation over the layers.

Global magnitude (Gupta et al., arXiv 2209.14624) pools all weights; uniform, Erdos-Renyi and layer-adaptive
(LAMP) allocations stand beside it, and a random choice at the same budget as the control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zoo.shared.pruning.budgets import BUDGETS, Budget, Floor
from zoo.shared.pruning.schedules import Cubic, OneShot, Schedule
from zoo.shared.pruning.scores import SCORES, Score
from zoo.shared.pruning.sparsifier import Sparsifier
from zoo.vision.base import Pruned, VisionMethod
from zoo.vision.models import Classifier
from zoo.vision.train import Trainer

Allocation = Literal["global", "uniform", "erk", "lamp"]
UPDATES = 20  # of a gradual schedule


@dataclass
class MagnitudePruning(VisionMethod):
    """Cut the smallest weights of a trained network and train on with the zeros held.

    `floor` is the minimum threshold of Global Magnitude Pruning (its 0.05 % is 0.0005). Where the paper then
    scales all layers' sparsities alike, the other layers here share one new global threshold.
    """

    allocation: Allocation = "global"
    """How much is cut where: by one global threshold, the same share everywhere, Erdos-Renyi-kernel, or one
    global threshold on layer-adaptive magnitudes."""

    floor: float = 0.0
    """Least weights that every layer keeps (or all it has), as a share of all weights: against layers that
    lose everything."""

    gradual: bool = False
    """Cut over the first 60 % of the steps, by a cubic schedule, instead of at once."""

    score: Literal["magnitude", "random"] = "magnitude"
    """`random` is the control: the same counts per layer as the allocation gives for random scores."""

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        lamp = self.allocation == "lamp"
        score: Score = SCORES["lamp" if lamp and self.score == "magnitude" else self.score]()
        budget: Budget = BUDGETS["global" if lamp else self.allocation]()
        if self.floor:
            budget = Floor(budget, kept=0, share=self.floor)
        fit = trainer.fit(model)
        ramp_end = max(1, int(0.6 * fit.steps))
        schedule: Schedule = Cubic(self.sparsity, ramp_end) if self.gradual else OneShot(self.sparsity)
        with Sparsifier(
            model,
            fit.optimizer,
            schedule=schedule,
            score=score,
            budget=budget,
            seed=self.seed,
            every=max(1, ramp_end // UPDATES),
        ) as sparsifier:
            fit.run(sparsifier.step)
        return Pruned(model)
