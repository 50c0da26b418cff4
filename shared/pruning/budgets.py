"""How much where: budgets turn one sparsity into the number of kept entries of each tensor.

With N entries in all, exactly N - floor(sparsity * N) are kept, whatever the rounding in the single tensors:
integer remainders go to the largest fractions, ties to the tensor that comes first. Where patterns keep
blocks or slices, the total falls short of that number by less than a unit. Tensors under an N:M pattern keep
their n of every m and the others share what remains.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from ..errors import BudgetError
from ..masks.patterns import Pattern, topk_mask
from .allocation import (
    Slot,
    Slots,
    best_units_that_fit,
    check_room,
    fixed,
    make_slot,
    proportional,
    retained,
    score_of,
)


def check_sparsity(sparsity: float) -> float:
    """Returns the sparsity if it lies in [0, 1).

    Raises:
        BudgetError: it does not, or it is NaN.
    """
    if not 0 <= sparsity < 1:
        raise BudgetError(f"sparsity must lie in [0, 1); received {sparsity} (0.9 drops 90 % of the entries)")
    return sparsity


def kept_count(numel: int, sparsity: float) -> int:
    """N - floor(s N), with s as written in decimal: 0.29 of 100 is 29, although the binary 0.29 lies a little
    below."""
    return numel - math.floor(Fraction(repr(float(check_sparsity(sparsity)))) * numel)


class Budget(ABC):
    """Base of the budgets."""

    def allocate(
        self,
        tensors: Mapping[str, Tensor | Sequence[int]],
        sparsity: float,
        patterns: Pattern | Mapping[str, Pattern] | None = None,
    ) -> dict[str, int]:
        """Kept entries of each tensor, feasible for its pattern, with the exact total (see the module).

        Args:
            tensors: scores by name; shapes suffice where the budget does not rank (uniform, Erdos-Renyi,
                sensitivity).
            sparsity: share of entries to drop over all tensors together, in [0, 1).
            patterns: one pattern for all, or one per name; unstructured by default.

        Raises:
            BudgetError: sparsity out of range, floors or patterns that cannot be met, or missing scores.
            PatternError: a shape its pattern does not allow.
        """
        slots = {name: make_slot(name, tensor, patterns) for name, tensor in tensors.items()}
        kept = kept_count(sum(slot.numel for slot in slots.values()), sparsity)
        if all(slot.low == slot.high for slot in slots.values()):
            return {name: slot.low for name, slot in slots.items()}
        return self.distribute(slots, kept)

    @abstractmethod
    def distribute(self, slots: Slots, kept: int) -> dict[str, int]:
        """Shares out `kept` entries over the slots, within their bounds."""


@dataclass(frozen=True)
class Uniform(Budget):
    """The same share of every tensor."""

    def distribute(self, slots: Slots, kept: int) -> dict[str, int]:
        return proportional(slots, kept, {name: float(slot.numel) for name, slot in slots.items()})


@dataclass(frozen=True)
class ErdosRenyi(Budget):
    """Density proportional to (sum of dimensions) / (product of dimensions): small tensors stay denser.

    The factor is solved for the total; tensors that would exceed density 1 stay dense and it is solved again
    (Mocanu et al. 2018; with `kernel=True` all dimensions of a convolution count, Evci et al. 2020, else only
    its numbers of output and input channels).
    """

    kernel: bool = True

    def distribute(self, slots: Slots, kept: int) -> dict[str, int]:
        weights: dict[str, float] = {}
        for name, slot in slots.items():
            dims = slot.shape if self.kernel else slot.shape[:2]
            weights[name] = slot.numel * sum(dims) / math.prod(dims) if slot.numel and dims else 1.0
        return proportional(slots, kept, weights)


@dataclass(frozen=True)
class SensitivityWeighted(Budget):
    """Kept share proportional to sensitivity ** power, capped at 1.

    Args:
        sensitivity: positive number per tensor, the loss caused by pruning it for instance.
        power: 0 makes it uniform.
    """

    sensitivity: Mapping[str, float]
    power: float = 1.0

    def distribute(self, slots: Slots, kept: int) -> dict[str, int]:
        wrong = [name for name in slots if not self.sensitivity.get(name, math.nan) > 0]
        if wrong:
            raise BudgetError(
                f"sensitivities must be positive and cover every tensor; missing or wrong: {wrong[:5]}"
            )
        return proportional(
            slots,
            kept,
            {name: slot.numel * self.sensitivity[name] ** self.power for name, slot in slots.items()},
        )


@dataclass(frozen=True)
class Global(Budget):
    """The best units anywhere are kept; equal scores go to the earlier tensor and the lower index.

    A tensor may lose everything; wrap it in `Floor` where that must not happen.
    """

    def distribute(self, slots: Slots, kept: int) -> dict[str, int]:
        counts = {name: slot.low for name, slot in slots.items()}
        open_slots = {name: slot for name, slot in slots.items() if slot.low < slot.high}
        left = kept - sum(counts.values())
        check_room(slots, kept)
        pooled = {name: slot.pattern.pool(score_of(name, slot)) for name, slot in open_slots.items()}
        sizes = {slot.unit for slot in open_slots.values()}
        exact = any(units.dtype in (torch.float64, torch.int64, torch.int32) for units in pooled.values())
        everything = torch.cat(
            [units.to(torch.float64 if exact else torch.float32) for units in pooled.values()]
        )
        if len(sizes) == 1:
            chosen = topk_mask(everything, min(left // sizes.pop(), everything.numel()))
            parts = chosen.split([units.numel() for units in pooled.values()])
            return counts | {
                name: int(part.count_nonzero()) * slot.unit
                for (name, slot), part in zip(open_slots.items(), parts, strict=True)
            }
        return counts | best_units_that_fit(open_slots, pooled, everything, left)


@dataclass(frozen=True)
class Floor(Budget):
    """Another budget with a minimum per tensor, against layer collapse.

    What falls below its floor is lifted to it, and the others share the rest anew, until none is below. The
    floor of a tensor of n entries is the largest of `kept`, `share` times all entries (the minimum threshold
    of Global Magnitude Pruning, whose 0.05 % is share=0.0005) and `density` times n, and never above n.
    Density 1
    keeps a tensor dense: uniform+ is `Floor(Uniform(), density={first: 1.0, last: 0.2})`, ERK+ is
    `Floor(ErdosRenyi(), density={last: 1.0})`.

    Raises:
        BudgetError: the floors together exceed what may be kept.
    """

    base: Budget
    kept: int = 1
    share: float = 0.0
    density: float | Mapping[str, float] = 0.0

    def __post_init__(self) -> None:
        densities = self.density.values() if isinstance(self.density, Mapping) else [self.density]
        if self.kept < 0 or not all(0 <= value <= 1 for value in [self.share, *densities]):
            raise BudgetError(f"a floor needs kept >= 0 and share and density in [0, 1]; received {self}")

    def distribute(self, slots: Slots, kept: int) -> dict[str, int]:
        if isinstance(self.density, Mapping) and (unknown := sorted(set(self.density) - set(slots))):
            raise BudgetError(
                f"floor densities name {unknown}, which are not among the tensors {sorted(slots)[:5]}"
            )
        total = sum(slot.numel for slot in slots.values())
        floors = {name: self._floor(name, slot, total) for name, slot in slots.items()}
        if sum(floors.values()) > kept:
            raise BudgetError(
                f"the floors need {sum(floors.values())} of {total} entries, the sparsity leaves {kept}; "
                f"lower the sparsity to {1 - sum(floors.values()) / total:.4f} or lower the floors"
            )
        current = dict(slots)
        while True:
            counts = self.base.distribute(current, kept)
            below = [name for name, count in counts.items() if count < floors[name]]
            if not below:
                return counts
            for name in below:
                current[name] = fixed(current[name], floors[name])
            if all(slot.low == slot.high for slot in current.values()):
                return {name: slot.low for name, slot in current.items()}

    def _floor(self, name: str, slot: Slot, total: int) -> int:
        density = self.density.get(name, 0.0) if isinstance(self.density, Mapping) else self.density
        wanted = max(self.kept, math.ceil(self.share * total), math.ceil(density * slot.numel))
        whole_units = -(-wanted // max(1, slot.unit)) * slot.unit
        return min(max(whole_units, slot.low), slot.high)


@dataclass(frozen=True)
class Knapsack(Budget):
    """The densities of a grid that retain the most score at a cost within the limit.

    Maximises the sum over tensors of the scores kept, subject to
    sum cost(name, kept) <= (1 - sparsity) * sum cost(name, numel): a multiple-choice knapsack, solved by
    dynamic programming over cost buckets. What exceeds the cheapest choice is rounded up to `limit / buckets`
    or finer, so the limit is never exceeded, and the answer is optimal where costs are whole buckets.

    Args:
        cost: cost of a tensor with that many kept entries: bytes, multiply-adds, measured seconds; None: the
            count itself.
        densities: the grid; 1.0 is always allowed.
        buckets: resolution of the cost.
    """

    cost: Callable[[str, int], float] | None = None
    densities: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    buckets: int = 2000

    def allocate(
        self,
        tensors: Mapping[str, Tensor | Sequence[int]],
        sparsity: float,
        patterns: Pattern | Mapping[str, Pattern] | None = None,
    ) -> dict[str, int]:
        """Kept entries of each tensor; `sparsity` is the share of the dense *cost* to save."""
        check_sparsity(sparsity)
        slots = {name: make_slot(name, tensor, patterns) for name, tensor in tensors.items()}
        dense = sum(self._cost(name, slot.numel) for name, slot in slots.items())
        return self._solve(slots, (1 - sparsity) * dense)

    def distribute(self, slots: Slots, kept: int) -> dict[str, int]:
        dense = {name: self._cost(name, slot.numel) for name, slot in slots.items()}
        return self._solve(
            slots, kept / max(1, sum(slot.numel for slot in slots.values())) * sum(dense.values())
        )

    def _cost(self, name: str, kept: int) -> float:
        return float(kept if self.cost is None else self.cost(name, kept))

    def _solve(self, slots: Slots, limit: float) -> dict[str, int]:
        options = {name: self._options(slot) for name, slot in slots.items()}
        result = {name: counts[0] for name, counts in options.items()}
        free = [name for name, counts in options.items() if len(counts) > 1]
        if not free:
            return result
        costs = {name: [self._cost(name, count) for count in counts] for name, counts in options.items()}
        lowest = {name: min(cost) for name, cost in costs.items()}
        room = limit - sum(lowest.values())
        if room < 0:
            raise BudgetError(
                f"the cheapest choice of the grid costs {sum(lowest.values()):.6g}, the limit is "
                f"{limit:.6g}; lower the sparsity or add lower densities"
            )
        # Costs above the cheapest, rounded up to buckets; the tolerance forgives the rounding of whole
        # buckets.
        bucket = room / self.buckets if room > 0 else 1.0
        extra = {name: [math.ceil((c - lowest[name]) / bucket - 1e-9) for c in costs[name]] for name in free}
        best = np.zeros(self.buckets + 1)
        choices: list[np.ndarray] = []
        for name in free:
            table = np.full((len(options[name]), self.buckets + 1), -np.inf)
            values = retained(score_of(name, slots[name]), slots[name], options[name])
            for row, (value, weight) in enumerate(zip(values, extra[name], strict=True)):
                if weight <= self.buckets:
                    table[row, weight:] = best[: self.buckets + 1 - weight] + value
            choices.append(table.argmax(axis=0))
            best = table.max(axis=0)
        position = self.buckets
        for name, choice in zip(reversed(free), reversed(choices), strict=True):
            row = int(choice[position])
            result[name] = options[name][row]
            position -= extra[name][row]
        return result

    def _options(self, slot: Slot) -> list[int]:
        """The feasible counts of the grid, in increasing order; one for N:M patterns and met floors."""
        grid = [
            slot.pattern.feasible(slot.shape, round(share * slot.numel)) for share in (*self.densities, 1.0)
        ]
        return sorted({min(max(count, slot.low), slot.high) for count in grid})


#: Budgets that need no arguments, by the name used in recipes and on the command line.
BUDGETS: dict[str, Callable[[], Budget]] = {
    "global": Global,
    "uniform": Uniform,
    "erk": ErdosRenyi,
    "er": lambda: ErdosRenyi(kernel=False),
}


def ratio_budget(names: Sequence[str], ratio: str) -> Budget:
    """The allocation of that name over tensors in the model's order: uniform, er or erk, and with a plus
    those that keep the last tensor (erk+) or the first (uniform+) dense; uniform+ gives the last a fifth.

    Raises:
        BudgetError: another name.
    """
    if ratio == "uniform+":
        return Floor(Uniform(), kept=0, density={names[0]: 1.0, names[-1]: 0.2})
    if ratio == "erk+":
        return Floor(ErdosRenyi(), kept=0, density={names[-1]: 1.0})
    if ratio not in ("uniform", "er", "erk"):
        raise BudgetError(f"a ratio is uniform, uniform+, er, erk or erk+; received {ratio!r}")
    return BUDGETS[ratio]()
