"""Training under masks that move, which dynamic sparse training and what builds on it share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from zoo.methods.training import cost_of_step
from zoo.shared.pruning.budgets import Budget
from zoo.shared.pruning.regrow import SET, RigL
from zoo.shared.pruning.sparsifier import Sparsifier
from zoo.shared.train import Fit, Job


def train_with_moving_masks(
    model: nn.Module,
    job: Job,
    sparsity: float,
    *,
    growth: Literal["rigl", "set", "static"],
    budget: Budget,
    names: Sequence[str],
    fraction: float = 0.3,
    every: int = 0,
) -> Fit:
    """Train a fresh model with random masks that move until three quarters of the steps, then with the last.

    Args:
        model, job: what is trained.
        sparsity, budget, names: how much of which weights is dropped.
        growth: grow where the dense gradient is largest, at random, or keep the masks as they are.
        fraction: share of the kept weights that move at first.
        every: steps between moves; 0 makes 25 moves in all.
    """
    fit = job.fit(model)
    end = max(1, int(0.75 * fit.steps))
    every = every or max(1, end // 25)
    if growth == "rigl":  # the step before a move needs the dense weight gradient, the others do without
        fit.macs = lambda: (
            (1 - 1 / every) * cost_of_step(model, job)
            + cost_of_step(model, job, dense_gradients=True) / every
        )
    rules = {"rigl": RigL(end, fraction), "set": SET(end, fraction), "static": None}
    with Sparsifier(
        model,
        fit.optimizer,
        sparsity=sparsity,
        score="random",
        budget=budget,
        regrow=rules[growth],
        names=names,
        every=every,
        seed=job.seed,
    ) as sparsifier:
        return fit.run(sparsifier.step)
