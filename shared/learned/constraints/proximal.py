"""Proximal operators prox_{t h}(v) = argmin_w 1/2 ||w - v||^2 + t h(w), in place on tensors.

Penalties on groups act on a group as a whole, so their operators are given twice: as factors by which each
group is scaled (from the group norms alone, for groups that spread over several tensors), and on the slices
of a tensor.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import BudgetError


def _check_threshold(name: str, threshold: float) -> None:
    if not 0 <= threshold < float("inf"):
        raise BudgetError(f"{name}: the threshold must be finite and not negative; received {threshold}.")


@torch.no_grad()
def prox_l1_(
    weight: Float[Tensor, "*shape"], threshold: float, where: Bool[Tensor, "*shape"] | None = None
) -> Float[Tensor, "*shape"]:
    """Soft threshold: sign(v) max(|v| - t, 0), the prox of t ||w||_1.

    Args:
        weight: changed in place and returned.
        threshold: t = step size times penalty.
        where: entries that carry the penalty; the others stay as they are.
    """
    _check_threshold("prox_l1_", threshold)
    shrunk = torch.nn.functional.softshrink(weight, threshold)
    return weight.copy_(shrunk if where is None else torch.where(where, shrunk, weight))


@torch.no_grad()
def prox_l0_(weight: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """Hard threshold: v where v^2 > 2 t, else 0, the prox of t ||w||_0. At equality zero is chosen."""
    _check_threshold("prox_l0_", threshold)
    return weight.copy_(torch.where(weight.square() > 2 * threshold, weight, torch.zeros_like(weight)))


@torch.no_grad()
def prox_nonnegative_(weight: Float[Tensor, "*shape"], threshold: float = 0.0) -> Float[Tensor, "*shape"]:
    """max(v - t, 0): the prox of t sum(w) under w >= 0; with t = 0 the projection on w >= 0."""
    _check_threshold("prox_nonnegative_", threshold)
    return weight.sub_(threshold).clamp_(min=0)


def group_soft_factors(
    norms: Float[Tensor, " groups"], threshold: float | Float[Tensor, " groups"]
) -> Float[Tensor, " groups"]:
    """Factors max(1 - t / n, 0) of the group soft threshold, the prox of t sum_j ||w_j||_2; 0 for a zero
    group.
    """
    return torch.where(norms > threshold, 1 - threshold / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)


@torch.no_grad()
def prox_group_(weight: Float[Tensor, "*shape"], threshold: float, dim: int = 0) -> Float[Tensor, "*shape"]:
    """Group soft threshold whose groups are the slices of `weight` along `dim`, in place (group lasso)."""
    _check_threshold("prox_group_", threshold)
    rest = [axis for axis in range(weight.ndim) if axis != dim % weight.ndim]
    norms = torch.linalg.vector_norm(weight, dim=rest) if rest else weight.abs()
    factors = group_soft_factors(norms, threshold)
    return weight.mul_(factors.view([-1 if axis not in rest else 1 for axis in range(weight.ndim)]))


def _check_envelope(norms: Tensor, costs: Tensor, budget: float) -> None:
    if not budget > 0:
        raise BudgetError(f"group envelope: the budget must be positive; received {budget}.")
    if not bool((torch.isfinite(costs) & (costs > 0)).all()):
        raise BudgetError("group envelope: every group needs a finite, positive cost.")
    if not bool(torch.isfinite(norms).all()):
        raise BudgetError("group envelope: a group norm is NaN or infinite; find where it came from first.")


def _shares(
    norms: Float[Tensor, " groups"], costs: Float[Tensor, " groups"], budget: float, step: float
) -> Float[Tensor, " groups"]:
    """u_j = clip(e n_j / sqrt(d_j) - step, 0, 1) with e such that sum_j d_j u_j = budget; all of it in
    float64.

    The sum is piecewise linear in e and does not fall. Its 2 G breakpoints are sorted, the slopes summed
    up, and the piece that crosses the budget is solved: O(G log G).
    """
    n, d = norms.double(), costs.double()
    active = n > 0
    if float(d[active].sum()) <= budget:
        return torch.ones_like(n)
    ratio = d[active].sqrt() / n[active]
    points = torch.cat([step * ratio, (step + 1) * ratio])
    slope = d[active].sqrt() * n[active]
    order = points.argsort()
    points = points[order]
    slopes = torch.cat([slope, -slope])[order].cumsum(0)
    values = torch.cat([points.new_zeros(1), (slopes[:-1] * points.diff()).cumsum(0)])
    piece = int(torch.searchsorted(values, budget)) - 1
    scale = points[piece] + (budget - values[piece]) / slopes[piece]
    return torch.where(active, (scale * n / d.sqrt() - step).clamp(0, 1), 0.0)


def envelope_factors(
    norms: Float[Tensor, " groups"], costs: Float[Tensor, " groups"], budget: float, step: float
) -> Float[Tensor, " groups"]:
    """Factors of the prox of step * GS_k, the group envelope with a chosen budget (WGSEF).

    GS_k(w) = 1/2 min_u sum_j ||w_j||^2 / u_j over 0 <= u_j <= 1, sum_j d_j u_j <= k. With equal costs and an
    integer k it is the convex envelope of 1/2 ||w||^2 on vectors with at most k non-zero groups. The prox
    scales group j by u_j / (step + u_j): exactly 0 where u_j = 0. One prox does not reach k groups;
    repeated steps do.

    Args:
        norms: Euclidean norm of every group.
        costs: d_j > 0.
        budget: k > 0, in units of cost.
        step: step size times penalty, > 0.

    Raises:
        BudgetError: a budget, cost, step or norm out of range.
    """
    _check_envelope(norms, costs, budget)
    if not 0 < step < float("inf"):
        raise BudgetError(f"group envelope: the step must be finite and positive; received {step}.")
    shares = _shares(norms, costs, budget, step)
    return (shares / (step + shares)).to(norms.dtype)


def group_envelope(
    norms: Float[Tensor, " groups"], costs: Float[Tensor, " groups"], budget: float
) -> Float[Tensor, ""]:
    """The value GS_k of the penalty itself (see `envelope_factors`), for logging and tests."""
    _check_envelope(norms, costs, budget)
    shares = _shares(norms, costs, budget, 0.0)
    terms = torch.where(shares > 0, norms.double().square() / shares.clamp_min(1e-300), 0.0)
    return (terms.sum() / 2).to(norms.dtype)
