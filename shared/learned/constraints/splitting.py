"""Constraints met by splitting: ADMM against any projection, and the augmented Lagrangian of one
inequality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BudgetError


@dataclass(frozen=True)
class Residuals:
    """How far ADMM is from agreement: primal ||w - z||_2 and dual rho ||z - z_before||_2."""

    primal: float
    dual: float


class ADMM(nn.Module):
    """min f(w) subject to w in C, split into an optimiser's steps on w and projections on C (scaled form).

    Each training step adds `penalty()` = rho/2 ||w - z + u||^2 to the loss; every so many steps
    `dual_step()` does z <- P_C(w + u), u <- u + w - z; `finish_()` ends with w <- P_C(w). For convex f and
    C this converges to the constrained minimum (Boyd et al., 2011, section 3); for the l0 ball and patterns
    it is a heuristic.

    z and u are buffers, so that they are saved, loaded and moved with `state_dict` and `to`.

    Args:
        params: the tensors w, owned by the model; they are not part of this module's state.
        project: in-place projection of a list of tensors on C, e.g. `partial(project_l0_, kept=1000)`. What
            it returns (masks, say) is what `finish_` returns.
        rho: weight of the penalty, > 0.

    Raises:
        BudgetError: rho is not positive, or there is nothing to constrain.
    """

    def __init__(self, params: Iterable[Tensor], project: Callable[[list[Tensor]], Any], rho: float) -> None:
        super().__init__()
        self._params = tuple(params)  # a tuple: not registered, so the model stays the owner
        if not self._params:
            raise BudgetError("ADMM: no tensors to constrain were given.")
        if not 0 < rho < float("inf"):
            raise BudgetError(f"ADMM: rho must be finite and positive; received {rho}.")
        self.rho = rho
        self._project = project
        for index, p in enumerate(self._params):
            self.register_buffer(f"z{index}", p.detach().clone())
            self.register_buffer(f"u{index}", torch.zeros_like(p))
        project(self._split("z"))

    def _split(self, letter: str) -> list[Tensor]:
        return [self.get_buffer(f"{letter}{index}") for index in range(len(self._params))]

    def penalty(self) -> Tensor:
        """rho/2 ||w - z + u||^2, differentiable in w, a 0-d tensor."""
        terms = zip(self._params, self._split("z"), self._split("u"), strict=True)
        return self.rho / 2 * torch.stack([(p - z + u).square().sum() for p, z, u in terms]).sum()

    @torch.no_grad()
    def dual_step(self) -> Residuals:
        """Project and update the dual; returns the residuals, whose going to zero tells convergence."""
        zs, us = self._split("z"), self._split("u")
        before = [z.clone() for z in zs]
        for p, z, u in zip(self._params, zs, us, strict=True):
            z.copy_(p + u)
        self._project(zs)
        for p, z, u in zip(self._params, zs, us, strict=True):
            u.add_(p - z)
        primal = torch.stack([(p - z).square().sum() for p, z in zip(self._params, zs, strict=True)]).sum()
        dual = torch.stack([(z - old).square().sum() for z, old in zip(zs, before, strict=True)]).sum()
        return Residuals(float(primal.sqrt()), self.rho * float(dual.sqrt()))

    @torch.no_grad()
    def finish_(self) -> Any:
        """Project w itself, in place, and return what the projection returns."""
        return self._project(list(self._params))


class AugmentedLagrangian(nn.Module):
    """One inequality c(w) <= bound, as a penalty with a scalar dual variable.

    Added to the loss: rho/2 max(c - bound, 0)^2 + dual (c - bound); after the optimiser's step
    dual <- max(dual + step (c - bound), 0). The dual is a buffer and starts at 0.

    Args:
        bound: the largest allowed value.
        rho: weight of the quadratic term, >= 0.
        step: step size of the dual, > 0; rho itself in the classic method.
    """

    dual: Tensor

    def __init__(self, bound: float, rho: float, step: float) -> None:
        super().__init__()
        if not (0 <= rho < float("inf") and 0 < step < float("inf")):
            raise BudgetError(
                f"AugmentedLagrangian: rho >= 0 and step > 0 are needed; received {rho} and {step}."
            )
        self.bound, self.rho, self.step = bound, rho, step
        self.register_buffer("dual", torch.zeros(()))

    def penalty(self, value: Tensor) -> Tensor:
        """The term to add to the loss, differentiable in the 0-d tensor `value` = c(w)."""
        excess = value - self.bound
        return self.rho / 2 * excess.clamp(min=0).square() + self.dual * excess

    @torch.no_grad()
    def dual_step(self, value: Tensor) -> None:
        """Update the dual with the current value of the constraint."""
        self.dual.add_(self.step * (value - self.bound)).clamp_(min=0)
