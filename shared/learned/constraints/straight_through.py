"""Straight-through training of masked weights: dense gradients for a sparse forward pass.

With w the weight, m its mask, g = dL/dw_effective:

    straight_through  forward m w                      backward g
    sr_ste            forward m w                      backward g + decay (1 - m) w
    decaying_ste      forward (m + beta (1 - m)) w     backward g, or (m + beta (1 - m)) g if restricted

A plain product m w, with m g as gradient, needs no function; for scores on frozen weights see
`zoo.shared.learned.gates`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...errors import BudgetError
from ...masks.patterns import Pattern
from ..gates.base import WeightGate


class _StraightThrough(torch.autograd.Function):
    """forward: w where kept, beta w elsewhere; backward: g, plus decay w where not kept."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: Tensor, beta: float, decay: float) -> Tensor:
        ctx.decay = decay
        if decay:
            ctx.save_for_backward(weight, keep)
        return torch.where(keep, weight, beta * weight if beta else torch.zeros_like(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        if ctx.decay:
            weight, keep = ctx.saved_tensors
            grad = grad + ctx.decay * weight.masked_fill(keep, 0)
        return grad, None, None, None


def straight_through(
    weight: Float[Tensor, "*shape"], keep: Bool[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """m w with the gradient g of a dense weight (Bengio et al., 2013)."""
    return _StraightThrough.apply(weight, keep, 0.0, 0.0)


def pass_through(value: Float[Tensor, "*shape"], replacement: Float[Tensor, "*shape"]) -> Tensor:
    """`replacement`, whose gradient goes to `value` unchanged."""
    return value + (replacement - value).detach()


def round_through(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The nearest integers, half to even, with the gradient of the identity."""
    return pass_through(value, value.round())


def sr_ste(
    weight: Float[Tensor, "*shape"], keep: Bool[Tensor, "*shape"], decay: float = 2e-4
) -> Float[Tensor, "*shape"]:
    """m w with gradient g + decay (1 - m) w: masked weights are pulled to zero (Zhou et al., 2021, equation
    9).

    The default of `decay` is the authors'.
    """
    return _StraightThrough.apply(weight, keep, 0.0, decay)


def decaying_ste(
    weight: Float[Tensor, "*shape"], keep: Bool[Tensor, "*shape"], beta: float, restrict: bool = False
) -> Float[Tensor, "*shape"]:
    """(m + beta (1 - m)) w: masked weights fade as beta goes from 1 to 0 (Kao et al., 2022).

    The gradient is g as in their code, or with `restrict` that of the formula, so that what flows to masked
    weights fades as well, which is the paper's argument.
    """
    if restrict:
        return torch.where(keep, weight, beta * weight)
    return _StraightThrough.apply(weight, keep, beta, 0.0)


class PatternSTE(WeightGate):
    """A weight masked by its own magnitudes at every forward pass, trained straight through.

    Args:
        pattern: where zeros may lie.
        sparsity: share of zeros in [0, 1), floor(sparsity * n) of them; None where the pattern fixes it
            (N:M).

    Raises:
        BudgetError: sparsity out of range, or missing where the pattern needs it.
        PatternError: (at registration) the weight's shape does not suit the pattern.
    """

    def __init__(self, pattern: Pattern, sparsity: float | None = None) -> None:
        super().__init__()
        if sparsity is None and pattern.fixed_density is None:
            raise BudgetError(f"{type(self).__name__}: {pattern} needs a sparsity in [0, 1); none was given.")
        if sparsity is not None and not 0 <= sparsity < 1:
            raise BudgetError(f"{type(self).__name__}: sparsity must lie in [0, 1); received {sparsity}.")
        self.pattern = pattern
        self.sparsity = sparsity

    def keep(self, weight: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """The largest magnitudes that the pattern can keep."""
        kept = weight.numel() - math.floor((self.sparsity or 0.0) * weight.numel())
        return self.pattern.keep(weight.detach().abs(), self.pattern.feasible(tuple(weight.shape), kept))

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return straight_through(weight, self.keep(weight))


class SRSTE(PatternSTE):
    """`PatternSTE` with the sparse-refined gradient of `sr_ste`."""

    def __init__(self, pattern: Pattern, sparsity: float | None = None, decay: float = 2e-4) -> None:
        super().__init__(pattern, sparsity)
        self.decay = decay

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return sr_ste(weight, self.keep(weight), self.decay)


class DecayingSTE(PatternSTE):
    """`PatternSTE` whose masked weights fade: factor `beta` while training, 0 in eval mode.

    A schedule drives beta from 1 to 0: `DecayingSTE.set_beta(model, schedule(step))`. For `restrict` see
    `decaying_ste`.
    """

    def __init__(
        self, pattern: Pattern, sparsity: float | None = None, beta: float = 1.0, restrict: bool = False
    ) -> None:
        super().__init__(pattern, sparsity)
        self.beta, self.restrict = beta, restrict

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return decaying_ste(weight, self.keep(weight), self.beta if self.training else 0.0, self.restrict)

    @staticmethod
    def set_beta(model: nn.Module, beta: float) -> None:
        """Set beta of every `DecayingSTE` in `model`.

        Raises:
            BudgetError: beta outside [0, 1].
        """
        if not 0 <= beta <= 1:
            raise BudgetError(f"DecayingSTE: beta must lie in [0, 1]; received {beta}.")
        for module in model.modules():
            if isinstance(module, DecayingSTE):
                module.beta = beta
