"""Sparse model soups (Zimmer et al., ICLR 2024): averages of networks retrained from one mask."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from torch import nn

from zoo.errors import ConfigError
from zoo.methods.training import Pruned, TrainingMethod, run_model, share_of_recipe
from zoo.shared.pruning.schedules import Exponential
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.averaging import average_models, recalibrate_norms
from zoo.shared.train import Job


@dataclass
class SparseSoup(TrainingMethod):
    """Prune, retrain copies that differ in seed and rate, average them, and go on from the average.

    The recipe's epochs are those of one copy over all phases: the whole costs `members` times as much.
    """

    phases: int = 2
    """Prunings; each cuts the same share of what is left."""

    members: int = 3
    """Copies that are retrained in each phase."""

    rates: tuple[float, ...] = (1.0,)
    """Factors of the learning rate, which the members take in turn."""

    soup: Literal["uniform", "greedy"] = "uniform"
    """All copies, or the best by the job's score and each further one that does not harm it."""

    recalibrate: bool = True
    """Measure the batch norms' statistics anew after averaging."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        available = job.recipe.steps or job.recipe.epochs
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError(f"rates are positive factors, at least one; received {self.rates}")
        if self.phases < 1 or self.members < 2 or available < self.phases:
            raise ConfigError(
                f"a soup needs a phase, two members and an epoch per phase; received {self.phases}, "
                f"{self.members} and {available}"
            )
        level = Exponential(self.sparsity, self.phases) if self.sparsity else (lambda phase: 0.0)
        for phase in range(1, self.phases + 1):
            sparsify(model, sparsity=level(phase))
            model = self.average(self.retrained(model, job, phase), job)
        return Pruned(model)

    def retrained(self, model: nn.Module, job: Job, phase: int) -> list[nn.Module]:
        """The members of a phase."""
        members = [copy.deepcopy(model) for _ in range(self.members)]
        for index, member in enumerate(members):
            job.fit_masked(
                member,
                seed=job.seed * 1000 + phase * 100 + index,
                lr=job.recipe.lr * self.rates[index % len(self.rates)],
                **share_of_recipe(job, self.phases),
            )
        return members

    def average(self, members: list[nn.Module], job: Job) -> nn.Module:
        """The soup of the members.

        Raises:
            ConfigError: a greedy one, and the job has no score.
        """
        if self.soup == "uniform":
            return self._blend(members, job)
        score = job.score
        if score is None:
            raise ConfigError("a greedy soup needs a score on validation data: Job(..., score=...)")
        ranked = sorted(members, key=score, reverse=True)
        chosen, best = [ranked[0]], ranked[0]
        for candidate in ranked[1:]:
            blend = self._blend([*chosen, candidate], job)
            if score(blend) >= score(best):
                chosen, best = [*chosen, candidate], blend
        return best

    def _blend(self, members: list[nn.Module], job: Job) -> nn.Module:
        blend = average_models(members)
        if self.recalibrate:
            recalibrate_norms(blend, job.sample(20), run_model(job))
        return blend
