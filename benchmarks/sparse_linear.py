"""sparse_linear on a 4096 x 4096 layer against the best dense product of the run and torch's CSR
product."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from _linear import csr_peers, dense_peers, in_turn, layers

from shared import ops
from shared.bench import Bound, Cell, Goal, main
from shared.ops.sparse_linear import sparse_linear
from shared.ops.weights import SparseWeight, pack

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

    return in_turn(call, len(weights))


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    dense = layers(SIZE, SIZE)
    for zeros in (0.5, 0.9) if quick else (0.5, 0.7, 0.8, 0.9, 0.95):
        masks = [torch.rand(SIZE, SIZE) >= zeros for _ in dense]
        masked = [weight * mask for weight, mask in zip(dense, masks, strict=True)]
        packed = [pack(weight, mask) for weight, mask in zip(dense, masks, strict=True)]
        for batch in (1, 64) if quick else (1, 8, 64, 512):
            x = torch.randn(batch, SIZE)
            expected = torch.nn.functional.linear(x, masked[0])
            torch.testing.assert_close(sparse_linear(x, packed[0]), expected, atol=1e-3, rtol=1e-3)
            peers = dense_peers(dense, x)
            over = tuple(peers)
            goal = GOALS[batch].get(zeros)
            yield Cell(
                {"zeros": f"{zeros:.0%}", "batch": batch, "values": "fp32", "layout": packed[0].layout},
                ours(packed, x),
                peers | csr_peers(masked, x),
                Bound(packed[0].nbytes, 2 * packed[0].kept * batch),
                Goal(goal, over=over) if goal else None,
            )
        x = torch.randn(1, SIZE)
        for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16):
            half = [weight.to(dtype) for weight in packed]
            peers = dense_peers(dense, x)
            goal = HALF_GOALS.get(zeros)
            yield Cell(
                {"zeros": f"{zeros:.0%}", "batch": 1, "values": str(dtype)[6:], "layout": half[0].layout},
                ours(half, x),
                peers,
                Bound(half[0].nbytes, 2 * half[0].kept),
                Goal(goal) if goal else None,
            )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("sparse_linear is faster than the best dense product from 50 % zeros", cells))
