"""What a training is about: data, loss, score, recipe, seed, device, and what it has cost so far."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MaskError, TrainingError
from ..masks import masks_of
from .batches import Batches, as_batches, moved
from .cost import Cost
from .device import device_named
from .fit import Fit
from .losses import Distillation, Loss, cross_entropy
from .recipe import Parameters, Recipe


@dataclass(frozen=True)
class Job:
    """All that a method needs to train a model, whatever the model is.

    Args:
        batches: a `DataLoader`, a list of batches, or `Batches`.
        loss: of a model and a batch; cross-entropy of batches `(inputs, labels)` by default.
        score: of a model on validation data, larger is better; None where there is none.
        recipe: from which single trainings may differ.
        seed: of order, augmentation, dropout and fresh weights.
        device: where models are trained; they are moved there.
        cost: of all trainings so far.
        distil: distillation from a teacher in every training.

    Raises:
        TrainingError: data without a length or without a batch, or a device that is not there.
    """

    batches: Any
    loss: Loss = cross_entropy
    score: Callable[[nn.Module], float] | None = None
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    device: str | torch.device = "cpu"
    cost: Cost = field(default_factory=Cost)
    distil: Distillation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", as_batches(self.batches))
        object.__setattr__(self, "device", device_named(self.device))

    def replace(self, **fields: Any) -> Job:
        """The same job with other fields; `cost` is shared unless another is given."""
        return dataclasses.replace(self, **fields)

    def fit(
        self,
        model: nn.Module,
        *,
        seed: int | None = None,
        parameters: Parameters | None = None,
        penalty: Callable[[], Tensor] | None = None,
        macs: Callable[[], float] | None = None,
        accelerator: Any = None,
        **changes: Any,
    ) -> Fit:
        """A training that is ready to run.

        Args:
            model: trained in place, on the job's device.
            parameters, penalty, macs, accelerator: as for `Fit`.
            seed: instead of the job's.
            changes: fields of the recipe to replace, e.g. `epochs=3`.

        Raises:
            TrainingError: a recipe out of range, or another `batch` where the data come in batches already.
        """
        return Fit(
            model.to(self.device),
            self._sized(changes.get("batch")),
            dataclasses.replace(self.recipe, **changes),
            loss=self.loss,
            score=self.score,
            seed=self.seed if seed is None else seed,
            parameters=parameters,
            penalty=penalty,
            macs=macs,
            cost=self.cost,
            distil=self.distil,
            accelerator=accelerator,
        )

    def fit_masked(self, model: nn.Module, **options: Any) -> Fit:
        """Train a model to the end with the masks that it carries held in place; options as for `fit`.

        Raises:
            MaskError: it carries none.
        """
        masks = masks_of(model)
        if masks is None:
            raise MaskError("the model carries no masks to hold; sparsify it first, or use fit")
        fit = self.fit(model, **options)
        with masks.attach(model, fit.optimizer):
            return fit.run()

    def sample(self, limit: int, seed_offset: int = 0) -> list[Any]:
        """The first `limit` batches of an epoch drawn with the job's seed plus an offset, on its device: for
        scores, statistics and calibration."""
        generator = torch.Generator().manual_seed(self.seed + seed_offset)
        device = torch.device(self.device)
        drawn = itertools.islice(self.batches.draw(generator), limit)
        return [moved(batch, device) for batch in drawn]

    def _sized(self, batch: int | None) -> Batches:
        made: Batches = self.batches
        if batch is None:
            return made
        if (sized := getattr(made, "sized", None)) is None:
            raise TrainingError(
                f"{type(made).__name__} come in batches already: batch={batch} cannot be met; make the job "
                "with batches of that size"
            )
        made = sized(batch)
        return made
