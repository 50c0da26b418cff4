"""sparse_linear on a 4096 x 4096 layer against the best dense product of the run and the sparse ones."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import torch
from _linear import DensePeers, SparsePeers, beyond_cache, copy_of, in_turn, layers

from zoo.shared import ops
from zoo.shared.bench import Bound, Cell, Goal, Later, main
from zoo.shared.ops.sparse_linear import sparse_linear
from zoo.shared.ops.weights import SparseWeight, pack

SIZE = 4096
# (zeros, batch) -> times as fast as the best dense product of the run; half precision is storage only.
GOALS = {
    1: {0.5: 1.6, 0.7: 2.2, 0.8: 2.8, 0.9: 4.5, 0.95: 8.0},
    8: {0.8: 2.0, 0.9: 4.0, 0.95: 7.0},
    64: {0.8: 2.0, 0.9: 4.0, 0.95: 7.0},
    512: {0.8: 2.5, 0.9: 4.0, 0.95: 6.0},
}
HALF_GOALS = {0.5: 2.5}


def ours(weights: list[SparseWeight], x: torch.Tensor):
    def call(i: int):
        def run() -> torch.Tensor:
            with ops.backend("native"):
                return sparse_linear(x, weights[i])

        return run

    for i in range(len(weights)):
        for _ in range(2):  # a large batch has its own form of the weight, made at the second call
            call(i)()
    return in_turn(call, len(weights))


def cells(quick: bool, threads: int) -> Iterator[Later]:
    dense = layers(SIZE, SIZE)
    peers = DensePeers(dense)

    @functools.lru_cache(maxsize=1)
    def masked_at(zeros: float) -> list[torch.Tensor]:
        return [weight * (torch.rand(SIZE, SIZE) >= zeros) for weight in dense]

    @functools.lru_cache(maxsize=1)
    def packed_at(zeros: float, dtype: torch.dtype) -> list[SparseWeight]:
        return [pack(weight.to(dtype)) for weight in masked_at(zeros)]

    @functools.lru_cache(maxsize=1)
    def sparse_peers_at(zeros: float) -> SparsePeers:
        return SparsePeers(masked_at(zeros))

    def build(labels: dict[str, object], zeros: float, batch: int, dtype: torch.dtype) -> Cell:
        x, weights = torch.randn(batch, SIZE), packed_at(zeros, dtype)
        expected = torch.nn.functional.linear(x, weights[0].to_dense().float())
        torch.testing.assert_close(sparse_linear(x, weights[0]), expected, atol=1e-3, rtol=1e-3)
        if batch <= 8:
            weights = beyond_cache(weights, weights[0].nbytes, copy_of)
        dense_of_run = peers.of(x)
        goals = GOALS[batch] if dtype == torch.float32 else HALF_GOALS
        return Cell(
            labels,
            ours(weights, x),
            dense_of_run | (sparse_peers_at(zeros).of(x) if dtype == torch.float32 else {}),
            Bound(weights[0].nbytes, 2 * weights[0].kept * batch),
            Goal(goals[zeros], over=tuple(dense_of_run)) if zeros in goals else None,
        )

    for zeros in (0.5, 0.9) if quick else (0.5, 0.7, 0.8, 0.9, 0.95):
        for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 2 if quick else 3]:
            for batch in (1, 64) if quick else (1, 8, 64, 512):
                if dtype == torch.float32 or batch == 1:  # half precision is storage, which counts at batch 1
                    labels = {"zeros": f"{zeros:.0%}", "batch": batch, "values": str(dtype)[6:]}
                    yield Later(labels, functools.partial(build, labels, zeros, batch, dtype))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("sparse_linear against the best dense product", cells))
