"""The cheapest set of items that frees enough: the 0/1 knapsack in its cover form, by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import BudgetError

QUANTA = 1000  # steps into which the target is divided; weights are rounded down, so the target is always met


def cheapest_cover(weights: Sequence[int], costs: Sequence[float], target: int) -> list[int]:
    """Indices of items whose weights reach `target` together at the least sum of costs.

    Exact for targets up to `QUANTA`; above, weights are counted in quanta of target / QUANTA, rounded down.

    Args:
        weights: what each item frees, not negative.
        costs: of each item, finite and not negative.
        target: least sum of weights.

    Raises:
        BudgetError: another number of costs than weights, a number out of range, or a target beyond the
        sum of
            all weights.
    """
    if len(weights) != len(costs):
        raise BudgetError(f"{len(weights)} weights need as many costs; received {len(costs)}")
    if any(w < 0 for w in weights) or any(not (c >= 0 and math.isfinite(c)) for c in costs):
        raise BudgetError("weights must not be negative, costs finite and not negative")
    if target > sum(weights):
        raise BudgetError(f"all items together free {sum(weights)}; {target} was asked for")
    if target <= 0:
        return []
    quantum = max(1.0, target / QUANTA)
    goal = math.ceil(target / quantum)
    sizes = [math.floor(w / quantum) for w in weights]
    if sum(sizes) < goal:  # rounding lost too much: only everything is enough
        return [index for index, weight in enumerate(weights) if weight]
    # best[k]: the least cost that frees at least k quanta with the items so far; taken[i][k]: whether i is
    # in it
    best = [0.0] + [math.inf] * goal
    taken = [[False] * (goal + 1) for _ in weights]
    for index, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
        for k in range(goal, 0, -1):
            with_it = best[max(0, k - size)] + cost
            if size and with_it < best[k]:
                best[k], taken[index][k] = with_it, True
    chosen, k = [], goal
    for index in reversed(range(len(sizes))):
        if taken[index][k]:
            chosen.append(index)
            k = max(0, k - sizes[index])
    return sorted(chosen)
