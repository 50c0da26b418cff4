"""Names that `zoo.shared.train` and `zoo.vision.data` took over, until every method has moved to a `Job`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from zoo.shared.train import Batches, Cost, Fit, Job, Recipe, clock, cross_entropy, step_macs
from zoo.vision.data import ImageBatches, Images, accuracy, correct

Batch = tuple[Tensor, Tensor]

__all__ = [
    "Batch",
    "Batches",
    "Cost",
    "Fit",
    "ImageBatches",
    "Recipe",
    "Trainer",
    "accuracy",
    "clock",
    "correct",
    "cross_entropy",
    "step_macs",
]


@dataclass
class Trainer:
    """A `Job` on images, by its former name."""

    data: Images
    recipe: Recipe
    seed: int = 0
    cost: Cost = field(default_factory=Cost)

    @property
    def job(self) -> Job:
        """The job behind it."""
        data = ImageBatches(self.data, self.recipe.batch)
        return Job(data, recipe=self.recipe, seed=self.seed, device=self.data.device, cost=self.cost)

    def fit(self, model: nn.Module, **options: Any) -> Fit:
        """See `Job.fit`."""
        return self.job.fit(model, **options)

    def fit_masked(self, model: nn.Module, **options: Any) -> Fit:
        """See `Job.fit_masked`."""
        return self.job.fit_masked(model, **options)

    def batches(self, limit: int, seed_offset: int = 0) -> list[Batch]:
        """See `Job.sample`."""
        return self.job.sample(limit, seed_offset)
