"""What `auto` picks is never slower than a dense product: layers of many shapes, densities and batches,
against torch and, in fp32, against onnxruntime and OpenVINO where they are installed.

On two threads the pools of three engines would wait for each other: each turn begins with a rest and a call
that is not timed.

Both sides run the same weights again and again (a hot loop), which favours the dense side: a small sparse
weight gains more where no cache holds it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import torch
from _rivals import Peer, rivals
from torch import Tensor

from zoo.shared import ops
from zoo.shared.bench import Cell, Goal, Later, main
from zoo.shared.ops.sparse_linear import sparse_linear
from zoo.shared.ops.weights import SparseWeight, pack

# (out, in). Below these a call takes as long as Python's own part of it: `auto` adds some microseconds.
SHAPES = ((768, 768), (3072, 768), (1024, 1024), (2048, 2048), (4096, 4096), (1024, 4096), (4096, 1024))
ZEROS = (0.5, 0.7, 0.8, 0.9, 0.95)
BATCHES = {torch.float32: (1, 8, 64), torch.bfloat16: (1, 16)}
NEVER_SLOWER = Goal(1 / 1.05)


def cells(quick: bool, threads: int) -> Iterator[Later]:
    @functools.lru_cache(maxsize=1)
    def weights(shape: tuple[int, int], zeros: float, dtype: torch.dtype) -> tuple[Tensor, SparseWeight]:
        dense = (torch.randn(shape) * (torch.rand(shape) >= zeros)).to(dtype)
        return dense, pack(dense)

    def engines(dense: Tensor, x: Tensor, threads: int) -> dict[str, Peer]:
        layer = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False)
        layer.weight.data = dense
        return rivals(layer, x, threads)

    def build(
        labels: dict[str, object], shape: tuple[int, int], zeros: float, dtype: torch.dtype, batch: int
    ) -> Cell:
        dense, packed = weights(shape, zeros, dtype)
        x = torch.randn(batch, shape[1], dtype=dtype)
        for _ in range(2):  # plans, and the form of the weight for a large batch, are made once
            sparse_linear(x, packed)
        labels["choice"] = ops.explain(sparse_linear, x, packed).backend
        call: Callable[[], Tensor] = functools.partial(sparse_linear, x, packed)
        peers: dict[str, Callable[[], object]] = {
            "torch dense": functools.partial(torch.nn.functional.linear, x, dense)
        }
        if dtype == torch.float32:
            peers |= engines(dense, x, threads)
        return Cell(labels, call, peers, goal=NEVER_SLOWER)

    for shape in SHAPES[:2] if quick else SHAPES:
        for dtype, batches in BATCHES.items():
            for zeros in ZEROS[::2] if quick else ZEROS:
                for batch in batches:
                    labels: dict[str, object] = {"shape": f"{shape[0]}x{shape[1]}", "values": str(dtype)[6:]}
                    labels |= {"zeros": f"{zeros:.0%}", "batch": batch}
                    yield Later(labels, functools.partial(build, dict(labels), shape, zeros, dtype, batch))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    subject = "auto dispatch against the dense product"
    sys.exit(main(subject, cells, block_seconds=0.008, settle=0.01))
