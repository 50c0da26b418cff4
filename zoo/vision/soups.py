"""Sparse model soups (Zimmer et al., ICLR 2024): averages of networks retrained from one mask."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from zoo.errors import ConfigError
from zoo.shared.pruning.schedules import Exponential
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.averaging import average_models, recalibrate_norms
from zoo.vision.base import Pruned, VisionMethod
from zoo.vision.models import Classifier
from zoo.vision.train import Trainer, accuracy


@dataclass
class SparseSoup(VisionMethod):
    """Prune, retrain copies that differ in their seed, average them, and go on from the average.

    `epochs` are those of one copy over all phases: the whole costs `members` times as much.
    """

    phases: int = 2
    """Prunings; each cuts the same share of what is left."""

    members: int = 3
    """Copies that are retrained in each phase."""

    soup: Literal["uniform", "greedy"] = "uniform"
    """All copies, or the best on the validation images and each further one that does not harm them."""

    recalibrate: bool = True
    """Measure the batch norms' statistics anew after averaging."""

    def __post_init__(self) -> None:
        if self.phases < 1 or self.members < 2 or self.epochs < self.phases:
            raise ConfigError(
                f"a soup needs a phase, two members and an epoch per phase; received {self.phases}, "
                f"{self.members} and {self.epochs}"
            )

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        level = Exponential(self.sparsity, self.phases)
        for phase in range(1, self.phases + 1):
            sparsify(model, sparsity=level(phase))
            model = self.average(self.retrained(model, trainer, phase), trainer)
        return Pruned(model)

    def retrained(self, model: Classifier, trainer: Trainer, phase: int) -> list[Classifier]:
        """The members of a phase."""
        members = [copy.deepcopy(model) for _ in range(self.members)]
        for index, member in enumerate(members):
            seed = self.seed * 1000 + phase * 100 + index
            trainer.fit_masked(member, seed=seed, epochs=self.epochs // self.phases)
        return members

    def average(self, members: list[Classifier], trainer: Trainer) -> Classifier:
        """The soup of the members."""
        if self.soup == "uniform":
            return self._blend(members, trainer)
        data = trainer.data
        ranked = sorted(members, key=lambda member: accuracy(member, data, data.val), reverse=True)
        chosen, best = [ranked[0]], ranked[0]
        for candidate in ranked[1:]:
            blend = self._blend([*chosen, candidate], trainer)
            if accuracy(blend, data, data.val) >= accuracy(best, data, data.val):
                chosen, best = [*chosen, candidate], blend
        return best

    def _blend(self, members: list[Classifier], trainer: Trainer) -> Classifier:
        blend = average_models(members)
        if self.recalibrate:
            recalibrate_norms(blend, (images for images, _ in trainer.batches(20)))
        return blend  # type: ignore[return-value]
