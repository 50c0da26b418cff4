"""Inverses of damped Hessians of layer inputs: what second-order pruning ranks and corrects by."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import BudgetError


def inverse_diagonal(hessian: Float[Tensor, "in in"], damping: float = 0.01) -> Float[Tensor, " in"]:
    """The diagonal of (H + damping * mean(diag H) * I)^-1, float64.

    A layer that never saw an input has H = 0; then the identity is added, and all inputs count alike.
    """
    matrix = hessian.double().clone()
    mean = float(matrix.diagonal().mean())
    matrix.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix)).diagonal()


def inverse_factor(
    hessian: Float[Tensor, "in in"], damping: float
) -> tuple[Float[Tensor, "in in"], Bool[Tensor, " in"]]:
    """U, upper triangular, with U^T U = (H + damping * mean(diag H) * I)^-1, and which inputs never fired.

    An input that never fired gets 1 on the diagonal; its weights are worth nothing. Float32.

    Raises:
        BudgetError: a damping that is not positive, or too small for this matrix.
    """
    if not damping > 0:
        raise BudgetError(f"damping is a positive share of the mean diagonal of H; received {damping}")
    matrix = hessian.float().clone()
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    diagonal += damping * diagonal.mean()
    diagonal[dead] = 1.0
    try:
        lower = torch.linalg.cholesky(matrix)
        inverse = torch.cholesky_inverse(lower)
        return torch.linalg.cholesky(inverse, upper=True), dead
    except torch.linalg.LinAlgError as error:
        raise BudgetError(
            f"H of {len(matrix)} inputs cannot be inverted with damping {damping}; raise the damping or "
            "calibrate on more data"
        ) from error
