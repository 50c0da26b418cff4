"""How a network is trained: numbers only, so that a recipe can be printed, compared and stored."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import TrainingError

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        epochs: passes over the data.
        steps: optimiser steps; 0 for as many as the epochs have.
        lr: peak of the learning rate.
        batch: samples per step, over all processes, where the batches can be made to size.
        weight_decay: as the optimiser takes it: an L2 penalty, or decoupled in AdamW.
        decayed: all parameters decay, or only `matrices` (two dimensions and more).
        momentum: of optimisers that have one; SGD takes it with Nesterov's look-ahead.
        optimizer: name of an optimiser of `torch.optim`, in any case.
        options: further arguments of the optimiser, e.g. `{"betas": (0.9, 0.95)}`.
        warmup: share of the steps in which the learning rate rises linearly to its peak.
        decay: how it falls to zero after the warm-up, `linear` or `cosine`, or `constant`.
        clip: largest norm of the gradient; 0 for no limit.
        accumulate: batches per optimiser step, whose mean loss is descended.
        autocast: `bfloat16` for matrix products and convolutions in that precision, weights staying as they
            are; empty for theirs.
        ema: decay per step of an exponential moving average of the weights, which then replaces them; 0 for
            none.
        select: the weights of the `last` step, or those of the epoch of `best` validation score, the last of
            equals.
        score_every: steps between two scores for that choice; 0 for one after each epoch.

    Raises:
        TrainingError: a number out of range, or a name that nobody knows.
    """

    epochs: int = 10
    lr: float = 0.1
    batch: int = 64
    weight_decay: float = 5e-4
    momentum: float = 0.9
    optimizer: str = "sgd"
    steps: int = 0
    warmup: float = 0.1
    decay: str = "linear"
    clip: float = 0.0
    accumulate: int = 1
    autocast: str = ""
    ema: float = 0.0
    select: str = "last"
    score_every: int = 0
    decayed: str = "all"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1; received {getattr(self, name)}")
        for name in ("lr", "weight_decay", "momentum", "clip", "steps", "score_every"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise TrainingError(f"{name} must be finite and not negative; received {value}")
        for name in ("warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"{name} must be from 0 up to 1; received {getattr(self, name)}")
        choices = {
            "decay": ("linear", "cosine", "constant"),
            "autocast": ("", "bfloat16"),
            "select": ("last", "best"),
            "decayed": ("all", "matrices"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise TrainingError(f"{name} is one of {known}; received {getattr(self, name)!r}")
        _optimizer_class(self.optimizer)

    def learning_rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of a training of so many steps.

        The warm-up takes W = max(1, floor(warmup steps)) steps, lr (step + 1) / W. After it `linear` is
        lr (steps - step) / (steps - W), and `cosine` lr (1 + cos(pi (step - W + 1) / (steps - W + 1))) / 2.
        """
        warm = max(1, int(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.decay == "constant":
            return self.lr
        if self.decay == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (steps - warm + 1)))
        return self.lr + (0.0 - self.lr) * ((step - warm) / (max(steps, warm + 1) - warm))

    def make_optimizer(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimiser over parameters, or over groups of them as `torch.optim` takes them.

        Raises:
            TrainingError: nothing to train, or arguments that the optimiser refuses.
        """
        groups = [item if isinstance(item, dict) else {"params": [item]} for item in parameters]
        if groups and not any(set(group) - {"params"} for group in groups):
            groups = [{"params": [p for group in groups for p in group["params"]]}]
        if self.decayed == "matrices":
            groups = [part for group in groups for part in _split(group)]
        kind = _optimizer_class(self.optimizer)
        known = inspect.signature(kind).parameters
        arguments: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        arguments |= {"momentum": self.momentum, "nesterov": self.momentum > 0}
        if "nesterov" not in known or kind is not torch.optim.SGD:
            del arguments["nesterov"]
        arguments = {k: v for k, v in arguments.items() if k in known} | dict(self.options)
        try:
            return kind(groups, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"torch.optim.{kind.__name__} refuses {arguments}: {error}") from error


def _split(group: dict[str, Any]) -> list[dict[str, Any]]:
    parameters = list(group["params"])
    parts = [
        {**group, "params": [p for p in parameters if p.dim() >= 2]},
        {**group, "params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [part for part in parts if part["params"]]


def _optimizer_class(name: str) -> Any:
    kinds = {
        key.lower(): kind
        for key, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    }
    kinds.pop("lbfgs", None)  # calls the loss several times a step
    if name.lower() not in kinds:
        raise TrainingError(f"optimizer is one of {', '.join(sorted(kinds))}; received {name!r}")
    return kinds[name.lower()]
