"""Models of cards: built without memory first, compared with the weights, and only then allocated.

A card is somebody else's text. Before anything of the size it asks for is allocated, the architecture is
built on the `meta` device of torch, where tensors have shapes and no storage; what it registers is counted
on the way, so that a card that asks for more than its weights file holds is refused at once. Whatever a
builder raises becomes a BundleError.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from zoo.bundles.card import Card
from zoo.errors import BundleError
from zoo.registry import ARCHITECTURES
from zoo.shared.errors import SparseError

# A builder may make parts that it replaces, and parts without parameters.
_SLACK, _SPARE = 8, 1000
# Sizes in `architecture.args`: larger numbers are lists of gigabytes before any tensor is made.
_LARGEST = 1 << 31


@contextlib.contextmanager
def refusing(name: str, where: str, remedy: str = "Fetch or save it again.") -> Iterator[None]:
    """Turn whatever a bundle's content makes fail into a BundleError, unless that names the bundle already.

    Args:
        name: of the bundle, with which the message starts.
        where: what of it is at fault, put behind the name.
        remedy: what to do.
    """
    try:
        yield
    except Exception as error:  # hostile content reaches other people's code; nothing it raises is ours
        if isinstance(error, BundleError) and str(error).startswith(name):
            raise
        known = isinstance(error, SparseError) or type(error) in (RuntimeError, ValueError, TypeError)
        kind = "" if known else f"{type(error).__name__}: "
        raise BundleError(f"{name}{where}: {kind}{_one_line(error)}. {remedy}") from error


def build(card: Card, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The card's architecture, with weights of its own, that the tensors fit by name, shape and type.

    The random state of the caller is untouched.

    Raises:
        BundleError: the arguments are refused, ask for more than the tensors, or build another model.
        UnknownNameError: nobody registered the architecture.
    """
    builder, args = ARCHITECTURES.get(card.architecture.name), card.architecture.args
    where = f": the architecture {card.architecture.name!r} refuses the arguments on the card"
    remedy = "Correct architecture.args, or use the version that made the bundle."
    with refusing(card.name, where, remedy):
        _check_sizes(args)
        with torch.random.fork_rng(devices=[]), _at_most(len(tensors)), torch.device("meta"), _Unfilled():
            planned = builder(**args)
    if not isinstance(planned, nn.Module):
        built = type(planned).__name__
        raise BundleError(f"{card.name}: {card.architecture.name!r} built a {built}, which is no module.")
    with refusing(card.name, ""):
        check_fits(planned.state_dict(keep_vars=True), tensors)
    del planned
    with refusing(card.name, where, remedy), torch.random.fork_rng(devices=[]), _at_most(len(tensors)):
        model: nn.Module = builder(**args)
    return model


def fill_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the stored tensors into the model in their stored precision; names and shapes must agree.

    A model whose `full_precision` is true keeps its own precision, whatever it is stored in.

    Raises:
        BundleError: they do not.
    """
    state = model.state_dict(keep_vars=True)
    check_fits(state, tensors)
    for name, tensor in tensors.items():
        own = state[name]
        if own.dtype != tensor.dtype and not getattr(model, "full_precision", False):
            own.data = own.data.to(tensor.dtype)  # the same Parameter object, so that ties hold
    model.load_state_dict(dict(tensors), strict=True)


def check_fits(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Compare an architecture's tensors with the stored ones by name, shape and kind of number.

    Raises:
        BundleError: they differ.
    """
    if missing := sorted(state.keys() - tensors.keys()):
        raise BundleError(f"the weights lack {missing[0]!r} ({len(missing)} missing)")
    if extra := sorted(tensors.keys() - state.keys()):
        raise BundleError(f"the weights have {extra[0]!r}, which the architecture lacks ({len(extra)} such)")
    for name, tensor in tensors.items():
        own = state[name]
        if own.shape != tensor.shape:
            raise BundleError(
                f"{name!r} has the shape {tuple(tensor.shape)}, the architecture {tuple(own.shape)}"
            )
        if own.dtype != tensor.dtype and not (own.is_floating_point() and tensor.is_floating_point()):
            raise BundleError(f"{name!r} is stored as {tensor.dtype}, the architecture has {own.dtype}")


class _Unfilled(TorchFunctionMode):
    """Leaves tensors that have no memory as they are: torch would import its compiler, for two seconds, to
    find that there is nothing to draw."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """Refuse a builder that registers many more parameters or modules than there are stored tensors."""
    left = {"parameters": _SLACK * tensors + _SPARE, "modules": _SLACK * tensors + _SPARE}
    thread = threading.get_ident()

    def counting(what: str) -> Any:
        def count(module: nn.Module, name: str, value: object) -> None:
            if threading.get_ident() != thread:  # the hooks are the process's
                return
            left[what] -= 1
            if left[what] < 0:
                raise BundleError(f"it asks for many more {what} than the {tensors} tensors that are stored")

        return count

    hooks = (
        register_module_parameter_registration_hook(counting("parameters")),
        register_module_module_registration_hook(counting("modules")),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_sizes(value: object) -> None:
    """Refuse whole numbers that no size of a model is."""
    if isinstance(value, dict):
        for item in value.values():
            _check_sizes(item)
    elif isinstance(value, list):
        for item in value:
            _check_sizes(item)
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise BundleError(f"{value} is larger than any size")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 600 else text[:597] + "..."
