"""One set of weights at several sparsities: masks inside masks, kept as boolean tensors over what survives.

A model with the masks of its least sparse level carries, for each further level, for each masked tensor
the bits
of those entries that the level before keeps, and whole tensors that the level has of its own (the statistics
of batch norms):

    levels/1/keep/NAME     [entries that level 0 keeps], bool, in C order
    levels/1/own/NAME      as the model's tensor NAME

A level so costs a bit for each weight that the level before keeps, and no packed file need know of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import MaskError
from .mask import Mask, MaskSet

PREFIX = "levels/"


def to_extras(
    masks: MaskSet, levels: Sequence[MaskSet], own: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The extra tensors of the further levels.

    Args:
        masks: of the least sparse level.
        levels: of the further ones, each inside the one before, of the same tensors.
        own: for each of them the tensors that differ from the model's, outside the masked ones.

    Raises:
        MaskError: a level masks other tensors, keeps what the one before drops, or has a masked tensor of
        its own.
    """
    extras: dict[str, Tensor] = {}
    before = masks
    for number, (level, tensors) in enumerate(zip(levels, own, strict=True), start=1):
        if set(level) != set(masks) or set(tensors) & set(masks):
            raise MaskError(
                f"level {number} masks other tensors than the levels before, or replaces a masked one"
            )
        for name, mask in level.items():
            outer = before[name].keep
            if bool((mask.keep & ~outer).any()):
                raise MaskError(f"level {number} keeps entries of {name!r} that the level before drops")
            extras[f"{PREFIX}{number}/keep/{name}"] = mask.keep[outer].cpu()
        extras |= {f"{PREFIX}{number}/own/{name}": tensor.detach().cpu() for name, tensor in tensors.items()}
        before = level
    return extras


def level_extras(extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a model's extra tensors that describe its levels."""
    return {name: tensor for name, tensor in extras.items() if name.startswith(PREFIX)}


def count_levels(extras: Mapping[str, Tensor]) -> int:
    """How many levels there are besides the first."""
    return len({name.split("/")[1] for name in level_extras(extras)})


def at_level(
    tensors: Mapping[str, Tensor], masks: MaskSet, extras: Mapping[str, Tensor], number: int
) -> tuple[dict[str, Tensor], MaskSet]:
    """The tensors and masks of a level; level 0 is the model as it is.

    Args:
        tensors, masks, extras: of the model.
        number: of the level.

    Raises:
        MaskError: there is no such level, or its bits do not fit the level before.
    """
    if not 0 <= number <= count_levels(extras):
        raise MaskError(f"there are {count_levels(extras)} levels besides the first; asked for {number}")
    made, found = dict(tensors), dict(masks)
    for step in range(1, number + 1):
        for name, mask in found.items():
            bits = extras.get(f"{PREFIX}{step}/keep/{name}")
            if bits is None or bits.dtype != torch.bool or bits.shape != (mask.kept,):
                raise MaskError(f"the bits of {name!r} at level {step} do not fit the level before")
            keep = mask.keep.clone()
            keep[mask.keep] = bits.to(keep.device)
            found[name] = Mask(keep)
    for name, mask in found.items() if number else ():
        whole = tensors[name]
        for other, tensor in tensors.items():  # tied tensors have one mask and several names
            if other == name or (tensor.data_ptr() == whole.data_ptr() and tensor.shape == whole.shape):
                made[other] = torch.where(mask.keep, whole, torch.zeros((), dtype=whole.dtype))
    own = f"{PREFIX}{number}/own/"
    for full, tensor in extras.items():
        if full.startswith(own):
            name = full.removeprefix(own)
            if name in found or name not in made or made[name].shape != tensor.shape:
                raise MaskError(f"level {number} has a {name!r} of its own that the model has no place for")
            made[name] = tensor.to(made[name].dtype)
    return made, MaskSet(found)
