"""`zoo reproduce smash`: the speed of our product of sparse matrices, from its committed benchmarks."""

from __future__ import annotations

from zoo.studies.benchmarks import benchmark_study

STUDY = benchmark_study(
    "smash",
    "Products of sparse matrices on a CPU, by dense accumulators and by hash tables",
    "Kaustubh Shivdikar: SMASH: Sparse Matrix Atomic Scratchpad Hashing, 2021",
    38,
    ("spgemm-1", "spgemm-2", "spgemm_hash-1", "spgemm_hash-2"),
    "9.4 times others on a simulated PIUMA; for a CPU nothing",
    "where no accumulator is named a dense one ran, not SMASH's hash windows",
)
