"""Dynamic sparse training: drop the least of what is kept, grow as much elsewhere, count unchanged.

Both rules act on the units of the mask's pattern. A unit may be dropped and grown again in the same update;
it then keeps its weight and moments, while a truly new one starts from zero (`MaskHandle.update`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import PatternError, ScheduleError
from ..masks import Mask
from ..masks.patterns import topk_mask
from .scores import ScoreContext


@dataclass(frozen=True)
class Regrow(ABC):
    """Base of the drop-and-grow rules.

    Args:
        end: updates stop at this step (three quarters of the training as a rule).
        fraction: share of the kept units replaced at step 0.

    Raises:
        ScheduleError: a fraction outside [0, 1], or `end` below 1.
    """

    end: int
    fraction: float = 0.3

    needs_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1 or self.end < 1:
            raise ScheduleError(f"regrowth needs 0 <= fraction <= 1 and end >= 1; received {self}")

    @abstractmethod
    def fraction_at(self, step: int) -> float:
        """Share of the kept units replaced at this step."""

    @abstractmethod
    def growth(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        """Non-negative scores by which dropped entries return."""

    def survivors(
        self,
        magnitude: Float[Tensor, " units"],
        positive: Bool[Tensor, " units"] | None,
        kept: int,
        fraction: float,
    ) -> Bool[Tensor, " units"]:
        """The kept units that are not dropped. `magnitude` is -1 where a unit is not kept."""
        return topk_mask(magnitude, kept - math.floor(fraction * kept))

    def update(
        self,
        name: str,
        mask: Mask,
        weight: Float[Tensor, "*shape"],
        context: ScoreContext,
        step: int,
        within: Bool[Tensor, "*shape"] | None = None,
    ) -> Mask:
        """The next mask, with as many kept entries as `mask`, none of them outside `within` where that is
        given.

        Raises:
            PatternError: NaN among the scores of growth.
        """
        pattern, shape = mask.pattern, tuple(mask.shape)
        keep, weight = mask.keep.to(weight.device), weight.detach()
        kept_units = pattern.pool(keep.to(torch.float32)) > 0
        magnitude = torch.where(kept_units, pattern.pool(weight.abs()), -1.0)
        positive = weight.reshape(-1) >= 0 if pattern.unit_size(shape) == 1 else None
        alive = self.survivors(magnitude, positive, int(kept_units.count_nonzero()), self.fraction_at(step))
        growth = self.growth(name, weight, context)
        if within is not None:
            growth = growth.masked_fill(~within.to(growth.device), -torch.inf)
        wanted = torch.where(pattern.expand(alive, shape), torch.inf, growth)
        try:
            return Mask(pattern.keep(wanted, mask.kept), pattern)
        except PatternError as error:
            raise PatternError(f"{name!r}: {error}") from None


@dataclass(frozen=True)
class RigL(Regrow):
    """Drops by magnitude, grows by the size of the dense gradient (Evci et al. 2020, algorithm 1).

    The replaced fraction decays as fraction / 2 (1 + cos(pi step / end)). Differs from the paper: the
    optimiser step of an update is made, not replaced by the update.
    """

    needs_gradients: ClassVar[bool] = True

    def fraction_at(self, step: int) -> float:
        return self.fraction / 2 * (1 + math.cos(math.pi * step / self.end)) if step < self.end else 0.0

    def growth(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        return context.get("grads", name, self).abs()


@dataclass(frozen=True)
class SET(Regrow):
    """Drops the smallest positive and the least negative weights, the same fraction of each, and grows at
    random (Mocanu et al. 2018, algorithm 1).

    The fraction is constant until `end`. Differs from the paper: new weights start at zero, and patterns of
    blocks or slices drop by magnitude, since a unit of many weights has no sign.
    """

    def fraction_at(self, step: int) -> float:
        return self.fraction if step < self.end else 0.0

    def growth(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        return torch.rand(weight.shape, generator=context.generator).to(weight.device)

    def survivors(
        self,
        magnitude: Float[Tensor, " units"],
        positive: Bool[Tensor, " units"] | None,
        kept: int,
        fraction: float,
    ) -> Bool[Tensor, " units"]:
        if positive is None:
            return super().survivors(magnitude, positive, kept, fraction)
        alive = torch.zeros_like(positive)
        for side in (positive, ~positive):
            of_side = torch.where(side, magnitude, -1.0)
            count = int((of_side >= 0).count_nonzero())
            alive |= topk_mask(of_side, count - math.floor(fraction * count))
        return alive
