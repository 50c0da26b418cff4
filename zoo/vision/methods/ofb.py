"""OFB: importance of units and sizes of layers, searched together in one training.

Ye, Yu, Ye, Ouyang et al., "Once for Both: Single Stage of Importance and Sparsity Search for Vision
Transformer Compression", CVPR 2024. Every unit (hidden unit, head, channel) has an importance a, every
layer a distribution p over sizes. With w[r] the probability that a layer is wider than r, a unit of rank r
is multiplied by

    g = s sigmoid(a) + (1 - s) w[r],

s falling from 0.99 to 0.1; so importance decides first, sizes later, and both learn from one loss, which
pays for the expected cost and for distributions that are not one-hot. Sizes of small probability are
dropped on the way.

Differs from the paper: units are those that a traced network can lose (of a ViT: hidden units and heads,
not the width of the stream); there is no masked image modelling beside the task; units are cut once, at the
end of the search, by w[r], the most probable first, to the exact budget.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.methods.channels import Budget, ChannelMethod, Units
from zoo.shared.learned.gates import harden
from zoo.shared.learned.gates.modules import Gate
from zoo.shared.masks import masks_of, set_masks
from zoo.shared.structure.groups import GroupMap
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Fit, Job

FIRST, LAST = 0.99, 0.1  # weight of the importance at the start and from the middle of the search on


class BiMask(Gate):
    """Gates of the units of a family: importance and the probable size of the family.

    Args:
        shape: (units,).
        importance: fixed ones, largest first to stay; None to learn them.
    """

    sizes: Tensor
    live: Tensor
    fixed: Tensor

    def __init__(self, shape: tuple[int], importance: Tensor | None = None) -> None:
        start = torch.nn.init.trunc_normal_(torch.empty(shape), std=0.2) if importance is None else importance
        super().__init__(shape, start.detach().clone())
        self.logits.requires_grad_(importance is None)
        (units,) = shape
        sizes = sorted({max(1, round(units * eighth / 8)) for eighth in range(2, 9)})
        self.register_buffer("sizes", torch.tensor(sizes))
        self.register_buffer("live", torch.ones(len(sizes), dtype=torch.bool))
        self.choice = nn.Parameter(torch.rand(len(sizes)))
        self.share = FIRST if importance is None else 0.0

    def probabilities(self) -> Float[Tensor, " sizes"]:
        """Of the sizes; 0 for those that were dropped."""
        return self.choice.masked_fill(~self.live, -math.inf).softmax(0)

    def wider(self) -> Float[Tensor, " units"]:
        """The probability that the family is wider than 0, 1, 2 ... units."""
        steps = torch.arange(len(self.logits), device=self.sizes.device)
        return (self.probabilities()[:, None] * (self.sizes[:, None] > steps)).sum(0)

    def ranks(self) -> Int[Tensor, " units"]:
        """Of the units by importance, 0 for the largest."""
        return self.logits.argsort(descending=True, stable=True).argsort()

    def forward(self) -> Float[Tensor, " units"]:
        soft = self.wider()[self.ranks()]
        return self.share * self.logits.sigmoid() + (1 - self.share) * soft if self.share else soft

    def size(self) -> Float[Tensor, ""]:
        """The expected share of the units."""
        return (self.probabilities() * self.sizes).sum() / len(self.logits)

    def undecided(self) -> Float[Tensor, ""]:
        """How far the probabilities are from one-hot (paper, adaptive one-hot loss): entropy and a tangent of
        their distance v from uniform, which is clamped as both ends are poles."""
        p, n = self.probabilities()[self.live], int(self.live.sum())
        if n == 1:
            return p.new_zeros(())
        v = ((p - 1 / n).square().sum() / (1 - 1 / n)).clamp(0.02, 0.98)
        entropy = -(p * p.clamp(min=1e-9).log()).sum()
        return entropy + torch.tan(math.pi / 2 - math.pi * v) / n

    @torch.no_grad()
    def shrink(self) -> None:
        """Drop sizes whose probability is a fifth of the average or less."""
        p = self.probabilities()
        self.live &= p > 0.2 / int(self.live.sum())


@dataclass
class OFB(ChannelMethod):
    """Search units and sizes together, cut, train on."""

    by: Literal["both", "sizes", "uniform"] = "both"
    """What is searched: both at once; sizes alone, with importance fixed as the norm of the weights (two
    stages); or nothing: the same share of every family, by norm."""

    rate: float = 0.02
    """Learning rate of importance and sizes, by Adam."""

    def sparse_stage(self, model: nn.Module, groups: GroupMap, budget: Budget, job: Job) -> Fit:
        norms = groups.norms(model)
        self._gates: dict[str, BiMask] = {}
        if self.by != "uniform":
            with seeded(job.seed):
                for name in groups:
                    fixed = None if self.by == "both" else norms[name].detach()
                    gate: Any = groups.gate(model, name, functools.partial(BiMask, importance=fixed))
                    self._gates[name] = gate.to(job.device)
        gates = [p for gate in self._gates.values() for p in gate.parameters() if p.requires_grad]
        own = {id(p) for gate in self._gates.values() for p in gate.parameters()}
        weights = [p for p in model.parameters() if id(p) not in own]
        fit = job.fit(model, parameters=weights, epochs=self.sparse_epochs, macs=lambda: 0.0)
        if not gates:
            fit.run()
            return self._after(model, job)
        upper = torch.optim.Adam(gates, lr=self.rate, betas=(0.5, 0.999))
        fit.penalty = lambda: search_loss(self._gates, budget)

        def step() -> None:
            upper.step()
            upper.zero_grad()
            self._advance(fit.step / fit.steps)
            if fit.step % max(1, fit.steps_per_epoch // 3) == 0 and fit.step > fit.steps / 2:
                for gate in self._gates.values():
                    gate.shrink()

        fit.run(step)
        before = masks_of(model)
        self._orders = {
            n: g.wider()[g.ranks()].detach() + 1e-3 * g.logits.sigmoid().detach()
            for n, g in self._gates.items()
        }
        harden(model)
        set_masks(model, before)
        return self._after(model, job)

    def _advance(self, done: float) -> None:
        """The weight of importance: linear over the first half of the search."""
        for gate in self._gates.values():
            if self.by == "both":
                gate.share = max(LAST, FIRST + (LAST - FIRST) * min(1.0, 2 * done))

    def _after(self, model: nn.Module, job: Job) -> Fit:
        return job.fit(model, epochs=max(1, job.recipe.epochs - self.sparse_epochs), macs=lambda: 0.0)

    def scores(self, model: nn.Module, groups: GroupMap, budget: Budget) -> Units:
        """The probability that a unit stays; without sizes its place among its own family."""
        if self._gates:
            return self._orders
        return {
            name: 1 - norm.detach().argsort(descending=True, stable=True).argsort() / len(norm)
            for name, norm in groups.norms(model).items()
        }


def search_loss(gates: dict[str, BiMask], budget: Budget) -> Float[Tensor, ""]:
    """What the search pays: the square of the expected cost beyond the budget, as a share of all; undecided
    sizes; importance."""
    total = sum(float(costs.sum()) for costs in budget.costs.values())
    spent = sum(
        (float(budget.costs[name].sum()) * gate.size() for name, gate in gates.items()), torch.zeros(())
    )
    undecided = sum((gate.undecided() for gate in gates.values()), torch.zeros(())) / len(gates)
    importance = sum((gate.logits.sigmoid().sum() for gate in gates.values()), torch.zeros(()))
    loss: Tensor = 5 * ((spent - budget.kept) / total).square() + 0.5 * undecided + 1e-4 * importance
    return loss
