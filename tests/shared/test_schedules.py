"""Schedules: pure in the step, exact at the end, monotone."""

from __future__ import annotations

import math
import pickle

import pytest

from zoo.shared.errors import ScheduleError
from zoo.shared.pruning.schedules import Cosine, Cubic, Exponential, Linear, OneShot, Ramp, Steps

RAMPS = [Linear, Cubic, Cosine, Exponential]


@pytest.mark.parametrize("cls", RAMPS)
@pytest.mark.parametrize("final", [0.9, 0.1 + 0.2, 1 / 3, 0.98])
def test_exact_at_both_ends_and_monotone_between(cls: type[Ramp], final: float):
    schedule = cls(final, end=97, start=10, initial=0.05)
    assert [schedule(step) for step in (0, 5, 10)] == [0.05] * 3
    assert [schedule(step) for step in (97, 98, 10_000)] == [final] * 3
    values = [schedule(step) for step in range(10, 98)]
    assert all(earlier < later for earlier, later in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("cls", RAMPS)
def test_pure(cls: type[Ramp]):
    schedule = cls(0.8, end=20)
    forward = [schedule(step) for step in range(25)]
    backward = [schedule(step) for step in reversed(range(25))]
    assert forward == backward[::-1]
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_hand_computed_middles():
    assert Linear(0.8, end=10)(5) == pytest.approx(0.4)
    assert Cubic(0.8, end=10)(5) == pytest.approx(0.8 * (1 - 0.125))
    assert Cosine(0.8, end=10)(5) == pytest.approx(0.4)
    assert Cosine(0.8, end=3)(1) == pytest.approx(0.8 * (1 - math.cos(math.pi / 3)) / 2)
    # iterative pruning by a fifth: after k of n rounds 0.8 ** k are left
    rounds = Exponential(1 - 0.8**10, end=10)
    assert [1 - rounds(k) for k in range(11)] == pytest.approx([0.8**k for k in range(11)])


def test_falling_values():
    drop_fraction = Cosine(0.0, end=100, initial=0.3)
    assert drop_fraction(0) == 0.3 and drop_fraction(50) == pytest.approx(0.15) and drop_fraction(100) == 0.0


def test_one_shot_and_steps():
    assert [OneShot(0.9)(step) for step in (0, 7)] == [0.9, 0.9]
    assert [OneShot(0.9, end=5)(step) for step in (4, 5, 6)] == [0.0, 0.9, 0.9]
    schedule = Steps(((2, 0.5), (4, 0.75)))
    assert [schedule(step) for step in range(6)] == [0.0, 0.0, 0.5, 0.5, 0.75, 0.75]
    assert (schedule.final, schedule.end) == (0.75, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(0.9, end=0),
        lambda: Cubic(0.9, end=5, start=5),
        lambda: Cubic(0.9, end=5, start=-1),
        lambda: Cosine(math.nan, end=5),
        lambda: OneShot(math.inf),
        lambda: Exponential(1.0, end=5),
        lambda: Exponential(0.5, end=5, initial=-0.1),
        lambda: Steps(()),
        lambda: Steps(((4, 0.5), (2, 0.7))),
        lambda: Steps(((2, 0.5), (2, 0.7))),
        lambda: Steps(((2, math.nan),)),
    ],
)
def test_impossible_schedules(make):
    with pytest.raises(ScheduleError, match="needs"):
        make()
