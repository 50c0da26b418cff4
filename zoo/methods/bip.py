"""BiP (Zhang et al., NeurIPS 2022): pruning as bi-level optimisation over masks and weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.methods.training import (
    Pruned,
    TrainingMethod,
    cost_of_step,
    drawn_by,
    second_stream,
    share_of_recipe,
    train_held,
)
from zoo.shared.learned.gates import harden
from zoo.shared.learned.search import gate_all
from zoo.shared.pruning.budgets import Global
from zoo.shared.pruning.choose import magnitude_masks
from zoo.shared.train import Job


def total_gradient(
    of_score: Float[Tensor, "*shape"], of_weight: Float[Tensor, "*shape"], implicit: float
) -> Float[Tensor, "*shape"]:
    """(w - m g / gamma) g, the gradient of the upper loss in the scores with the implicit one of the lower
    problem (paper, proposition 1).

    Args:
        of_score: w g, what the gate passes to its score.
        of_weight: m g, what it passes to the weight; of which the square is m g^2, as m is 0 or 1.
        implicit: 1 / gamma.
    """
    return of_score - implicit * of_weight.square()


@dataclass
class BiP(TrainingMethod):
    """Train weights under the mask and scores that choose it, in turn, from a dense network to the target.

    With z = m w and g = dL/dz, a lower step trains w on one batch with the mask m fixed; the upper step moves
    the scores along (w - m g / gamma) g on another batch. m keeps the best scores of all layers together;
    scores start as the magnitudes. An epoch draws every sample once for each level, so that the recipe's
    epochs count half of those that the method makes: the number of gradients is that of the other methods.
    """

    mask_lr: float = 0.1
    """Peak learning rate of the scores, which falls as that of the weights does. The paper's, for a hundred
    epochs; few of them, or few weights left, want a tenth or a hundredth: choose it on validation data."""

    implicit: float = 1e-4
    """1 / gamma."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        masks = magnitude_masks(model, self.sparsity)
        macs = cost_of_step(model, job, masks, dense_gradients=True)
        start = {name: model.get_parameter(name).detach().abs().clone() for name in masks}
        # The parameters themselves: gates move them to another name, not to another object.
        weights = {name: model.get_parameter(name) for name in masks}
        trained = list(model.parameters())
        gates = gate_all(model, start, {name: mask.kept for name, mask in masks.items()})
        scores = [gate.logits for gate in gates.values()]
        upper = torch.optim.SGD(scores, lr=self.mask_lr, momentum=0.9, weight_decay=job.recipe.weight_decay)
        fit = job.fit(model, parameters=trained, macs=lambda: 2 * macs, **share_of_recipe(job, 2))
        second = second_stream(job)

        def upper_step() -> None:
            falling = fit.learning_rate(fit.step - 1) / job.recipe.lr if job.recipe.lr else 1.0
            upper.param_groups[0]["lr"] = self.mask_lr * falling
            model.zero_grad()
            with drawn_by(job, fit.step):
                job.loss(model, next(second)).backward()
            for name, gate in gates.items():
                if gate.logits.grad is not None and (of_weight := weights[name].grad) is not None:
                    gate.logits.grad = total_gradient(gate.logits.grad, of_weight, self.implicit)
            upper.step()
            values = {name: gate.logits.detach() for name, gate in gates.items()}
            for name, kept in Global().allocate(values, self.sparsity).items():
                gates[name].kept = kept

        train_held(fit, upper_step)
        harden(model)
        return Pruned(model)
