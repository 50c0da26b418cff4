"""Gates as functions of their logits, for gates that a network computes from its input; see `modules` for
learned ones.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import BudgetError
from ...masks.patterns import Pattern


def hard_concrete(
    logits: Float[Tensor, "*shape"],
    uniform: Float[Tensor, "*shape"],
    temperature: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
) -> Float[Tensor, "*shape"]:
    """A sample of the hard-concrete distribution (Louizos et al., 2018, equations 10 and 11).

    s = sigmoid((log u - log(1 - u) + logits) / temperature); z = clip(s (zeta - gamma) + gamma, 0, 1).

    Args:
        logits: log alpha.
        uniform: u in [0, 1], drawn by the caller; u = 1/2 gives the noiseless gate sigmoid(logits /
            temperature).
        temperature: beta of the paper.
        gamma: lower end of the stretch, < 0.
        zeta: upper end of the stretch, > 1.
    """
    tiny = torch.finfo(uniform.dtype).eps
    u = uniform.clamp(tiny, 1 - tiny)
    s = torch.sigmoid((u.log() - (-u).log1p() + logits) / temperature)
    return (s * (zeta - gamma) + gamma).clamp(0, 1)


class _HardStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        s = torch.sigmoid(z)
        return grads[0] * s * (1 - s)


def hard_step(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1[z >= 0], with the derivative of sigmoid(z) as its gradient."""
    return _HardStep.apply(z)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score: Tensor, kept: int, pattern: Pattern) -> Tensor:
        return pattern.keep(score, kept).to(score.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def top_k_gate(score: Float[Tensor, "*shape"], kept: int, pattern: Pattern) -> Float[Tensor, "*shape"]:
    """0/1 mask of the best scores under `pattern`, with the identity as gradient (edge-popup, Ramanujan et
    al., 2020).

    Multiplied with a weight w, the score's gradient becomes g w, where g is the gradient of the masked
    weight.

    Raises:
        PatternError: the pattern cannot keep `kept` entries of this shape, or a score is NaN.
    """
    return _TopK.apply(score, kept, pattern)


def _gumbel_like(tensor: Tensor) -> Tensor:
    return -torch.empty_like(tensor).exponential_().log()


def _log_probabilities(logits: Tensor, noisy: bool) -> Tensor:
    scores = torch.log_softmax(logits, dim=-1)
    return scores + _gumbel_like(scores) if noisy else scores


def gumbel_top_k(
    logits: Float[Tensor, "*batch n"],
    k: int | Tensor,
    temperature: float = 1.0,
    noisy: bool = True,
) -> Float[Tensor, "*batch n"]:
    """Straight-through choice of k entries of the last axis: a sample without replacement.

    Forward is the 0/1 mask of the k largest log_softmax(logits) + Gumbel noise (the noise makes it a sample
    in proportion to softmax(logits), without replacement); the gradient is that of softmax of the same noisy
    scores over `temperature`. Equal scores: the lower index is kept.

    Args:
        logits: entries of -inf are never chosen before finite ones.
        k: how many, or an integer tensor that broadcasts against [*batch, 1] with one count per row.
        temperature: > 0, of the gradient only.
        noisy: False at evaluation.

    Raises:
        BudgetError: k outside [1, n] or a temperature that is not positive.
    """
    n = logits.shape[-1]
    smallest, largest = (int(k.min()), int(k.max())) if isinstance(k, Tensor) else (k, k)
    if not (smallest >= 1 and largest <= n):
        raise BudgetError(f"gumbel_top_k: k must lie in [1, {n}]; received {smallest} to {largest}.")
    if not temperature > 0:
        raise BudgetError(f"gumbel_top_k: the temperature must be positive; received {temperature}.")
    scores = _log_probabilities(logits, noisy)
    ranks = scores.detach().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    hard = (ranks < k).to(logits.dtype)
    soft = torch.softmax(scores / temperature, dim=-1)
    return soft + (hard - soft).detach()


def gumbel_categorical(
    logits: Float[Tensor, "*batch n"], temperature: float = 1.0, noisy: bool = True
) -> Float[Tensor, "*batch n"]:
    """Straight-through one-hot choice among the last axis (Jang et al., 2017): `gumbel_top_k` with k = 1."""
    return gumbel_top_k(logits, 1, temperature, noisy)


def polarization(gates: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """mean q (1 - q): zero exactly if every gate value q in [0, 1] is 0 or 1."""
    return (gates * (1 - gates)).mean()
