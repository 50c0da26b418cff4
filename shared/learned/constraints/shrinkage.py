"""Iterative soft shrinkage: pruned weights are made smaller, not zero, until the set of pruned weights has
settled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import BudgetError
from ...masks import Mask, MaskSet
from ...masks.patterns import Pattern, Unstructured


@torch.no_grad()
def soft_shrink_(
    weight: Float[Tensor, "*shape"], keep: Bool[Tensor, "*shape"], alpha: float
) -> Float[Tensor, "*shape"]:
    """w <- alpha w where not kept, in place; alpha = 0 is the hard projection, alpha = 1 changes nothing."""
    return weight.mul_(torch.where(keep, 1.0, alpha)) if alpha else weight.masked_fill_(~keep, 0)


class SoftShrinkage:
    """ISS-P (iterative soft shrinkage by percentage): shrink the smallest weights of each tensor after
    every step.

    After each optimiser step the smallest floor(sparsity * n) weights of every tensor, chosen anew, are
    multiplied by `alpha`; nothing is frozen, so a weight may recover. `finish` fixes the last choice and
    zeroes it.

    Args:
        params: the weights by name (they may then be found again in the returned MaskSet).
        sparsity: share to shrink, in [0, 1); a pattern that fixes its own count (N:M) ignores it.
        alpha: factor in [0, 1); the authors train with 0.95, and 0 is iterative hard thresholding.
        pattern: where the shrunk weights may lie.

    Raises:
        BudgetError: sparsity or alpha out of range.
        PatternError: a shape that does not suit the pattern.
    """

    def __init__(
        self, params: Mapping[str, Tensor], sparsity: float, alpha: float, pattern: Pattern | None = None
    ) -> None:
        if not 0 <= sparsity < 1:
            raise BudgetError(f"SoftShrinkage: sparsity must lie in [0, 1); received {sparsity}.")
        if not 0 <= alpha < 1:
            raise BudgetError(f"SoftShrinkage: alpha must lie in [0, 1); received {alpha}.")
        self.params = dict(params)
        self.alpha = alpha
        self.pattern = pattern or Unstructured()
        self._kept = {
            name: self.pattern.feasible(tuple(p.shape), p.numel() - math.floor(sparsity * p.numel()))
            for name, p in self.params.items()
        }
        self._chosen: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self) -> float:
        """Choose and shrink; call it after the optimiser's step, since before it the method is another one.

        Returns:
            Turnover: the share of all weights whose being kept or shrunk changed since the step before (0
                the first
            time). At zero the choice has frozen.
        """
        changed = 0
        for name, p in self.params.items():
            keep = self.pattern.keep(p.detach().abs(), self._kept[name])
            if name in self._chosen:
                changed += int((keep ^ self._chosen[name]).count_nonzero())
            self._chosen[name] = keep
            soft_shrink_(p, keep, self.alpha)
        return changed / max(1, sum(p.numel() for p in self.params.values()))

    @torch.no_grad()
    def finish(self) -> MaskSet:
        """Zero the weights of the last choice (made now if there was no step) and return it as masks."""
        if not self._chosen:
            self.step()
        for name, p in self.params.items():
            p.masked_fill_(~self._chosen[name], 0)
        return MaskSet({name: Mask(keep, self.pattern) for name, keep in self._chosen.items()})
