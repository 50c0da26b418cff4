"""Learned gates, and the modules that put them on weights, channels and tokens.

A gate owns its logits and yields values in [0, 1]. In training mode it may be noisy or soft; in eval mode it
is the value that hardening leaves, without noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import BudgetError, MaskError
from ...masks.patterns import Group, Pattern, Unstructured
from ...measure.modes import eval_mode
from .base import WeightGate
from .functions import gumbel_top_k, hard_concrete, hard_step, polarization, top_k_gate


class Gate(nn.Module, ABC):
    """Base of the learned gates: one logit per gate, values in [0, 1].

    Args:
        shape: shape of the logits and of the values.
        init: starting value of the logits.
    """

    def __init__(self, shape: Sequence[int], init: float | Tensor) -> None:
        super().__init__()
        start = init if isinstance(init, Tensor) else torch.full(tuple(shape), float(init))
        if tuple(start.shape) != tuple(shape):
            raise MaskError(
                f"{type(self).__name__}: init has shape {tuple(start.shape)}, not {tuple(shape)}."
            )
        self.logits = nn.Parameter(start.detach().clone())

    @abstractmethod
    def forward(self) -> Tensor:
        """The values, of the logits' shape: differentiable in training mode, final in eval mode."""

    def keep(self) -> Tensor:
        """Which gates stay open: those whose eval-mode value is not zero."""
        with eval_mode(self), torch.no_grad():
            return self() > 0


class HardConcrete(Gate):
    """L0 regularisation by hard-concrete gates (Louizos, Welling and Kingma, 2018).

    Training: a sample (equations 10 and 11), unbiased for the expected loss by reparametrisation. Eval:
    equation 13, clip(sigmoid(logits) (zeta - gamma) + gamma, 0, 1). Noise is drawn anew at every call, unless
    `resample` was
    called: then that draw is used until the next one, so that a recomputed forward pass (or several weights
    that share the gate) sees the same gate.

    Args:
        shape: shape of the gates.
        init: log alpha at the start; 2.2 opens about 90 % of the gates' mass.
        temperature: beta; 2/3 in the paper.
        gamma: lower end of the stretch, < 0; -0.1 in the paper.
        zeta: upper end of the stretch, > 1; 1.1 in the paper.

    Raises:
        BudgetError: a temperature or stretch out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        init: float | Tensor = 2.2,
        temperature: float = 2 / 3,
        gamma: float = -0.1,
        zeta: float = 1.1,
    ) -> None:
        super().__init__(shape, init)
        if not (temperature > 0 and gamma < 0 and zeta > 1):
            raise BudgetError(
                "HardConcrete: temperature > 0, gamma < 0 and zeta > 1 are needed; "
                f"received {temperature}, {gamma} and {zeta}."
            )
        self.temperature, self.gamma, self.zeta = temperature, gamma, zeta
        self._uniform: Tensor | None = None

    def resample(self) -> None:
        """Draw the noise that all forward passes up to the next call use: once per training step."""
        self._uniform = torch.rand_like(self.logits)

    def sample(self, uniform: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The values for given noise in [0, 1]; one half everywhere gives a noiseless gate for training."""
        return hard_concrete(self.logits, uniform, self.temperature, self.gamma, self.zeta)

    def forward(self) -> Tensor:
        if not self.training:
            return (torch.sigmoid(self.logits) * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)
        return self.sample(torch.rand_like(self.logits) if self._uniform is None else self._uniform)

    def open_probability(self) -> Tensor:
        """P(z > 0) = sigmoid(logits - temperature log(-gamma / zeta)), equation 12, per gate."""
        return torch.sigmoid(self.logits - self.temperature * math.log(-self.gamma / self.zeta))

    def expected_l0(self) -> Float[Tensor, ""]:
        """The expected number of non-zero gates: the differentiable penalty."""
        return self.open_probability().sum()


class TopKGate(Gate):
    """Learned scores of which the best stay, by straight-through estimation (edge-popup; lottery jackpots).

    Args:
        shape: shape of the scores.
        sparsity: share of closed gates in [0, 1): floor(sparsity * n) of them, as far as the pattern allows.
        pattern: where closed gates may lie.
        init: starting scores, e.g. the magnitudes of the weight; a number makes all of them equal.
        magnitude: rank by |score|, as the methods do whose scores start as signed weights.
    """

    def __init__(
        self,
        shape: Sequence[int],
        sparsity: float,
        init: float | Tensor,
        pattern: Pattern | None = None,
        magnitude: bool = False,
    ) -> None:
        super().__init__(shape, init)
        if not 0 <= sparsity < 1:
            raise BudgetError(f"TopKGate: sparsity must lie in [0, 1); received {sparsity}.")
        self.pattern = pattern or Unstructured()
        self.magnitude = magnitude
        n = self.logits.numel()
        self.kept = self.pattern.feasible(tuple(shape), n - math.floor(sparsity * n))

    def forward(self) -> Tensor:
        return top_k_gate(self.logits.abs() if self.magnitude else self.logits, self.kept, self.pattern)


class HardGate(Gate):
    """1[logit >= 0], with the derivative of the sigmoid as gradient. Starts open at `init`."""

    def __init__(self, shape: Sequence[int], init: float | Tensor = 1.0) -> None:
        super().__init__(shape, init)

    def forward(self) -> Tensor:
        return hard_step(self.logits)


class SigmoidPolar(Gate):
    """Soft gates sigmoid(logit / temperature) that a penalty drives to 0 or 1; eval mode rounds them at one
    half.

    Args:
        shape: shape of the gates.
        init: starting logits.
        temperature: > 0; a schedule may lower the attribute to sharpen the gates.
    """

    def __init__(self, shape: Sequence[int], init: float | Tensor = 1.0, temperature: float = 1.0) -> None:
        super().__init__(shape, init)
        if not temperature > 0:
            raise BudgetError(f"SigmoidPolar: the temperature must be positive; received {temperature}.")
        self.temperature = temperature

    def forward(self) -> Tensor:
        values = torch.sigmoid(self.logits / self.temperature)
        return values if self.training else (values > 0.5).to(values.dtype)

    def polarization(self) -> Float[Tensor, ""]:
        """mean q (1 - q) over the soft values: the penalty that makes rounding harmless."""
        return polarization(torch.sigmoid(self.logits / self.temperature))


class GumbelTopK(Gate):
    """Exactly k open gates of the last axis, sampled while training, the k largest logits in eval mode."""

    def __init__(
        self, shape: Sequence[int], k: int, init: float | Tensor = 0.0, temperature: float = 1.0
    ) -> None:
        super().__init__(shape, init)
        self.k, self.temperature = k, temperature
        gumbel_top_k(
            self.logits.detach(), k, temperature, noisy=False
        )  # refuses what does not fit now, not later

    def forward(self) -> Tensor:
        values = gumbel_top_k(self.logits, self.k, self.temperature, noisy=self.training)
        return values if self.training else values.detach().round()


class GumbelCategorical(GumbelTopK):
    """One choice among the last axis (keep, linearise or drop a unit, say), one-hot; k = 1 of
    `GumbelTopK`."""

    def __init__(self, shape: Sequence[int], init: float | Tensor = 0.0, temperature: float = 1.0) -> None:
        super().__init__(shape, 1, init, temperature)


class GatedWeight(WeightGate):
    """Weight times gate, as a parametrisation: one gate per entry, or one per slice or set of slices along
    `dim`.

    Args:
        gate: the gate, which several weights may share.
        dim: the axis whose slices are gated; None if the gate has the weight's shape.
        index: [gates, width] which slices each gate scales; None if gate i scales slice i. Slices that are
            not named stay as they are.
    """

    def __init__(self, gate: Gate, dim: int | None = None, index: Tensor | None = None) -> None:
        super().__init__()
        self.gate = gate
        self.dim = dim
        self.index: Tensor | None
        self.register_buffer("index", index, persistent=False)
        if dim is not None:
            self.pattern = Group(dim)
        elif isinstance(gate, TopKGate):
            self.pattern = gate.pattern

    def _spread(self, values: Tensor, weight: Tensor) -> Tensor:
        if self.dim is None:
            return values
        if self.index is not None:
            slices = values.new_ones(weight.shape[self.dim])
            flat = self.index.reshape(-1)
            values = slices.index_put((flat,), values.repeat_interleave(self.index.shape[1]))
        return values.view([-1 if axis == self.dim % weight.ndim else 1 for axis in range(weight.ndim)])

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        factor = self._spread(self.gate(), weight)
        if self.dim is None and factor.shape != weight.shape:
            raise MaskError(
                f"the gate has shape {tuple(factor.shape)}, the weight {tuple(weight.shape)}; "
                "make them equal, or give the dim whose slices are gated."
            )
        return weight * factor

    def keep(self, weight: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        keep = self._spread(self.gate.keep().to(torch.uint8), weight) != 0
        return keep.expand(weight.shape).clone()


def gate_weight(module: nn.Module, name: str, gate: Gate, dim: int | None = None) -> Gate:
    """Put `gate` on the parameter `name` of `module` until `harden`; returns the gate, whose logits are to
    be trained.

    Raises:
        MaskError: the gate's shape suits neither the weight nor its slices along `dim`.
    """
    weight = getattr(module, name)
    expected = tuple(weight.shape) if dim is None else (weight.shape[dim],)
    if tuple(gate.logits.shape) != expected:
        raise MaskError(
            f"gate_weight: the gate on {name!r} has shape {tuple(gate.logits.shape)}, not {expected}."
        )
    parametrize.register_parametrization(module, name, GatedWeight(gate, dim))
    return gate


class UnitGate(nn.Module):
    """Multiplies activations by a gate along one axis (channels: dim 1 of [B, C, H, W]; neurons: dim -1).

    It stays in the model. To have gates folded into weights and cut, put them on a group (`GroupMap.gate`)
    instead.
    """

    def __init__(self, gate: Gate, dim: int = 1) -> None:
        super().__init__()
        self.gate = gate
        self.dim = dim

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x * self.gate().view([-1 if axis == self.dim % x.ndim else 1 for axis in range(x.ndim)])


class TokenGate(nn.Module):
    """Keeps the best-scored share of each row's tokens: a linear score and a straight-through Gumbel top-k.

    The count of a row is max(1, floor(ratio * its valid tokens)), so that padding is never chosen.

    Args:
        features: width of a token.
        ratio: share of valid tokens to keep, in (0, 1].
        temperature: of the gradient.
    """

    def __init__(self, features: int, ratio: float, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise BudgetError(f"TokenGate: the ratio must lie in (0, 1]; received {ratio}.")
        self.score = nn.Linear(features, 1)
        self.ratio, self.temperature = ratio, temperature

    def forward(
        self, x: Float[Tensor, "batch tokens features"], valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> tuple[Float[Tensor, "batch tokens features"], Float[Tensor, "batch tokens"]]:
        """The tokens times their gates, and the gates (0 or 1)."""
        scores = self.score(x).squeeze(-1)
        if valid is None:
            valid = torch.ones_like(scores, dtype=torch.bool)
        if not bool(valid.any(dim=1).all()):
            raise BudgetError("TokenGate: a row has no valid token; leave such rows out of the batch.")
        k = (valid.sum(dim=1, keepdim=True) * self.ratio).floor().long().clamp(min=1)
        gates = gumbel_top_k(scores.masked_fill(~valid, -torch.inf), k, self.temperature, noisy=self.training)
        return x * gates.unsqueeze(-1), gates
