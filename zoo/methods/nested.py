"""Nested levels: one set of weights that serves several sparsities, each mask inside the one before.

No paper of its own. Weights are shared between sizes and trained by the mean of their losses, and each size
gets batch norm statistics of its own afterwards, as in Universally Slimmable Networks (Yu and Huang, ICCV
2019); masks lie inside masks by magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zoo.errors import ConfigError
from zoo.methods.training import Pruned, TrainingMethod, run_model, share_of_recipe
from zoo.shared.masks import MaskSet, masks_of, tighten
from zoo.shared.masks.nested import to_extras
from zoo.shared.pruning.budgets import check_sparsity
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.averaging import recalibrate_norms
from zoo.shared.structure.relatives import copied
from zoo.shared.train import Job


class Inside(nn.Module):
    """A model under masks: its parameters stay as they are, and get the gradients of what the masks keep.

    Args:
        model: any module.
        masks: of some of its parameters.
    """

    def __init__(self, model: nn.Module, masks: MaskSet) -> None:
        super().__init__()
        self.model, self.masks = model, masks

    def __getattr__(self, name: str) -> Any:
        """Those of the model that this module has not itself: a loss may ask for `model.config`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parameters = dict(self.model.named_parameters())
        masked = {
            name: parameters[name] * mask.keep.to(parameters[name].device)
            for name, mask in self.masks.items()
        }
        return functional_call(self.model, masked, args, kwargs)


@dataclass(frozen=True)
class _Joint:
    """The mean of a job's loss over the levels."""

    job: Job
    further: list[MaskSet]

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        losses = [self.job.loss(model, batch)]
        losses += [self.job.loss(Inside(model, masks), batch) for masks in self.further]
        return torch.stack(losses).mean()


@dataclass
class Nested(TrainingMethod):
    """Cut by magnitude to one level after the other, and train the weights at all levels so far together.

    `sparsity` is that of the first level, which keeps the most; the recipe's epochs are shared out among the
    levels, and a step at level n costs n passes.
    """

    further: tuple[float, ...] = (0.95, 0.98)
    """Sparsities of the further levels, rising."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        shares = (self.sparsity, *self.further)
        if not self.further or any(
            after <= before for before, after in zip(shares, shares[1:], strict=False)
        ):
            raise ConfigError(f"nested levels rise, two or more of them; received {shares}")
        levels: list[MaskSet] = []
        for number, share in enumerate(shares):
            check_sparsity(share)
            levels.append(self._cut(copied(model) if number else model, share, levels))
            job.replace(loss=_Joint(job, levels[1:])).fit_masked(model, **share_of_recipe(job, len(shares)))
        own = [self._norms(Inside(model, masks), job) for masks in levels[1:]]
        recalibrate_norms(model, job.sample(20), run_model(job))
        return Pruned(model, to_extras(levels[0], levels[1:], own))

    def _cut(self, model: nn.Module, share: float, before: list[MaskSet]) -> MaskSet:
        """Cut a model by magnitude, inside the last level so far; its masks."""
        if before:
            tighten(model, before[-1])
        sparsify(model, sparsity=share)
        return masks_of(model) or MaskSet({})

    def _norms(self, inside: Inside, job: Job) -> Mapping[str, Tensor]:
        """Statistics of the batch norms of a level."""
        recalibrate_norms(inside, job.sample(20), run_model(job))
        names = {name for name, _ in inside.model.named_buffers()}
        return {name: value.clone() for name, value in inside.model.state_dict().items() if name in names}
