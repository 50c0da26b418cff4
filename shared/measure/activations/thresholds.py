"""Activation sparsity: entries of small magnitude become exact zeros, which a kernel then skips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import BudgetError


def channel_thresholds(
    score: float | Tensor, second_moment: Float[Tensor, " channels"]
) -> Float[Tensor, " channels"]:
    """t_i = sqrt(T / m_i): one threshold per channel on |g_i| for the score g_i^2 m_i <= T (CHESS).

    A channel whose partner is always zero (m_i = 0) contributes nothing: its threshold is infinite, never
    NaN.

    Args:
        score: T >= 0, the k-th smallest score of the calibration data.
        second_moment: m_i = E[u_i^2] >= 0.

    Raises:
        BudgetError: a negative or NaN argument.
    """
    t = torch.as_tensor(score, dtype=second_moment.dtype)
    if not bool((t >= 0).all()) or not bool((second_moment >= 0).all()):
        raise BudgetError("channel_thresholds: the score and the second moments must be >= 0 and not NaN.")
    return torch.where(second_moment > 0, (t / second_moment).sqrt(), torch.inf)


class ActivationThreshold(nn.Module):
    """Keeps x where |x| > threshold (strictly), zero elsewhere. NaN passes through, so that it is not hidden.

    The comparison is made in the dtype of x, to which the threshold is cast.

    Args:
        threshold: one number, or one per channel of the last axis; infinity drops a channel altogether.
        persistent: whether the threshold is part of the state dict.

    Raises:
        BudgetError: a negative or NaN threshold, or one of more than one dimension.
    """

    threshold: Tensor

    def __init__(self, threshold: float | Tensor, persistent: bool = True) -> None:
        super().__init__()
        value = torch.as_tensor(threshold).detach().clone()
        if not value.is_floating_point():
            value = value.float()
        if value.ndim > 1 or not bool((value >= 0).all()):
            raise BudgetError(
                "ActivationThreshold: expected a number or a vector, none of it negative or NaN; received "
                f"{'NaN or negative values' if value.ndim <= 1 else f'shape {tuple(value.shape)}'}."
            )
        self.register_buffer("threshold", value, persistent=persistent)
        self.counting = False
        self.dropped = 0
        self.seen = 0

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        small = x.abs() <= self.threshold.to(x.dtype)
        if self.counting:
            self.dropped += int(small.count_nonzero())
            self.seen += small.numel()
        return x.masked_fill(small, 0)

    def extra_repr(self) -> str:
        kind = f"{len(self.threshold)} channels" if self.threshold.ndim else f"{float(self.threshold):.4g}"
        return f"threshold={kind}"


@contextmanager
def counting_sparsity(model: nn.Module) -> Iterator[None]:
    """Count, from zero, what the thresholds inside `model` drop while the context lasts."""
    thresholds = [module for module in model.modules() if isinstance(module, ActivationThreshold)]
    for module in thresholds:
        module.counting, module.dropped, module.seen = True, 0, 0
    try:
        yield
    finally:
        for module in thresholds:
            module.counting = False


def realised_sparsity(model: nn.Module) -> dict[str, float]:
    """Share of activations dropped, by module name, as counted under `counting_sparsity`.

    Raises:
        BudgetError: nothing was counted.
    """
    found = {
        name: module for name, module in model.named_modules() if isinstance(module, ActivationThreshold)
    }
    uncounted = [name for name, module in found.items() if module.seen == 0]
    if not found or uncounted:
        what = f"{', '.join(uncounted)} saw no activations" if uncounted else "the model has no thresholds"
        raise BudgetError(f"realised_sparsity: {what}; run the model under counting_sparsity first.")
    return {name: module.dropped / module.seen for name, module in found.items()}
