"""Averages of networks that share a mask, and the statistics of norms that averages and cuts leave behind."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import MaskError
from ..masks import masks_of
from ..measure.calibration import Forward


def average_models(models: Sequence[nn.Module]) -> nn.Module:
    """A model whose floating-point parameters and buffers are the means of those of `models`.

    All must be of one shape and carry the same masks: the average of different masks would be denser than
    any of them. Integer buffers are those of the first. Statistics of batch norms are averages of what
    belongs to other weights, so call `recalibrate_norms` next.

    Raises:
        MaskError: fewer than two models, other names or shapes, or other masks than the first one's.
    """
    if len(models) < 2:
        raise MaskError(f"an average needs at least two models; received {len(models)}")
    states = [model.state_dict() for model in models]
    first = masks_of(models[0])
    for index, (model, state) in enumerate(zip(models, states, strict=True)):
        if [(k, v.shape) for k, v in state.items()] != [(k, v.shape) for k, v in states[0].items()]:
            raise MaskError(f"model {index} has other tensors than model 0; average models of one kind")
        own = masks_of(model)
        if own is None and first is None:
            continue
        if own is None or first is None or not own.equal(first):
            union = f"; their union keeps {1 - (own | first).sparsity():.2%}" if own and first else ""
            raise MaskError(f"model {index} has other masks than model 0{union}; average equal masks only")
    result = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, value in result.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.stack([state[name] for state in states]).mean(0))
    if first is not None:
        first.apply_(result)
    return result


@torch.no_grad()
def recalibrate_norms(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> int:
    """Measure the running statistics of the model's batch norms anew, as plain means over `batches`.

    Args:
        model: its weights and its mode stay as they are.
        batches: data; a few hundred samples suffice.
        forward: how to run the model on a batch; default `model(batch)`.

    Returns:
        How many norms were measured; with none, nothing is run.

    Raises:
        MaskError: there are norms, but no batches.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    drawn = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative means
            norm.train()
        for batch in batches:
            drawn += 1
            model(batch) if forward is None else forward(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    if not drawn:
        raise MaskError("recalibrate_norms received no batches; the norms now hold no statistics at all")
    return len(norms)
