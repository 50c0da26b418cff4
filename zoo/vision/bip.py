"""BiP (Zhang et al., NeurIPS 2022): pruning as bi-level optimisation over masks and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from zoo.shared.learned.gates import harden
from zoo.shared.pruning.budgets import Global
from zoo.vision.base import Pruned, VisionMethod
from zoo.vision.jackpots import gate_all, magnitude_masks, search_macs
from zoo.vision.models import Classifier
from zoo.vision.train import Batch, ImageBatches, Trainer, cross_entropy


def endless(trainer: Trainer) -> Iterator[Batch]:
    """Batches of a second, independently shuffled pass over the training images, again and again."""
    generator = torch.Generator().manual_seed(trainer.seed + 500_009)
    batches = ImageBatches(trainer.data, trainer.recipe.batch)
    while True:
        yield from batches.draw(generator)


@dataclass
class BiP(VisionMethod):
    """Train weights under the mask and scores that choose it, in turn, from a dense network to the target.

    With z = m w and g = dL/dz, a lower step trains w on one batch with the mask m fixed; the upper step moves
    the scores along (w - m g / gamma) g on another batch, the total gradient with the implicit one of the
    lower problem (paper, proposition 1). m keeps the best scores of all layers together; scores start as the
    magnitudes. An epoch draws every image once for each level, so `epochs` counts half of those that the
    method makes: the number of gradients is that of the other methods.
    """

    lr: float = 0.05
    """Peak of the learning rate of the weights."""

    mask_lr: float = 0.1
    """Learning rate of the scores."""

    implicit: float = 1e-4
    """1 / gamma."""

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        masks = magnitude_masks(model, self.sparsity)
        macs = search_macs(model, masks, trainer)
        start = {name: model.get_parameter(name).detach().abs().clone() for name in masks}
        # The parameters themselves: gates move them to another name, not to another object.
        weights = {name: model.get_parameter(name) for name in masks}
        trained = list(model.parameters())
        gates = gate_all(model, start, {name: mask.kept for name, mask in masks.items()})
        scores = [gate.logits for gate in gates.values()]
        upper = torch.optim.SGD(scores, lr=self.mask_lr, momentum=0.9, weight_decay=self.weight_decay)
        epochs = max(1, self.epochs // 2)
        fit = trainer.fit(model, parameters=trained, epochs=epochs, macs=lambda: 2 * macs)
        second = endless(trainer)

        def upper_step() -> None:
            model.zero_grad()
            cross_entropy(model, next(second)).backward()
            for name, gate in gates.items():
                own, of_weight = gate.logits.grad, weights[name].grad
                if own is not None and of_weight is not None:
                    # The gate's gradient is w g, the weight's m g, of which the square is m g^2.
                    own.sub_(self.implicit * of_weight.square())
            upper.step()
            values = {name: gate.logits.detach() for name, gate in gates.items()}
            for name, kept in Global().allocate(values, self.sparsity).items():
                gates[name].kept = kept

        fit.run(upper_step)
        harden(model)
        return Pruned(model)
