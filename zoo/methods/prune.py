"""Pruning at once from the weights alone: any pattern, score and budget of the core."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from torch import nn

from zoo.methods.contract import Sparsified, stated_options
from zoo.shared.pruning.inventory import inventory
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.train import Job


@dataclasses.dataclass
class Prune:
    """Prune at once by any pattern, score and budget, without data and without training.

    The scores here need the weights alone; `zoo.shared.pruning.sparsifier` has those that need gradients or
    activations, and schedules over training.
    """

    needs_job: ClassVar[bool] = False

    sparsity: float | None = None
    """Share of zeros over the pruned weights, from 0 up to 1; N:M patterns fix it themselves."""

    pattern: str = "unstructured"
    """Where zeros may lie: unstructured, 2:4 (any N:M), block4x1, channel0, whole."""

    score: Literal["magnitude", "lamp", "random"] = "magnitude"
    """Which weights matter."""

    budget: Literal["global", "uniform", "erk", "er"] = "global"
    """How much is pruned in which layer."""

    names: tuple[str, ...] = ()
    """Which parameters, as names or globs; by default the weights of linear, convolution and like layers
    that the pattern fits, without embeddings, the head of a vocabulary, norms and routers."""

    seed: int = 0
    """Of the random score."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Prune `model` in place, within the masks that it carries; a job is not needed.

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
        options = stated_options(self)
        left = [weight.name for weight in inventory(model).reached if weight.name not in masks]
        if left:
            options["left_out"] = left
        return Sparsified(model, masks, extras=dict(info.extras) if info else {}, hyperparameters=options)
