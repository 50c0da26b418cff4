"""The arithmetic of budgets: bounds of each tensor, proportional shares, whole units and exact totals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import BudgetError
from ..masks.patterns import Pattern, Unstructured


@dataclass(frozen=True)
class Slot:
    """One tensor as a budget sees it.

    Args:
        shape: its shape.
        pattern: where its zeros may lie.
        score: its scores, or None where only the shape is known.
        low: the smallest number of entries it may keep.
        high: the largest; `low == high` for N:M patterns and for floors that are already met.
    """

    shape: tuple[int, ...]
    pattern: Pattern
    score: Tensor | None
    low: int
    high: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def unit(self) -> int:
        return self.pattern.unit_size(self.shape)


Slots = Mapping[str, Slot]


def make_slot(
    name: str, tensor: Tensor | Sequence[int], patterns: Pattern | Mapping[str, Pattern] | None
) -> Slot:
    score = tensor if isinstance(tensor, Tensor) else None
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else tuple(tensor)
    if isinstance(patterns, Mapping):
        if name not in patterns:
            raise BudgetError(f"no pattern for {name!r}; patterns are given for {sorted(patterns)[:5]}")
        pattern = patterns[name]
    else:
        pattern = patterns or Unstructured()
    pattern.check_shape(shape)
    numel = math.prod(shape)
    low = pattern.feasible(shape, 0)
    return Slot(shape, pattern, score, low=low, high=pattern.feasible(shape, numel))


def fixed(slot: Slot, kept: int) -> Slot:
    return Slot(slot.shape, slot.pattern, slot.score, kept, kept)


def score_of(name: str, slot: Slot) -> Tensor:
    if slot.score is None:
        raise BudgetError(f"this budget ranks entries and needs the scores of {name!r}, not only its shape")
    return slot.score


def check_room(slots: Slots, kept: int) -> None:
    low = sum(slot.low for slot in slots.values())
    if kept < low:
        total = sum(slot.numel for slot in slots.values())
        raise BudgetError(
            f"the patterns and floors need {low} of {total} entries, the sparsity leaves {kept}; "
            f"the largest possible sparsity is {1 - low / total:.4f}"
        )


def proportional(slots: Slots, kept: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Counts proportional to the weights, within bounds, in whole units, with the total met."""
    check_room(slots, kept)
    targets = {name: float(slot.low) for name, slot in slots.items() if slot.low == slot.high}
    rest = [name for name in slots if name not in targets]
    while rest:
        left = kept - sum(targets.values())
        total = sum(weights[name] for name in rest)
        share = {name: left * weights[name] / total for name in rest}
        full = [name for name in rest if share[name] > slots[name].high]
        if not full:
            targets |= share
            break
        targets |= {name: float(slots[name].high) for name in full}
        rest = [name for name in rest if name not in full]
    return _whole_units(slots, kept, targets)


def _whole_units(slots: Slots, kept: int, targets: Mapping[str, float]) -> dict[str, int]:
    """Rounds down to whole units, then hands out the remainder by the largest fraction, ties to the first."""
    counts: dict[str, int] = {}
    fraction: dict[str, float] = {}
    for name, slot in slots.items():
        if slot.low == slot.high:
            counts[name], fraction[name] = slot.low, 0.0
            continue
        # The tolerance keeps a target like 9 - 1e-15 from being rounded down to 8.
        units = math.floor(targets[name] / slot.unit + 1e-9)
        counts[name] = min(units * slot.unit, slot.high)
        fraction[name] = targets[name] / slot.unit - units
    left = kept - sum(counts.values())
    order = sorted(slots, key=lambda name: -fraction[name])
    while left > 0:
        fitting = [name for name in order if slots[name].unit <= min(left, slots[name].high - counts[name])]
        if not fitting:
            break
        for name in fitting:
            if slots[name].unit <= left:
                counts[name] += slots[name].unit
                left -= slots[name].unit
    return {name: counts[name] for name in slots}


def best_units_that_fit(
    slots: Slots, pooled: Mapping[str, Tensor], everything: Tensor, left: int
) -> dict[str, int]:
    """Greedy by score over units of different sizes: a unit that no longer fits is passed over for smaller
    ones."""
    names = list(slots)
    owner = np.repeat(np.arange(len(names)), [pooled[name].numel() for name in names])
    sizes = np.array([slots[name].unit for name in names], dtype=np.int64)
    owner = owner[everything.argsort(descending=True, stable=True).cpu().numpy()]
    counts = np.zeros(len(names), dtype=np.int64)
    while len(owner):
        # The longest prefix that fits is taken at once; then what is too large for the rest is struck out.
        taken = int(np.searchsorted(np.cumsum(sizes[owner]), left, side="right"))
        used = np.bincount(owner[:taken], minlength=len(names)) * sizes
        counts += used
        left -= int(used.sum())
        owner = owner[taken:]
        owner = owner[sizes[owner] <= left]
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def retained(score: Tensor, slot: Slot, counts: Iterable[int]) -> list[float]:
    """The score kept at each count: sums over the best units."""
    if slot.low == slot.high:
        return [float(score.sum()) for _ in counts]
    best = slot.pattern.pool(score).double().sort(descending=True).values * slot.unit
    total = torch.cat([best.new_zeros(1), best.cumsum(0)])
    return [float(total[count // slot.unit]) for count in counts]
