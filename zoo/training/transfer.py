"""A model made ready for other data: layers whose shape fits keep weights and masks, the others are new."""

from __future__ import annotations

import math

import torch
from torch import nn

from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.masks.patterns import Unstructured


def take_over(old: nn.Module, fresh: nn.Module, share: float | None = None) -> list[str]:
    """Copy what fits from `old` into `fresh`, and mask what is masked there.

    A tensor of another shape keeps its fresh values; if the old one was masked, it is masked by magnitude:
    ceil(n s) of its n weights are zero.

    Args:
        old: a model, with its masks.
        fresh: of the same architecture for other inputs or classes; changed in place.
        share: s; by default that of the old tensor's mask.

    Returns:
        The names of the parameters that are new.
    """
    masks, known = masks_of(old), dict(old.named_parameters())
    kept, new = {}, []
    for name, parameter in fresh.named_parameters():
        if fits := known[name].shape == parameter.shape:
            parameter.data.copy_(known[name].data)
        else:
            new.append(name)
        if masks is not None and name in masks:
            mask = masks[name]
            s = mask.sparsity if share is None else share
            kept[name] = mask if fits else _by_magnitude(parameter.data, s)
    buffers = dict(fresh.named_buffers())
    for name, buffer in old.named_buffers():
        if name in buffers and buffers[name].shape == buffer.shape:
            buffers[name].copy_(buffer)
    if masks is not None:
        found = MaskSet(kept)
        found.apply_(fresh)
        set_masks(fresh, found)
    return new


def _by_magnitude(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    return Unstructured().keep(weight.abs(), weight.numel() - math.ceil(weight.numel() * sparsity))
