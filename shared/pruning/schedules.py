"""When: schedules are pure functions of the step, so that a resumed run sees what the first would have seen.

`schedule(step)` is `initial` up to and at `start`, and exactly `final` at `end` and after it. The value is a
sparsity in most uses; linear, cubic and cosine serve for any other quantity (a drop fraction, a temperature,
a penalty) as well.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from ..errors import ScheduleError


class Schedule(ABC):
    """A value as a function of the step. `end` is the first step at which `final` is reached for good."""

    final: float
    end: int

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value at this step."""


@dataclass(frozen=True)
class OneShot(Schedule):
    """`initial` before step `end`, `final` from it on."""

    final: float
    end: int = 0
    initial: float = 0.0

    def __post_init__(self) -> None:
        _finite(self, self.final, self.initial)

    def __call__(self, step: int) -> float:
        return self.final if step >= self.end else self.initial


@dataclass(frozen=True)
class Ramp(Schedule):
    """Base of the schedules that go from `initial` at step `start` to `final` at step `end`.

    Raises:
        ScheduleError: `start` is not before `end`, or a value is not finite.
    """

    final: float
    end: int
    start: int = 0
    initial: float = 0.0

    def __post_init__(self) -> None:
        _finite(self, self.final, self.initial)
        if not 0 <= self.start < self.end:
            raise ScheduleError(
                f"{type(self).__name__} needs 0 <= start < end; received start={self.start}, end={self.end}"
            )

    def __call__(self, step: int) -> float:
        if step >= self.end:
            return self.final
        if step <= self.start:
            return self.initial
        return self._between((step - self.start) / (self.end - self.start))

    @abstractmethod
    def _between(self, time: float) -> float:
        """The value at relative time in (0, 1)."""


@dataclass(frozen=True)
class Linear(Ramp):
    """s(t) = s0 + (s1 - s0) t."""

    def _between(self, time: float) -> float:
        return self.initial + (self.final - self.initial) * time


@dataclass(frozen=True)
class Cubic(Ramp):
    """s(t) = s1 + (s0 - s1)(1 - t)^3, fast at first (Zhu and Gupta 2017, equation 1)."""

    def _between(self, time: float) -> float:
        return self.final + (self.initial - self.final) * (1 - time) ** 3


@dataclass(frozen=True)
class Cosine(Ramp):
    """s(t) = s1 + (s0 - s1)(1 + cos(pi t)) / 2."""

    def _between(self, time: float) -> float:
        return self.final + (self.initial - self.final) * (1 + math.cos(math.pi * time)) / 2


@dataclass(frozen=True)
class Exponential(Ramp):
    """The kept share decays exponentially: 1 - s(t) = (1 - s0)^(1 - t) (1 - s1)^t.

    Each step removes the same fraction of what is left, as iterative magnitude pruning does.

    Raises:
        ScheduleError: a value outside [0, 1), beside the errors of every ramp.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.initial < 1 and 0 <= self.final < 1):
            raise ScheduleError(
                f"Exponential needs sparsities in [0, 1); received initial={self.initial}, final={self.final}"
            )

    def _between(self, time: float) -> float:
        return 1 - (1 - self.initial) ** (1 - time) * (1 - self.final) ** time


@dataclass(frozen=True)
class Steps(Schedule):
    """Piecewise constant: each (step, value) pair holds from its step on, `initial` before the first.

    Raises:
        ScheduleError: no pairs, steps that do not increase, or a value that is not finite.
    """

    values: tuple[tuple[int, float], ...]
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not self.values:
            raise ScheduleError("Steps needs at least one (step, value) pair; received none")
        steps = [step for step, _ in self.values]
        if sorted(set(steps)) != steps:
            raise ScheduleError(f"Steps needs strictly increasing steps; received {steps}")
        _finite(self, self.initial, *(value for _, value in self.values))

    @property
    def final(self) -> float:  # type: ignore[override]
        """The last value."""
        return self.values[-1][1]

    @property
    def end(self) -> int:  # type: ignore[override]
        """The last step at which the value changes."""
        return self.values[-1][0]

    def __call__(self, step: int) -> float:
        value = self.initial
        for since, following in self.values:
            if step >= since:
                value = following
        return value


def _finite(schedule: Schedule, *values: float) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ScheduleError(f"{type(schedule).__name__} needs finite values; received {values}")
