"""Levels of nested models: one set of weights at several sparsities (`zoo.shared.masks.nested`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from zoo.shared.masks import MaskSet, masks_of, nested, set_masks
from zoo.shared.structure.relatives import copied


def level_model(model: nn.Module, extras: Mapping[str, Tensor], number: int) -> nn.Module:
    """A copy of a model at one of its levels, with the masks of that level.

    Args:
        model: at its least sparse level, with masks.
        extras: with the levels' tensors.
        number: of the level, 0 for the model's own.

    Raises:
        MaskError: there is no such level.
    """
    made = copied(model)
    tensors, masks = nested.at_level(model.state_dict(), masks_of(model) or MaskSet({}), extras, number)
    made.load_state_dict(tensors)
    set_masks(made, masks)
    return made.eval()
