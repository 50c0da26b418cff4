"""Timing done right: alternating blocks, medians with spread, measured bounds, goals that fail a script.

Rules that the parts of this package keep: all programs run in one process, in alternated blocks whose order
is swapped each round, after a warm-up; medians and spread are shown, never a single mean; beside each time
stand the strongest peer by name and the bound by bytes and FLOPs, from bandwidth and peak measured in the
same run; weights can be rotated so that the cache does not help where a model would not fit; the machine and
its load are recorded.
"""

from __future__ import annotations

from .machine import Bound, Limits, bandwidth, limits, machine, peak_flops
from .runner import Cell, Goal, Later, main
from .timing import Ratio, Rotation, Timing, compare, ratio, threads

__all__ = [
    "Bound",
    "Cell",
    "Goal",
    "Later",
    "Limits",
    "Ratio",
    "Rotation",
    "Timing",
    "bandwidth",
    "compare",
    "limits",
    "machine",
    "main",
    "peak_flops",
    "ratio",
    "threads",
]
