"""Sparse training from fresh weights: random masks held (Liu et al., ICLR 2022), or moved by SET or RigL.

What random pruning shows is that the shares of the layers matter more than which weights: the ratios are
uniform, Erdos-Renyi and its relatives, or those that SNIP and GraSP would give, with positions drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from zoo.shared.masks import Mask, MaskSet, set_masks
from zoo.shared.masks.patterns import topk_mask
from zoo.shared.pruning.budgets import Budget, ErdosRenyi, Floor, Uniform
from zoo.shared.pruning.choose import prunable_parameters, select_parameters
from zoo.shared.pruning.regrow import SET, RigL
from zoo.shared.pruning.sparsifier import Sparsifier, sparsify
from zoo.vision.base import Pruned, VisionMethod, clone
from zoo.vision.models import Classifier, device_of, reinitialised
from zoo.vision.train import Trainer, cross_entropy, step_macs

Ratio = Literal["uniform", "uniform+", "er", "erk", "erk+", "snip", "grasp"]


def ratio_budget(model: Classifier, ratio: str) -> Budget:
    """The allocation of that name; the plus variants keep the first layer (uniform+) or the last (ERK+)
    dense, and uniform+ gives the last layer a fifth at least."""
    names = prunable_parameters(model)
    if ratio == "uniform+":
        return Floor(Uniform(), kept=0, density={names[0]: 1.0, names[-1]: 0.2})
    if ratio == "erk+":
        return Floor(ErdosRenyi(), kept=0, density={names[-1]: 1.0})
    return Uniform() if ratio == "uniform" else ErdosRenyi(kernel=ratio == "erk")


def layer_counts(model: Classifier, trainer: Trainer, ratio: Ratio, sparsity: float) -> dict[str, int]:
    """Kept weights of each layer of a fresh model; SNIP and GraSP score it on ten batches."""
    weights = select_parameters(model, None)
    if ratio in ("snip", "grasp"):
        scored = clone(model)
        batches = trainer.batches(10)
        masks = sparsify(scored, sparsity=sparsity, score=ratio, batches=batches, loss_fn=cross_entropy)
        return {name: mask.kept for name, mask in masks.items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return ratio_budget(model, ratio).allocate(shapes, sparsity)


def random_masks(model: Classifier, counts: dict[str, int], seed: int) -> MaskSet:
    """Masks with exactly these counts at places drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    weights = select_parameters(model, None)
    drawn = {name: torch.rand(weights[name].shape, generator=generator) for name in counts}
    return MaskSet({name: Mask(topk_mask(drawn[name], counts[name])) for name in counts}).to(device_of(model))


@dataclass
class RandomPruning(VisionMethod):
    """Draw masks before training, then train fresh weights with them held."""

    ratio: Ratio = "erk"
    """Shares of the layers."""

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        fresh = reinitialised(model, self.seed)
        masks = random_masks(fresh, layer_counts(fresh, trainer, self.ratio, self.sparsity), self.seed)
        masks.apply_(fresh)
        set_masks(fresh, masks)
        trainer.fit_masked(fresh)
        return Pruned(fresh)


@dataclass
class DynamicSparse(VisionMethod):
    """Train fresh weights under masks that move: the smallest weights are dropped, as many grow elsewhere."""

    growth: Literal["set", "rigl"] = "rigl"
    """Grow at random (SET) or where the dense gradient is largest (RigL)."""

    ratio: Literal["uniform", "uniform+", "er", "erk", "erk+"] = "erk"
    """Shares of the layers."""

    fraction: float = 0.3
    """Share of the kept weights that move at first; RigL lets it fall to 0."""

    every: int = 0
    """Steps between moves; 0 makes 25 moves in all."""

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        fresh = reinitialised(model, self.seed)
        return Pruned(train_dynamic(fresh, trainer, self, ratio_budget(fresh, self.ratio)))


def train_dynamic(model: Classifier, trainer: Trainer, options: DynamicSparse, budget: Budget) -> Classifier:
    """Train a fresh model with moving masks until three quarters of the steps, then with the last ones."""
    fit = trainer.fit(model)
    end = max(1, int(0.75 * fit.steps))
    every = options.every or max(1, end // 25)
    dense_steps = 1 / every if options.growth == "rigl" else 0.0
    example = fit.batches.example()
    # The steps before an update need the dense weight gradient; the others do without.
    fit.macs = lambda: (
        (1 - dense_steps) * step_macs(model, example) + dense_steps * step_macs(model, example, True)
    )
    rule = {"set": SET, "rigl": RigL}[options.growth](end, options.fraction)
    with Sparsifier(
        model,
        fit.optimizer,
        sparsity=options.sparsity,
        score="random",
        budget=budget,
        regrow=rule,
        every=every,
        seed=options.seed,
    ) as sparsifier:
        fit.run(sparsifier.step)
    return model
