"""Lottery jackpots (Zhang et al., arXiv 2104.08700): masks searched on frozen pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from zoo.methods.training import Pruned, TrainingMethod, cost_of_step, train_held
from zoo.shared.learned.gates import harden
from zoo.shared.learned.search import gate_all
from zoo.shared.pruning.choose import magnitude_masks, random_masks
from zoo.shared.train import Job

MARGIN = 0.01  # kept weights start this much above dropped ones


@dataclass
class LotteryJackpot(TrainingMethod):
    """Search which weights of a trained network to keep; no weight is trained.

    Each layer keeps what one global magnitude threshold leaves it. Scores start at 1 for kept weights and
    0.99 for dropped ones, and are trained straight through; the best of a layer are kept at every step, which
    is the published swap of the strongest dropped with the weakest kept. Norms' statistics go on moving. The
    recipe's learning rate is that of the scores.
    """

    recipe: ClassVar[Mapping[str, Any]] = {**TrainingMethod.recipe, "lr": 0.1}

    start: Literal["magnitude", "random"] = "magnitude"
    """Where the search begins: magnitude, or random at the same counts."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        masks = magnitude_masks(model, self.sparsity)
        counts = {name: mask.kept for name, mask in masks.items()}
        if self.start == "random":
            masks = random_masks(model, counts, job.seed)
        macs = cost_of_step(model, job, masks, dense_gradients=True)
        scores = {name: 1.0 - MARGIN * (~mask.keep).float() for name, mask in masks.items()}
        gates = gate_all(model, scores, counts)
        train_held(job.fit(model, parameters=[gate.logits for gate in gates.values()], macs=lambda: macs))
        harden(model)
        return Pruned(model)
