"""Base of the structured methods: channels are chosen while training, then really removed, and the smaller
network is trained on."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import ConfigError
from zoo.methods.training import Pruned, TrainingMethod, example_of, run_model
from zoo.shared.errors import GroupError
from zoo.shared.masks import masks_of
from zoo.shared.masks.topk import topk_mask
from zoo.shared.measure.account import count
from zoo.shared.structure.averaging import recalibrate_norms
from zoo.shared.structure.groups import GroupMap, trace_groups
from zoo.shared.structure.relatives import copied
from zoo.shared.structure.surgery import cut
from zoo.shared.train import Fit, Job

Units = dict[str, Tensor]

REACH = 0.5  # share of the parameters below which a warning says what cannot be cut
_log = logging.getLogger("zoo")


class Budget(NamedTuple):
    """What channels cost, by family, and how much of it all those that stay may cost together."""

    costs: Units
    kept: float


@dataclass
class ChannelMethod(TrainingMethod):
    """Sparse stage, cut to the exact count, statistics of norms anew, fine-tuning.

    Every family of channels that goes together - residual partners included - is a unit of choice, at least
    one is kept of each. The optimiser's moments are cut with the weights and carried on.
    """

    sparsity: float = 0.5
    """Share of the channels to remove, over all families that can be cut."""

    budget: Literal["channels", "macs"] = "channels"
    """What the sparsity is a share of: the channels, or the multiply-adds of the network."""

    sparse_epochs: int = 5
    """Epochs before the cut; the recipe's epochs count these and those after it."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        fit, keep = self.cut(model, job)
        fit.run(mask_again(model))
        return Pruned(model, {"channels/keep": torch.cat([units.cpu() for units in keep.values()])})

    def cut(self, model: nn.Module, job: Job) -> tuple[Fit, Units]:
        """Train sparsely and remove the channels, in place; returns the training, which may go on, and what
        was kept of each family.

        Raises:
            GroupError: the model cannot be traced, or has no channels that can be cut.
        """
        epochs = job.fit(model).steps / job.fit(model).steps_per_epoch
        if not 0 <= self.sparse_epochs < epochs:
            raise ConfigError(
                f"sparse_epochs must leave an epoch after the cut; received {self.sparse_epochs} of "
                f"{epochs:g}"
            )
        groups = trace_groups(model, example_of(job))
        if (share := groups.reach(model)) < REACH:
            reasons = sorted(set(groups.frozen.values()))[:3]
            _log.warning(
                "%.0f %% of the parameters of this %s lie in channels that can be cut (%s)",
                *(100 * share, type(model).__name__, "; ".join(reasons)),
            )
        if self.budget == "macs":
            budget = macs_budget(model, groups, self.sparsity, job)
        else:
            ones = {name: torch.ones(family.units) for name, family in groups.items()}
            budget = Budget(ones, float(kept_channels(model, groups, self.sparsity)))
        fit = self.sparse_stage(model, groups, budget, job)
        keep = self.chosen(model, groups, budget, job)
        cut(model, groups, keep, fit.optimizer)
        # A removed channel may have sent a constant on (ReLU of its shift); the next norm's new mean takes it
        # up.
        recalibrate_norms(model, job.sample(20), run_model(job))
        return fit, {name: keep[name] for name in groups}

    def chosen(self, model: nn.Module, groups: GroupMap, budget: Budget, job: Job) -> Units:
        """The channels that stay, by what they are worth now."""
        scores = self.scores(model, groups, budget)
        if self.budget == "macs":
            return within_macs(model, groups, scores, budget, self.sparsity, job)
        return groups.select(scores, budget.kept, budget.costs)

    @abstractmethod
    def sparse_stage(self, model: nn.Module, groups: GroupMap, budget: Budget, job: Job) -> Fit:
        """Train so that the channels to go lose their worth; returns the training, `sparse_epochs` on."""

    @abstractmethod
    def scores(self, model: nn.Module, groups: GroupMap, budget: Budget) -> Units:
        """What each channel is worth, by family."""


def macs_budget(model: nn.Module, groups: GroupMap, sparsity: float, job: Job) -> Budget:
    """The multiply-adds of a channel's makers, and the share of all of them that stays: what a penalty is
    told. What the readers of removed channels save comes on top; `within_macs` counts it."""
    kept_channels(model, groups, sparsity)  # refuses a model without channels
    costs = {layer.name: float(layer.macs) for layer in count(model, example_of(job)).layers}
    of = {
        name: sum(costs.get(m.name.rpartition(".")[0], 0.0) for m in family.roles("out") if m.dim == 0)
        for name, family in groups.items()
    }
    shares = {name: torch.full((family.units,), of[name] / family.units) for name, family in groups.items()}
    return Budget(shares, (1 - sparsity) * sum(of.values()))


def within_macs(
    model: nn.Module, groups: GroupMap, scores: Units, budget: Budget, sparsity: float, job: Job
) -> Units:
    """The best channels whose network has at most 1 - sparsity of the multiply-adds, found by halving.

    Raises:
        GroupError: one channel of each family takes more.
    """
    example = example_of(job)

    def macs(keep: Units | None) -> int:
        smaller = copied(model)
        if keep is not None:
            cut(smaller, groups, keep)
        return count(smaller, example).total.macs

    wanted = (1 - sparsity) * macs(None)
    best = {name: topk_mask(score, 1) for name, score in scores.items()}
    if macs(best) > wanted:
        raise GroupError(
            f"one channel of each family takes more than {1 - sparsity:.0%} of the multiply-adds; choose a "
            "lower sparsity"
        )
    low = sum(float(budget.costs[name][keep].sum()) for name, keep in best.items())
    high = sum(float(cost.sum()) for cost in budget.costs.values())
    for _ in range(12):
        middle = (low + high) / 2
        keep = groups.select(scores, middle, budget.costs)
        if macs(keep) <= wanted:
            low, best = middle, keep
        else:
            high = middle
    return best


def kept_channels(model: nn.Module, groups: GroupMap, sparsity: float) -> int:
    """How many channels stay in all.

    Raises:
        GroupError: the model has no channels that can be cut; the message says what holds them.
    """
    total = sum(family.units for family in groups.values())
    if not total:
        reasons = ", ".join(f"{name} {why}" for name, why in list(groups.frozen.items())[:2])
        raise GroupError(f"no channels of {type(model).__name__} can be cut: {reasons or 'none were found'}")
    return max(len(groups), total - int(sparsity * total))


def mask_again(model: nn.Module) -> Callable[[], object] | None:
    """A step's end that zeroes what the model's masks drop, also after surgery; None without masks."""
    if not masks_of(model):
        return None

    def after() -> None:
        if (masks := masks_of(model)) is not None:
            masks.apply_(model)

    return after


def norm_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scales of all batch norms by parameter name."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.weight is not None
    }
