"""Alternating measurement of several functions, and the ratios between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Clock = Callable[[], float]

# A sample shorter than this is mostly the clock's own cost and grain, so that calls are taken together.
MIN_SAMPLE_SECONDS = 50e-6
_LEAST_ROUNDS = 6


@dataclass(frozen=True)
class Timing:
    """Seconds per call, as samples grouped by round."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def samples(self) -> list[float]:
        return sorted(sample for block in self.rounds for sample in block)

    def quantile(self, share: float) -> float:
        """The sample below which `share` of all samples lie (nearest rank)."""
        samples = self.samples
        return samples[min(len(samples) - 1, max(0, math.ceil(share * len(samples)) - 1))]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def p10(self) -> float:
        return self.quantile(0.1)

    @property
    def p90(self) -> float:
        return self.quantile(0.9)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one timing is than another: of the medians, and the range over the rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}-{self.high:.2f}]"


def ratio(base: Timing, ours: Timing) -> Ratio:
    """`base` over `ours`, above 1 where `ours` is faster. Rounds are paired, as they ran side by side."""
    each = [median(b) / median(o) for b, o in zip(base.rounds, ours.rounds, strict=True)]
    return Ratio(base.median / ours.median, min(each), max(each))


def _sample(function: Callable[[], object], calls: int, clock: Clock) -> float:
    start = clock()
    for _ in range(calls):
        function()
    return (clock() - start) / calls


def compare(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    block_seconds: float | int = 0.2,
    clock: Clock = time.perf_counter,
    settle: float | int = 0,
) -> dict[str, Timing]:
    """Time functions side by side: in each round a block of calls of each, in an order swapped every round.

    Args:
        functions: name -> function of no arguments.
        rounds: how often the functions take turns; at least 2, so that each runs both first and last. Down
            to six of them where a call is longer than a block.
        block_seconds: about how long one function runs in one round.
        clock: `time.perf_counter`, or `time.process_time` for one thread on a machine that others use too.
        settle: seconds of rest, and then a call that is not timed, before each block: the threads of the
            program before spin on for a while, and so would take part in the next one's time.

    Returns:
        For each name its samples; every sample is one call, or the mean of several very short ones.

    Raises:
        ValueError: fewer than two rounds, or no function.
    """
    if rounds < 2 or not functions:
        raise ValueError(f"compare needs functions and 2 rounds; received {len(functions)} and {rounds}")
    plan, longest = {}, float(block_seconds)
    for name, function in functions.items():
        function()  # compiles, allocates, warms up
        seconds = max(_sample(function, 1, clock), 1e-9)
        calls = max(1, math.ceil(MIN_SAMPLE_SECONDS / seconds))
        plan[name] = (calls, max(1, round(block_seconds / (seconds * calls))))
        longest = max(longest, seconds)
    rounds = max(min(rounds, _LEAST_ROUNDS), round(rounds * block_seconds / longest))
    blocks: dict[str, list[tuple[float, ...]]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: 1 if turn % 2 == 0 else -1]:
            calls, samples = plan[name]
            if settle:
                time.sleep(settle)
                functions[name]()
            blocks[name].append(tuple(_sample(functions[name], calls, clock) for _ in range(samples)))
    return {name: Timing(tuple(each)) for name, each in blocks.items()}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many threads within torch's operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Rotation(Generic[T]):
    """Equal things taken in turn, together larger than the cache, as the layers of a large model are.

    Args:
        make: builds the i-th of them.
        nbytes: size of one.
        beyond: bytes that all of them together must exceed, such as three times the last-level cache.
    """

    def __init__(self, make: Callable[[int], T], nbytes: int, beyond: int) -> None:
        self.items: Sequence[T] = [make(i) for i in range(max(1, beyond // max(nbytes, 1) + 1))]
        self._turn = 0

    def next(self) -> T:
        """The next one in turn."""
        self._turn = (self._turn + 1) % len(self.items)
        return self.items[self._turn]
