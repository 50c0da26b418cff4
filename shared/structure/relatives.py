"""Copies of a module, and fresh ones of the same shapes, for any `nn.Module`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import MaskError
from ..masks import masks_of, tighten

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, random numbers of the processor follow `seed`; afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def copied(model: Model) -> Model:
    """A copy in float32 with the same masks, and without what the zoo knows of the original.

    Raises:
        MaskError: the model cannot be copied.
    """
    try:
        made = copy.deepcopy(model)
    except (TypeError, RuntimeError) as error:
        raise MaskError(f"{type(model).__name__} cannot be copied: {error}; pass a plain module") from error
    made.__dict__.pop("zoo_info", None)
    return made.float()


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are not numbers.

    Raises:
        MaskError: a parameter with NaN or infinity, by name.
    """
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise MaskError(
            f"{broken[0]!r} holds NaN or infinity ({len(broken)} such tensors); repair the model first"
        )


def reinitialised(model: Model, seed: int) -> Model:
    """A copy whose weights are drawn anew with `seed`; masks stay, and the caller's random state, too.

    A model that says how by `fresh(seed)` is asked. Else every module's `reset_parameters` (or
    `_reset_parameters`) is called, then `init_weights()` where a module has one, as those of timm and
    transformers do, which also know parameters that stand alone: positions, class tokens.

    Raises:
        MaskError: a parameter that none of these sets; it is named.
    """
    if callable(own := getattr(model, "fresh", None)):
        made: Model = own(seed)
    else:
        made = copied(model)
        with seeded(seed):
            _reset(made)
    masks = masks_of(model)
    if masks is not None:
        tighten(made, masks)
    return made


@torch.no_grad()
def _reset(model: nn.Module) -> None:
    alone: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if callable(reset):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            # NaN shows afterwards whether anybody has set it. What is not trained is part of the model.
            if parameter.requires_grad:
                alone[name] = parameter
                parameter.fill_(torch.nan)
    for module in model.modules():
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if callable(reset):
            reset()
    for item in (*model.modules(), *model.parameters()):
        item.__dict__.pop("_is_hf_initialized", None)  # transformers initialises nothing twice
    for module in model.modules():
        if callable(initialise := getattr(module, "init_weights", None)):
            try:
                initialise()
            except TypeError:
                continue  # it wants arguments that only its own constructor knows
    if unset := [name for name, parameter in alone.items() if bool(parameter.isnan().any())]:
        owner = type(model.get_submodule(unset[0].rpartition(".")[0])).__name__
        raise MaskError(
            f"{type(model).__name__} cannot be trained from fresh weights: {owner} has no reset_parameters() "
            f"for {unset[0]!r} ({len(unset)} such parameters). Give the model a method fresh(seed)"
        )
