"""Low-rank adaptation that keeps every zero, and merges without losing one.

LoRA (Hu et al., ICLR 2022) trains W + (alpha / r) B A with W fixed. On a pruned W the product fills every
zero, so that a merged model is dense again. Here the update is masked where the weight is,

    W' = W + (alpha / r) M * (B A),

in training as in the merge: what is trained is what is merged, and W' has at least the zeros of W. It differs
from the paper in nothing else: A is drawn as `nn.Linear` draws, B is zero, so that W' = W at the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from zoo.errors import ConfigError
from zoo.llm.models.blocks import find_blocks
from zoo.shared.errors import MaskError
from zoo.shared.masks import Mask, MaskSet, masks_of


class MaskedLowRank(nn.Module):
    """W -> W + scale M * (B A), as a parametrisation of a weight.

    Args:
        weight: W, [out, in].
        rank: r, at most the smaller of out and in.
        alpha: scale = alpha / r.
        keep: M; None where nothing is pruned.
        generator: of A.
    """

    keep: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        rank: int,
        alpha: float,
        keep: Bool[Tensor, "out in"] | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        out, inputs = weight.shape
        if not 1 <= rank <= min(out, inputs):
            raise ConfigError(f"rank must be between 1 and {min(out, inputs)} here. Received: {rank}.")
        bound = 1 / math.sqrt(inputs)
        a = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(weight.new_zeros(out, rank))
        self.scale = alpha / rank
        self.register_buffer("keep", keep)

    def update(self) -> Float[Tensor, "out in"]:
        """What is added to the weight; zero wherever the mask drops."""
        product = self.scale * (self.b @ self.a)
        return product if self.keep is None else torch.where(self.keep, product, product.new_zeros(()))

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return weight + self.update()


class Adapter:
    """The low-rank updates of a model's projections, apart from the model.

    Attributes:
        updates: name of the weight -> its update [out, in] in single precision.
        masks: the zeros that it was trained on.
    """

    def __init__(self, updates: Mapping[str, Tensor], masks: MaskSet) -> None:
        self.updates, self.masks = dict(updates), masks

    def merge_(self, model: nn.Module) -> None:
        """Add the updates to the weights of a model, in place; its zeros stay.

        Raises:
            MaskError: the model lacks a weight, or its zeros are not those that the adapter was trained on.
        """
        parameters = dict(model.named_parameters())
        own = masks_of(model) or MaskSet({})
        for name, update in self.updates.items():
            if name not in parameters or parameters[name].shape != update.shape:
                raise MaskError(
                    f"the model has no weight {name!r} of shape {tuple(update.shape)}: another's adapter"
                )
            if not _same(own.get(name), self.masks.get(name)):
                raise MaskError(
                    f"{name!r} has other zeros than those the adapter was trained on: merging would lose "
                    "some. Merge into the model that it was trained on, or train it anew."
                )
        with torch.no_grad():
            for name, update in self.updates.items():
                weight = parameters[name]
                weight.copy_((weight.float() + update.to(weight.device)).to(weight.dtype))
        if lost := own.lost_zeros(model):
            raise MaskError(f"{lost[0]!r} lost zeros in the merge; the adapter's update is not masked")


def attach_lora(
    model: nn.Module,
    rank: int | Mapping[str, int],
    alpha: float | None = None,
    names: Sequence[str] = (),
    seed: int = 0,
) -> list[str]:
    """Freeze a model and give the projections of its blocks low-rank updates with their masks.

    Args:
        model: its masks (`zoo.shared.masks.masks_of`) say which zeros stay.
        rank: r, the same everywhere or by the name of the block.
        alpha: by default 2 r.
        names: globs over the names of weights; by default all seven projections of every block.
        seed: of A.

    Returns:
        The names of the adapted weights.

    Raises:
        ConfigError: an impossible rank, no weight matches, or projections that are no `nn.Linear`.
    """
    masks = masks_of(model) or MaskSet({})
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for block in find_blocks(model):
        for name, linear in block.linears():
            if names and not any(fnmatchcase(f"{name}.weight", glob) for glob in names):
                continue
            if type(linear) is not nn.Linear:
                raise ConfigError(
                    f"{name} is a {type(linear).__name__}: only a plain nn.Linear takes a low-rank update."
                )
            own = rank if isinstance(rank, int) else rank[block.name]
            chosen.append((f"{name}.weight", linear, own))
    if not chosen:
        raise ConfigError(f"No projection matches {', '.join(names)}.")
    model.requires_grad_(False)
    for name, linear, own in chosen:
        keep = masks[name].keep.to(linear.weight.device) if name in masks else None
        low_rank = MaskedLowRank(linear.weight.detach(), own, float(alpha or 2 * own), keep, generator)
        parametrize.register_parametrization(linear, "weight", low_rank)
    return [name for name, *_ in chosen]


def detach_lora(model: nn.Module, merge: bool) -> Adapter:
    """Take the low-rank updates off again.

    Args:
        model: after `attach_lora`.
        merge: add the updates to the weights, which keeps every zero, or leave the weights as they were.

    Raises:
        ConfigError: the model has no low-rank updates.
        MaskError: the masks changed since.
    """
    masks, updates = masks_of(model) or MaskSet({}), {}
    for name, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module, "weight"):
            continue
        low_rank = module.parametrizations.weight[0]
        if isinstance(low_rank, MaskedLowRank):
            updates[f"{name}.weight"] = low_rank.update().detach().float()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    if not updates:
        raise ConfigError(f"This {type(model).__name__} has no low-rank updates; call attach_lora first.")
    adapter = Adapter(updates, MaskSet({name: masks[name] for name in updates if name in masks}))
    if merge:
        adapter.merge_(model)
    return adapter


def _same(left: Mask | None, right: Mask | None) -> bool:
    """Whether two masks, or none and none, keep the same."""
    return left is right if left is None or right is None else left.equal(right)
