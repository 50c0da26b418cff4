"""WGSEF: proximal SGD of the convex envelope of "at most k channels"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.methods.channels import Budget, ChannelMethod, Units, mask_again
from zoo.methods.training import TrainingMethod
from zoo.shared.learned.constraints import envelope_factors
from zoo.shared.structure.groups import GroupMap, Role
from zoo.shared.train import Fit, Job

# A norm behind a channel undoes what its weights alone lose: its scale and shift shrink with them.
ROLES: tuple[Role, ...] = ("out", "follow")
VANISHED = 1e-6  # a layer whose largest channel shrank to this share is dead, norm or no norm behind it


@dataclass
class WGSEF(ChannelMethod):
    """WGSEF (group envelope with a chosen budget): proximal SGD of the convex envelope of "channels that cost
    at most k", k being the budget that is wanted.

    After each step every channel - its makers' weights, and scale and shift of a norm behind them - is
    multiplied by its factor of the prox of lr * penalty * GS_k (see
    `zoo.shared.learned.constraints.envelope_factors`). Channels are ranked by norm / sqrt(cost), the order in
    which the prox sends them to zero. Too small a penalty leaves more than k channels and
    the cut costs accuracy; too large a one kills the network, which is refused. The recipe's weight decay is
    0, as the envelope holds a ridge part of its own.
    """

    recipe: ClassVar[Mapping[str, Any]] = {**TrainingMethod.recipe, "weight_decay": 0.0}

    penalty: float = 0.1
    """Weight of the envelope; search it on a logarithmic grid. 0 leaves it out."""

    momentum_free: bool = True
    """Plain SGD in the sparse stage: the prox belongs to the Euclidean step."""

    def sparse_stage(self, model: nn.Module, groups: GroupMap, budget: Budget, job: Job) -> Fit:
        fit = job.fit(model, momentum=0.0 if self.momentum_free else job.recipe.momentum)
        costs = torch.cat([budget.costs[name] for name in groups]).to(job.device)
        counts = [family.units for family in groups.values()]
        largest = [float(norm.detach().max()) for norm in groups.norms(model, ROLES).values()]
        masked = mask_again(model)

        def shrink() -> None:
            if masked is not None:
                masked()
            if not self.penalty:
                return
            norms = groups.norms(model, ROLES)
            everything = torch.cat([norms[name].detach() for name in groups])
            step = fit.learning_rate(fit.step - 1) * self.penalty
            if step > 0:
                factors = envelope_factors(everything, costs, float(budget.kept), step)
                groups.scale_(model, dict(zip(groups, factors.split(counts), strict=True)), ROLES)

        fit.run(shrink, until=self.sparse_epochs)
        norms = [norm.detach() for norm in groups.norms(model, ROLES).values()]
        if any(float(norm.max()) <= VANISHED * start for norm, start in zip(norms, largest, strict=True)):
            raise ConfigError(
                f"the penalty {self.penalty:g} left a layer without any weights: it kills the network; "
                "choose a tenth of it"
            )
        return fit

    def scores(self, model: nn.Module, groups: GroupMap, budget: Budget) -> Units:
        norms = groups.norms(model, ROLES)
        return {name: norm.detach() / budget.costs[name].to(norm).sqrt() for name, norm in norms.items()}
