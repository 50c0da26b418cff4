"""SparseByteNN: groups of weights that one vector step reads, found in channels that were put in order for
it.

Xu et al., "SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on Fine-Grained Group
Sparsity", 2023. The unit that is pruned is a group of 4 output channels of a 1x1 convolution at one input
channel: the kernel loads that input once for 4 outputs. Which channels are neighbours is free: output
channels are permuted, with all that reads or follows them (norms, depthwise filters, the next layer's
inputs, residual partners), so that channels which need the same inputs share groups. The network's function
stays the same.

Differs from the paper, whose engine is for ARM: the permutation is greedy (see `grouped`), and only 1x1
convolutions are pruned, as depthwise ones have few weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.methods.training import Pruned, TrainingMethod, example_of, train_gradually
from zoo.shared.pruning.inventory import pointwise_weights
from zoo.shared.structure.groups import trace_groups
from zoo.shared.structure.groups.families import Family
from zoo.shared.train import Job

SIZE = 4


def kept_magnitude(weight: Float[Tensor, "out in"], sparsity: float, size: int = SIZE) -> float:
    """The share of the sum of magnitudes that is left when the least groups go; rows beyond the last whole
    group are groups of their own."""
    whole = len(weight) // size * size
    groups = weight[:whole].abs().reshape(-1, size, weight.shape[1]).sum(1).flatten()
    count = round(sparsity * groups.numel())
    lost = groups.sort().values[:count].sum()
    return float(1 - lost / weight.abs().sum().clamp(min=1e-30))


def grouped(rows: Float[Tensor, "out features"], size: int = SIZE) -> Int[Tensor, " out"]:
    """An order of rows in which each whole group of neighbours needs the same features: the free row of
    largest norm, then those whose magnitudes are nearest in angle to its own."""
    magnitudes = rows.abs()
    norms = magnitudes.norm(dim=1)
    unit = magnitudes / norms.clamp(min=1e-30)[:, None]
    free, order = torch.ones(len(rows), dtype=torch.bool), list[int]()
    while len(order) + size <= len(rows):
        first = int(torch.where(free, norms, -1.0).argmax())
        free[first] = False
        near = torch.where(free, unit @ unit[first], -1.0).topk(size - 1).indices
        free[near] = False
        order += [first, *near.tolist()]
    return torch.tensor([*order, *free.nonzero().flatten().tolist()])


@torch.no_grad()
def permute(model: nn.Module, family: Family, order: Int[Tensor, " units"]) -> None:
    """Put the units of a family into another order, in place, in every tensor that has them."""
    for member in family.members:
        tensor = dict(model.named_parameters(remove_duplicate=False)).get(member.name)
        found = model.get_buffer(member.name) if tensor is None else tensor
        places = member.index.flatten().to(found.device)
        taken = member.index[order].flatten().to(found.device)
        found.index_copy_(member.dim, places, found.index_select(member.dim, taken))


@torch.no_grad()
def rearrange(model: nn.Module, example: tuple[Tensor, ...], sparsity: float) -> dict[str, float]:
    """Reorder the channels of all 1x1 convolutions in place; the outputs stay what they were.

    Args:
        model: in eval mode or not; it is traced.
        example: inputs.
        sparsity: for which the kept magnitude is compared: an order that keeps less is not taken.

    Returns:
        For each family of channels that was reordered, by how much more of its magnitude is kept.

    Raises:
        GroupError: a model that cannot be traced.
    """
    names, gained = set(pointwise_weights(model)), dict[str, float]()
    for name, family in trace_groups(model, example).items():
        makers = [m.name for m in family.roles("out") if m.name in names and m.dim == 0]
        if not makers:
            continue
        rows = torch.cat([model.get_parameter(maker).flatten(1) for maker in makers], 1)
        if len(rows) != family.units:
            continue
        order = grouped(rows)
        gain = kept_magnitude(rows[order], sparsity) - kept_magnitude(rows, sparsity)
        if gain > 0:
            permute(model, family, order.cpu())
            gained[name] = gain
    return gained


@dataclass
class KernelGroups(TrainingMethod):
    """Reorder channels, then prune groups of 4 output channels of the 1x1 convolutions while training."""

    sparsity: float = 0.3
    """Share of zeros over the 1x1 convolutions, from 0 up to 1."""

    rearranged: bool = True
    """Whether channels are put in order first."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        names = pointwise_weights(model)
        if self.rearranged:
            rearrange(model, example_of(job), self.sparsity)
        train_gradually(model, job, self.sparsity, pattern=f"block{SIZE}x1", budget="uniform", names=names)
        return Pruned(model)
