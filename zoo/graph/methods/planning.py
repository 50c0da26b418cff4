"""Planning with learned dynamics x' = x + f(x, u): a mixed-integer program, and search by samples.

The program is that of `zoo.graph.methods.sparse_dynamics` (paper, section 3.3): a ReLU y = max(a, 0) whose
bounds l < 0 < h straddle zero is y >= a, y >= 0, y <= a - l (1 - z), y <= h z with z in {0, 1}; bounds come
from intervals, and a ReLU that they decide needs no z. The cost is a weighted sum of distances |x - goal|
and |u|.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from zoo.errors import ConfigError
from zoo.graph.methods.sparse_dynamics import FoldedReLU

Array = np.ndarray


@dataclass(frozen=True)
class Goal:
    """What a plan pays for.

    Attributes:
        state: to be reached, [n].
        weight: of the distance of each of its entries at each step, [n].
        effort: of the size of controls.
        bound: of each control, |u| <= bound.
        horizon: steps.
    """

    state: Tensor
    weight: Tensor
    effort: float = 0.01
    bound: float = 1.0
    horizon: int = 6

    def __post_init__(self) -> None:
        if not 0 < self.bound < float("inf") or self.horizon < 1:
            raise ConfigError(
                "a plan needs a step and controls within a finite bound above 0; received horizon "
                f"{self.horizon}, bound {self.bound}"
            )

    def cost(
        self, states: Float[Tensor, "*batch steps n"], controls: Float[Tensor, "*batch steps m"]
    ) -> Float[Tensor, " *batch"]:
        """The cost of states x_1, x_2 ... and of the controls that led to them."""
        distance = ((states - self.state).abs() * self.weight).sum((-1, -2))
        return distance + self.effort * controls.abs().sum((-1, -2))


class Plan(NamedTuple):
    """Controls [horizon, m], the states [horizon, n] that the model predicts, their cost, and whether the
    program was solved to its end."""

    controls: Tensor
    states: Tensor
    cost: float
    optimal: bool


class _Program:
    """Variables and rows of a mixed-integer program, as they are added."""

    def __init__(self) -> None:
        self.low: list[float] = []
        self.high: list[float] = []
        self.integer: list[int] = []
        self.price: list[float] = []
        self.rows: list[tuple[Array, Array, float, float]] = []

    def add(self, low: Array, high: Array, price: Array | float = 0.0, integer: int = 0) -> Array:
        """New variables; returns their numbers."""
        numbers = np.arange(len(self.low), len(self.low) + len(low))
        self.low += list(low)
        self.high += list(high)
        self.price += list(np.broadcast_to(price, len(low)))
        self.integer += [integer] * len(low)
        return numbers

    def row(self, numbers: Array, factors: Array, low: float, high: float) -> None:
        """low <= factors . variables <= high."""
        self.rows.append((numbers, factors, low, high))

    def solve(self, seconds: float, gap: float) -> Any:
        matrix = sparse.lil_matrix((len(self.rows), len(self.low)))
        for place, (numbers, factors, _, _) in enumerate(self.rows):
            matrix[place, numbers] += factors
        limits = LinearConstraint(
            matrix.tocsr(), np.array([row[2] for row in self.rows]), np.array([row[3] for row in self.rows])
        )
        return milp(
            np.array(self.price),
            integrality=np.array(self.integer),
            bounds=Bounds(np.array(self.low), np.array(self.high)),
            constraints=limits,
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )


def plan(
    model: FoldedReLU, x: Float[Tensor, " n"], goal: Goal, seconds: float = 10.0, gap: float = 1e-3
) -> Plan | None:
    """The best controls over the horizon, up to the gap; None where the time ends before there are any.

    Raises:
        ConfigError: a state that is not finite, or of another width than the model's.
    """
    n = model.head.out_features
    if x.shape != (n,) or not bool(x.isfinite().all()):
        raise ConfigError(f"planning starts from {n} finite numbers; received {x.tolist()}")
    layers = [(_array(layer.weight), _array(layer.bias)) for layer in (*model.hidden, model.head)]
    m = layers[0][0].shape[1] - n
    program = _Program()
    low = high = _array(x)
    at, steps = program.add(low, high), []
    for _ in range(goal.horizon):
        u = program.add(np.full(m, -goal.bound), np.full(m, goal.bound))
        numbers = np.concatenate([at, u])
        least = np.concatenate([low, np.full(m, -goal.bound)])
        most = np.concatenate([high, np.full(m, goal.bound)])
        for weight, bias in layers[:-1]:
            numbers, least, most = _bend(program, numbers, least, most, weight, bias)
        weight, bias = layers[-1]
        total = weight.copy()
        total[:, :n] += np.eye(n)
        low, high = _interval(total, bias, least, most)
        after = program.add(low, high)
        for i in range(n):
            program.row(np.append(numbers, after[i]), np.append(total[i], -1.0), -bias[i], -bias[i])
        _absolute(program, after, _array(goal.state), _array(goal.weight))
        _absolute(program, u, np.zeros(m), np.full(m, goal.effort))
        steps.append((u, after))
        at = after
    found = program.solve(seconds, gap)
    if found.x is None:
        return None
    moves, states = (
        torch.tensor(np.stack([found.x[one] for one in part])).to(x) for part in zip(*steps, strict=True)
    )
    return Plan(moves, states, float(found.fun), found.status == 0)


def _array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def _interval(weight: Array, bias: Array, low: Array, high: Array) -> tuple[Array, Array]:
    up, down = np.maximum(weight, 0), np.minimum(weight, 0)
    return up @ low + down @ high + bias, up @ high + down @ low + bias


def _bend(
    program: _Program, numbers: Array, least: Array, most: Array, weight: Array, bias: Array
) -> tuple[Array, Array, Array]:
    """Add the ReLUs of a layer to the variables that the next one sees."""
    l, h = _interval(weight, bias, least, most)  # noqa: E741
    y = program.add(np.maximum(l, 0), np.maximum(h, 0))
    for i in range(len(bias)):
        seen, factors = np.append(numbers, y[i]), np.append(weight[i], -1.0)
        if h[i] <= 0:
            continue
        if l[i] >= 0:
            program.row(seen, factors, -bias[i], -bias[i])
            continue
        (z,) = program.add(np.zeros(1), np.ones(1), integer=1)
        program.row(seen, factors, -np.inf, -bias[i])  # y >= a
        under = np.append(factors, l[i])
        program.row(np.append(seen, z), under, l[i] - bias[i], np.inf)  # y <= a - l (1 - z)
        program.row(np.array([y[i], z]), np.array([1.0, -h[i]]), -np.inf, 0.0)  # y <= h z
    return np.concatenate([numbers, y]), np.append(least, np.maximum(l, 0)), np.append(most, np.maximum(h, 0))


def _absolute(program: _Program, numbers: Array, centre: Array, price: Array) -> None:
    """Add |variable - centre| at a price."""
    for number, middle, paid in zip(numbers, centre, price, strict=True):
        if paid > 0:
            (s,) = program.add(np.zeros(1), np.full(1, np.inf), paid)
            program.row(np.array([number, s]), np.array([1.0, -1.0]), -np.inf, middle)
            program.row(np.array([number, s]), np.array([1.0, 1.0]), middle, np.inf)


Step = Callable[[Tensor, Tensor], Tensor]


def rolled(
    step: Step, x: Float[Tensor, " n"], controls: Float[Tensor, "samples steps m"]
) -> Float[Tensor, "samples steps n"]:
    """States that controls lead to."""
    at, states = x.expand(len(controls), -1), []
    for t in range(controls.shape[1]):
        at = step(at, controls[:, t])
        states.append(at)
    return torch.stack(states, 1)


@torch.no_grad()
def sampled(
    step: Step,
    x: Float[Tensor, " n"],
    goal: Goal,
    mean: Float[Tensor, "steps m"],
    generator: torch.Generator,
    *,
    seconds: float,
    rule: str = "cem",
    samples: int = 128,
) -> Float[Tensor, "steps m"]:
    """Controls found by samples until the time is up: one round at least.

    Args:
        step: next states [samples, n] of states and controls.
        x, goal: where from, where to.
        mean: to start from (the last plan, shifted).
        generator: of the samples.
        seconds: of processor time.
        rule: cem refits a Gaussian to the best tenth and returns the best sample; mppi moves the mean by all,
            weighted by exp(-cost / temperature); random keeps the best of uniform samples.
        samples: a round.
    """
    spread, best, least = torch.full_like(mean, goal.bound), mean, float("inf")
    end = time.process_time() + seconds
    while True:
        noise = torch.randn(samples, *mean.shape, generator=generator)
        drawn = mean + noise * spread
        if rule == "random":
            drawn = (torch.rand(samples, *mean.shape, generator=generator) * 2 - 1) * goal.bound
        drawn = drawn.clamp(-goal.bound, goal.bound)
        costs = goal.cost(rolled(step, x, drawn), drawn)
        if float(costs.min()) < least:
            least, best = float(costs.min()), drawn[costs.argmin()]
        if rule == "cem":
            elite = drawn[costs.argsort()[: samples // 10]]
            mean, spread = elite.mean(0), elite.std(0) + 0.02 * goal.bound
        elif rule == "mppi":
            weight = (-(costs - costs.min()) / (0.1 * costs.std() + 1e-9)).softmax(0)
            mean, spread = (weight[:, None, None] * drawn).sum(0), torch.full_like(mean, 0.5 * goal.bound)
        if time.process_time() > end:
            return mean if rule == "mppi" else best
