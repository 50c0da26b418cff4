"""Structured methods: channels are chosen while training, then really removed, and the smaller network is
trained on."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.shared.learned.constraints import envelope_factors
from zoo.shared.structure.averaging import recalibrate_norms
from zoo.shared.structure.groups import GroupMap, trace_groups
from zoo.shared.structure.surgery import cut
from zoo.vision.base import Pruned, VisionMethod
from zoo.vision.models import Classifier
from zoo.vision.train import Fit, Trainer

Units = dict[str, Tensor]
Regularised = Literal["marked", "all", "none"]
VANISHED = 1e-6  # a layer whose largest channel shrank to this share is dead, norm or no norm behind it


@dataclass
class ChannelMethod(VisionMethod):
    """Base: sparse stage, cut to the exact count, statistics of norms anew, fine-tuning.

    Every family of channels that goes together - residual partners included - is a unit of choice, at least
    one is kept of each. The optimiser's moments are cut with the weights and carried on.
    """

    sparsity: float = 0.5
    """Share of the channels to remove, over all families that can be cut."""

    sparse_epochs: int = 5
    """Epochs before the cut; `epochs` counts these and those after it."""

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        fit, keep = self.cut(model, trainer)
        fit.run()
        return Pruned(model, {"channels/keep": torch.cat([units.cpu() for units in keep.values()])})

    def cut(self, model: Classifier, trainer: Trainer) -> tuple[Fit, Units]:
        """Train sparsely and remove the channels, in place; returns the training, which may go on, and what
        was kept of each family."""
        if not 0 <= self.sparse_epochs < self.epochs:
            raise ConfigError(
                f"sparse_epochs must leave an epoch after the cut; received {self.sparse_epochs} of "
                f"{self.epochs}"
            )
        groups = trace_groups(model, trainer.fit(model).batches.example())
        kept = kept_channels(groups, self.sparsity)
        fit = self.sparse_stage(model, groups, kept, trainer)
        keep = groups.select(self.scores(model, groups), kept)
        remove(model, groups, keep, fit, trainer)
        return fit, {name: keep[name] for name in groups}

    @abstractmethod
    def sparse_stage(self, model: Classifier, groups: GroupMap, kept: int, trainer: Trainer) -> Fit:
        """Train so that the channels to go lose their worth; returns the training, `sparse_epochs` on."""

    @abstractmethod
    def scores(self, model: nn.Module, groups: GroupMap) -> Units:
        """What each channel is worth, by family."""


def kept_channels(groups: GroupMap, sparsity: float) -> int:
    """How many channels stay in all.

    Raises:
        ConfigError: the model has no channels that can be cut.
    """
    total = sum(family.units for family in groups.values())
    if not total:
        raise ConfigError(f"no channels of this model can be cut: {dict(list(groups.frozen.items())[:2])}")
    return max(len(groups), total - int(sparsity * total))


def remove(model: Classifier, groups: GroupMap, keep: Units, fit: Fit, trainer: Trainer) -> None:
    """Cut the channels out of model and optimiser and measure the norms' statistics anew.

    A removed channel may have sent a constant on (ReLU of its shift); the next norm's new mean takes it up.
    """
    cut(model, groups, keep, fit.optimizer)
    recalibrate_norms(model, (images for images, _ in trainer.batches(20)))


def norm_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scales of all batch norms by parameter name."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None
    }


@dataclass
class MaskSparsity(ChannelMethod):
    """MaskSparsity (Jiang et al., Pattern Recognition 2023): an L1 penalty on the batch-norm scales of those
    channels only that are to go, so that the others keep their strength.

    A first stage of a third of `sparse_epochs` with the penalty on all scales marks the channels; training
    then starts again from the dense weights with the penalty on the marked ones. Families that share
    channels (residual sums) are ranked by the sum of their scales, where the paper counts votes.
    """

    penalty: float = 0.1
    """Weight of the L1 norm of the scales. Times the sum of the learning rates it is how far a marked scale
    is pulled to 0, so that few steps need a large one."""

    regularise: Regularised = "marked"
    """On which scales; the last two are what the method is compared with."""

    def sparse_stage(self, model: Classifier, groups: GroupMap, kept: int, trainer: Trainer) -> Fit:
        scales = norm_scales(model)
        where: dict[str, Tensor] | None = None
        if self.regularise == "marked":
            dense = {name: value.clone() for name, value in model.state_dict().items()}
            marking = trainer.fit(model, penalty=lambda: self._l1(scales, None))
            marking.run(until=max(1, self.sparse_epochs // 3))
            keep = groups.select(self.scores(model, groups), kept)
            masks = groups.masks(model, keep)
            where = {name: ~masks[name].keep for name in scales if name in masks}
            model.load_state_dict(dense)
        penalty = None if self.regularise == "none" else lambda: self._l1(scales, where)
        fit = trainer.fit(model, penalty=penalty).run(until=self.sparse_epochs)
        fit.penalty = None
        return fit

    def scores(self, model: nn.Module, groups: GroupMap) -> Units:
        scales = {name: scale.detach().abs() for name, scale in norm_scales(model).items()}
        return groups.sums(scales, roles=("follow",))

    def _l1(self, scales: dict[str, nn.Parameter], where: dict[str, Tensor] | None) -> Tensor:
        chosen = {name: scale for name, scale in scales.items() if where is None or name in where}
        terms = [
            (scale.abs() if where is None else scale.abs()[where[name]]).sum()
            for name, scale in chosen.items()
        ]
        return self.penalty * torch.stack(terms).sum()


@dataclass
class WGSEF(ChannelMethod):
    """WGSEF (group envelope with a chosen budget): proximal SGD of the convex envelope of "at most k
    channels", k being the number that is wanted.

    After each step all channels' weights are scaled by the prox of lr * penalty * GS_k (see
    `zoo.shared.learned.constraints.envelope_factors`). Too small a penalty leaves more than k channels and
    the cut costs
    accuracy; too large a one kills the network, which is refused.
    """

    penalty: float = 0.1
    """Weight of the envelope; search it on a logarithmic grid. 0 leaves it out."""

    weight_decay: float = 0.0
    """The envelope holds a ridge part of its own."""

    momentum_free: bool = True
    """Plain SGD in the sparse stage: the prox belongs to the Euclidean step."""

    def sparse_stage(self, model: Classifier, groups: GroupMap, kept: int, trainer: Trainer) -> Fit:
        fit = trainer.fit(model, momentum=0.0 if self.momentum_free else trainer.recipe.momentum)
        counts = [family.units for family in groups.values()]
        largest = [float(norm.detach().max()) for norm in groups.norms(model).values()]

        def shrink() -> None:
            if not self.penalty:
                return
            norms = groups.norms(model)
            everything = torch.cat([norms[name].detach() for name in groups])
            step = fit.learning_rate(fit.step - 1) * self.penalty
            if step > 0:
                factors = envelope_factors(everything, torch.ones_like(everything), float(kept), step)
                groups.scale_(model, dict(zip(groups, factors.split(counts), strict=True)))

        fit.run(shrink, until=self.sparse_epochs)
        norms = [norm.detach() for norm in groups.norms(model).values()]
        if any(float(norm.max()) <= VANISHED * start for norm, start in zip(norms, largest, strict=True)):
            raise ConfigError(
                f"the penalty {self.penalty:g} left a layer without any weights: it kills the network; "
                "choose a tenth of it"
            )
        return fit

    def scores(self, model: nn.Module, groups: GroupMap) -> Units:
        return {name: norm.detach() for name, norm in groups.norms(model).items()}
