"""ISS-P (Wang et al., ICCV 2023): iterative soft shrinkage for super-resolution networks trained from fresh
weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn

from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified
from zoo.shared.learned.constraints import SoftShrinkage
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.pruning.budgets import check_sparsity
from zoo.shared.pruning.sparsifier import sparsify
from zoo.vision.base import back_on_cpu, checked_device, inner_weights
from zoo.vision.models import device_of
from zoo.vision.superres import PatchBatches, l1_loss, load_t91
from zoo.vision.train import Cost, Fit, Recipe
from zoo.vision.upscalers import Upscaler


@dataclass
class ISSP:
    """Shrink the smallest weights of each layer a little after every step, choosing them anew; then fix the
    last choice, zero it, and train on.

    The model that is given lends its shape. First and last convolution stay dense. The learning rate falls
    over the whole training, where the paper holds it while shrinking.
    """

    sparsity: float = 0.9
    """Share of zeros of every inner layer, from 0 up to 1."""

    choice: Literal["iss-p", "iht", "one-shot", "random"] = "iss-p"
    """Soft shrinkage; alpha 0 (iterative hard thresholding); magnitudes cut once at the end of the first
    stage; or a random mask from the start."""

    alpha: float = 0.95
    """Factor of the weights that shrink, in [0, 1)."""

    shrink_share: float = 0.6
    """Share of the epochs in which weights shrink; the rest trains with the mask fixed."""

    epochs: int = 20
    """Of `steps` steps each."""

    steps: int = 50
    """Steps per epoch."""

    batch: int = 16
    """Patches per step."""

    patch: int = 24
    """Side of a patch of the small image, in pixels."""

    lr: float = 1e-3
    """Adam's peak learning rate."""

    seed: int = 0
    """Of weights and patches."""

    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:1, say."""

    def sparsify(self, model: nn.Module) -> Sparsified:
        """Train a sparse network of the given one's shape on T91.

        Raises:
            BudgetError: a sparsity or an alpha out of range.
            ConfigError: a model of another kind, or a share that leaves no epoch.
            DataError: T91 is not below ZOO_DATA.
        """
        if not isinstance(model, Upscaler):
            raise ConfigError(f"ISS-P trains the upscalers of zoo.vision; received {type(model).__name__}")
        made, cost = self.train(model.to(checked_device(self.device)))
        model.cpu()
        made = back_on_cpu(made)
        options = dataclasses.asdict(self) | {"training_flops": cost.flops}
        del options["device"]
        return Sparsified(made.eval(), masks_of(made) or MaskSet({}), hyperparameters=options)

    def train(self, model: Upscaler) -> tuple[Upscaler, Cost]:
        """The sparse network, on the device of the model, and what it cost."""
        first = round(self.shrink_share * self.epochs)
        if not 0 < first < self.epochs:
            raise ConfigError(f"shrink_share must leave epochs on both sides; received {self.shrink_share}")
        check_sparsity(self.sparsity)
        fresh = model.fresh(self.seed)
        names = inner_weights(fresh)
        pairs = load_t91(fresh.scale)
        batches = PatchBatches(pairs, self.patch, self.batch, self.steps, device_of(fresh))
        recipe = Recipe(self.epochs, self.lr, self.batch, weight_decay=0.0, optimizer="adam")
        fit = Fit(fresh, batches, recipe, loss=l1_loss, seed=self.seed)
        if self.choice == "random":
            masks = sparsify(
                fresh, sparsity=self.sparsity, score="random", budget="uniform", names=names, seed=self.seed
            )
        elif self.choice == "one-shot":
            fit.run(until=first)
            masks = sparsify(fresh, sparsity=self.sparsity, budget="uniform", names=names)
        else:
            weights = {name: fresh.get_parameter(name) for name in names}
            alpha = self.alpha if self.choice == "iss-p" else 0.0
            shrinkage = SoftShrinkage(weights, self.sparsity, alpha)
            fit.run(shrinkage.step, until=first)
            masks = shrinkage.finish()
            set_masks(fresh, masks)
        with masks.attach(fresh, fit.optimizer):
            fit.run()
        return fresh, fit.cost
