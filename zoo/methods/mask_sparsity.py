"""MaskSparsity (Jiang et al., Pattern Recognition 2023): an L1 penalty on the scales of those channels only
that are to go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.methods.channels import Budget, ChannelMethod, Units, mask_again, norm_scales
from zoo.shared.errors import GroupError
from zoo.shared.structure.groups import GroupMap
from zoo.shared.train import Fit, Job


def to_go(groups: GroupMap, model: nn.Module, keep: Units, names: Mapping[str, object]) -> dict[str, Tensor]:
    """Which entries of these parameters belong to channels that are not kept: True where the penalty acts."""
    masks = groups.masks(model, keep)
    return {name: ~masks[name].keep for name in names if name in masks}


def l1(scales: Mapping[str, Tensor], where: Mapping[str, Tensor] | None) -> Float[Tensor, ""]:
    """Sum of |scale| over the marked entries, or over all of them."""
    if where is None:
        return torch.stack([scale.abs().sum() for scale in scales.values()]).sum()
    return torch.stack([scales[name].abs()[marked].sum() for name, marked in where.items()]).sum()


@dataclass
class MaskSparsity(ChannelMethod):
    """An L1 penalty on the batch-norm scales of the channels that are to go, so that the others keep their
    strength.

    A first stage of a third of `sparse_epochs` with the penalty on all scales marks the channels; training
    then starts again from the dense weights with the penalty on the marked ones. Families that share
    channels (residual sums) are ranked by the sum of their scales, where the paper counts votes.
    """

    penalty: float = 0.1
    """Weight of the L1 norm of the scales. Times the sum of the learning rates it is how far a marked scale
    is pulled to 0, so that few steps need a large one."""

    regularise: Literal["marked", "all", "none"] = "marked"
    """On which scales; the last two are what the method is compared with."""

    def sparse_stage(self, model: nn.Module, groups: GroupMap, budget: Budget, job: Job) -> Fit:
        scales = norm_scales(model)
        found = groups.sums({name: scale.detach().abs() for name, scale in scales.items()}, roles=("follow",))
        if not scales or any(not bool(values.any()) for values in found.values()):
            bare = next(name for name, values in found.items() if not bool(values.any()))
            raise GroupError(
                f"MaskSparsity ranks channels by the scales of batch norms, and {type(model).__name__} has "
                f"none on the channels of {bare!r}; wgsef ranks by norms of weights"
            )
        where: dict[str, Tensor] | None = None
        if self.regularise == "marked":
            dense = {name: value.clone() for name, value in model.state_dict().items()}
            marking = job.fit(model, penalty=lambda: self.penalty * l1(scales, None))
            marking.run(mask_again(model), until=max(1, self.sparse_epochs // 3))
            keep = self.chosen(model, groups, budget, job)
            where = to_go(groups, model, keep, scales)
            model.load_state_dict(dense)
        penalty = None if self.regularise == "none" else lambda: self.penalty * l1(scales, where)
        fit = job.fit(model, penalty=penalty).run(mask_again(model), until=self.sparse_epochs)
        fit.penalty = None
        return fit

    def scores(self, model: nn.Module, groups: GroupMap, budget: Budget) -> Units:
        scales = {name: scale.detach().abs() for name, scale in norm_scales(model).items()}
        return groups.sums(scales, roles=("follow",))
