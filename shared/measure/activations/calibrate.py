"""The calibration runner: accumulators fed by hooks on named modules while a model sees some data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ActivationError
from ...masks import near_misses
from ..modes import eval_mode
from .statistics import Accumulator


@dataclass(frozen=True)
class Tap:
    """Where to listen and what to feed.

    Attributes:
        module: dotted name of the module.
        accumulators: each gets every batch as rows of features.
        where: "input" (the first positional argument) or "output".
        channel_dim: the axis of features: -1 for linear layers and norms, 1 for convolutions.
    """

    module: str
    accumulators: Sequence[Accumulator]
    where: Literal["input", "output"] = "input"
    channel_dim: int = -1


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    taps: Sequence[Tap],
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> int:
    """Run `model` over `batches` in eval mode without gradients, feeding the taps; its mode is restored.

    Args:
        model: any module.
        batches: whatever `forward` takes.
        taps: any number; several may listen to one module.
        forward: how to run the model on a batch. By default a mapping becomes keyword arguments, a tuple or
            list positional ones, anything else the only argument.

    Returns:
        The number of batches.

    Raises:
        ActivationError: an unknown module, NaN or infinite activations (with the module's name and the
            batch), a module that was never called, or no batch at all.
    """
    modules = dict(model.named_modules())
    for tap in taps:
        if tap.module not in modules:
            raise ActivationError(f"the model has no module {tap.module!r}{near_misses(tap.module, modules)}")
    state = {"batch": 0}
    heard: set[int] = set()
    handles = []
    for index, tap in enumerate(taps):
        feed = partial(_feed, tap, index, heard, state)
        module = modules[tap.module]
        if tap.where == "input":
            handles.append(module.register_forward_pre_hook(partial(_on_input, feed), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(partial(_on_output, feed)))
    try:
        with eval_mode(model), torch.no_grad():
            for batch in batches:
                state["batch"] += 1
                (forward or _forward)(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if state["batch"] == 0:
        raise ActivationError("calibrate: there is no batch; give at least one.")
    silent = [tap.module for index, tap in enumerate(taps) if index not in heard]
    if silent:
        raise ActivationError(f"calibrate: never called while the model ran: {', '.join(silent)}.")
    return state["batch"]


def _forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _on_input(
    feed: Callable[[Tensor], None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    feed(args[0] if args else next(iter(kwargs.values())))


def _on_output(feed: Callable[[Tensor], None], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    feed(output[0] if isinstance(output, tuple) else output)


def _feed(tap: Tap, index: int, heard: set[int], state: Mapping[str, int], x: Tensor) -> None:
    # The sum of magnitudes is finite exactly if all are, short of overflow, which float64 rules out.
    if not bool(torch.isfinite(x.abs().sum(dtype=torch.float64))):
        bad = int((~torch.isfinite(x)).sum())
        raise ActivationError(
            f"{tap.module}: {bad} of {x.numel()} values at its {tap.where} are NaN or infinite in batch "
            f"{state['batch']}; run the model in float32 or leave the batch out."
        )
    heard.add(index)
    rows = x.movedim(tap.channel_dim, -1).flatten(0, -2)
    for accumulator in tap.accumulators:
        accumulator.update(rows)
