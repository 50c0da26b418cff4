"""Lottery jackpots (Zhang et al., arXiv 2104.08700): masks searched on frozen pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from zoo.shared.learned.gates import TopKGate, gate_weight, harden
from zoo.shared.masks import MaskSet, set_masks
from zoo.shared.masks.patterns import Unstructured
from zoo.shared.pruning.budgets import Global
from zoo.shared.pruning.choose import choose_masks, prunable_parameters
from zoo.vision.base import Pruned, VisionMethod
from zoo.vision.models import Classifier
from zoo.vision.random_pruning import random_masks
from zoo.vision.train import Trainer, step_macs

MARGIN = 0.01  # kept weights start this much above dropped ones


def magnitude_masks(model: nn.Module, sparsity: float) -> MaskSet:
    """The masks of one global magnitude threshold; the model is not changed."""
    weights = {name: model.get_parameter(name).detach().abs() for name in prunable_parameters(model)}
    return choose_masks(weights, sparsity, dict.fromkeys(weights, Unstructured()), Global())


def gate_all(model: nn.Module, scores: dict[str, Tensor], kept: dict[str, int]) -> dict[str, TopKGate]:
    """Gates that keep the best-scored weights of each layer, as many as `kept` says; scores are trainable."""
    gates = {}
    for name, score in scores.items():
        owner, _, attribute = name.rpartition(".")
        gate = TopKGate(tuple(score.shape), 0.0, score)
        gate.kept = kept[name]
        gate_weight(model.get_submodule(owner), attribute, gate)
        gates[name] = gate
    return gates


@dataclass
class LotteryJackpot(VisionMethod):
    """Search which weights of a trained network to keep; no weight is trained.

    Each layer keeps what one global magnitude threshold leaves it. Scores start at 1 for kept weights and
    0.99 for dropped ones, and are trained straight through; the best of a layer are kept at every step, which
    is the published swap of the strongest dropped with the weakest kept. Norms' statistics go on moving.
    """

    lr: float = 0.1
    """Peak of the learning rate of the scores."""

    start: Literal["magnitude", "random"] = "magnitude"
    """Where the search begins: magnitude, or random at the same counts."""

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        masks = magnitude_masks(model, self.sparsity)
        counts = {name: mask.kept for name, mask in masks.items()}
        if self.start == "random":
            masks = random_masks(model, counts, self.seed)
        macs = search_macs(model, masks, trainer)
        scores = {name: 1.0 - MARGIN * (~mask.keep).float() for name, mask in masks.items()}
        gates = gate_all(model, scores, counts)
        trainer.fit(model, parameters=[g.logits for g in gates.values()], macs=lambda: macs).run()
        harden(model)
        return Pruned(model)


def search_macs(model: Classifier, masks: MaskSet, trainer: Trainer) -> float:
    """Multiply-accumulates of a step of a search on one sample: products with kept weights forward and for
    the inputs, all products for the scores."""
    set_masks(model, masks)
    macs = step_macs(model, trainer.fit(model).batches.example(), dense_gradients=True)
    set_masks(model, None)
    return macs
