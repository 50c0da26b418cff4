"""Sparse training from fresh weights under a random mask (Liu et al., ICLR 2022).

What random pruning shows is that the shares of the layers matter more than which weights: the ratios are
uniform, Erdos-Renyi and its relatives, or those that SNIP and GraSP would give, with positions drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from zoo.methods.training import Pruned, TrainingMethod
from zoo.shared.masks import tighten
from zoo.shared.pruning.budgets import ratio_budget
from zoo.shared.pruning.choose import random_masks, select_parameters
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.relatives import copied, reinitialised
from zoo.shared.train import Job

Ratio = Literal["uniform", "uniform+", "er", "erk", "erk+", "snip", "grasp"]


@dataclass
class RandomPruning(TrainingMethod):
    """Draw masks before training, then train fresh weights with them held."""

    ratio: Ratio = "erk"
    """Shares of the layers."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        fresh = reinitialised(model, job.seed)
        tighten(fresh, random_masks(fresh, self.counts(fresh, job), job.seed))
        job.fit_masked(fresh)
        return Pruned(fresh)

    def counts(self, model: nn.Module, job: Job) -> dict[str, int]:
        """Kept weights of each layer of a fresh model; SNIP and GraSP score it on ten batches."""
        if self.ratio in ("snip", "grasp"):
            masks = sparsify(
                copied(model),
                sparsity=self.sparsity,
                score=self.ratio,
                batches=job.sample(10),
                loss_fn=job.loss,
            )
            return {name: mask.kept for name, mask in masks.items()}
        shapes = {name: tuple(weight.shape) for name, weight in select_parameters(model, None).items()}
        return ratio_budget(list(shapes), self.ratio).allocate(shapes, self.sparsity)
