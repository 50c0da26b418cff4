"""ISS-P (Wang et al., ICCV 2023): iterative soft shrinkage of networks trained from fresh weights, made for
super-resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from zoo.errors import ConfigError
from zoo.methods.training import Pruned, TrainingMethod, train_held
from zoo.shared.learned.constraints import SoftShrinkage
from zoo.shared.masks import tighten
from zoo.shared.pruning.inventory import inner_weights
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Job


@dataclass
class ISSP(TrainingMethod):
    """Shrink the smallest weights of each layer a little after every step, choosing them anew; then fix the
    last choice, zero it, and train on.

    The model that is given lends its shape. First and last layer stay dense. The learning rate falls over
    the whole training, where the paper holds it while shrinking.
    """

    recipe: ClassVar[Mapping[str, Any]] = {
        "epochs": 20,
        "lr": 1e-3,
        "batch": 16,
        "weight_decay": 0.0,
        "optimizer": "adam",
    }

    choice: Literal["iss-p", "iht", "one-shot", "random"] = "iss-p"
    """Soft shrinkage; alpha 0 (iterative hard thresholding); magnitudes cut once at the end of the first
    stage; or a random mask from the start."""

    alpha: float = 0.95
    """Factor of the weights that shrink, in [0, 1)."""

    shrink_share: float = 0.6
    """Share of the epochs in which weights shrink; the rest trains with the mask fixed."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        fresh = reinitialised(model, job.seed)
        fit = job.fit(fresh)
        epochs = fit.steps // fit.steps_per_epoch
        first = round(self.shrink_share * epochs)
        if not 0 < first < epochs:
            raise ConfigError(
                f"shrink_share must leave epochs on both sides; received {self.shrink_share} of {epochs}"
            )
        names = inner_weights(fresh)
        if self.choice == "random":
            sparsify(
                fresh, sparsity=self.sparsity, score="random", budget="uniform", names=names, seed=job.seed
            )
        elif self.choice == "one-shot":
            train_held(fit, until=first)
            sparsify(fresh, sparsity=self.sparsity, budget="uniform", names=names)
        else:
            weights = {name: fresh.get_parameter(name) for name in names}
            shrinkage = SoftShrinkage(weights, self.sparsity, self.alpha if self.choice == "iss-p" else 0.0)
            train_held(fit, shrinkage.step, until=first)
            tighten(fresh, shrinkage.finish())
        masks = tighten(fresh, {})
        with masks.attach(fresh, fit.optimizer):
            fit.run()
        return Pruned(fresh)
