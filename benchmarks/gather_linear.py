"""gather_linear and gather_linear_rows (sparse activations) against torch's dense product, finding the
active set included."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import torch
from _linear import DensePeers, in_turn, layers
from torch import Tensor

from zoo.shared import ops
from zoo.shared.bench import Bound, Cell, Goal, Later, main
from zoo.shared.ops.dense_rows import DenseRows, store_rows
from zoo.shared.ops.gather_linear import gather_linear, gather_linear_rows

SHAPES = ((4096, 4096), (4096, 11008))
GOALS = {0.5: 1.9, 0.75: 3.5, 0.9: 8.0}


TURNS = 24  # active sets that take turns: together they read all of the weights, which no cache holds


def ours(calls: list[Callable[[], Tensor]]) -> Callable[[], object]:
    def run(i: int) -> Callable[[], object]:
        def once() -> Tensor:
            with ops.backend("native"):
                return calls[i]()

        return once

    return in_turn(run, len(calls))


def cells(quick: bool, threads: int) -> Iterator[Later]:
    @functools.lru_cache(maxsize=1)
    def dense_of(rows: int, cols: int) -> list[Tensor]:
        return layers(rows, cols)

    @functools.lru_cache(maxsize=1)
    def peers_of(rows: int, cols: int, dtype: torch.dtype) -> DensePeers:
        return DensePeers([weight.to(dtype) for weight in dense_of(rows, cols)])

    @functools.lru_cache(maxsize=1)
    def stored(rows: int, cols: int, kind: str, sparse: str) -> list[DenseRows]:
        dense = dense_of(rows, cols)
        return [store_rows(weight.t() if sparse == "input" else weight, kind) for weight in dense]

    def build(
        labels: dict[str, object], rows: int, cols: int, kind: str, batch: int, zeros: float, sparse: str
    ) -> Cell:
        weights = stored(rows, cols, kind, sparse)
        calls: list[Callable[[], Tensor]] = []
        for turn in range(TURNS):
            weight = weights[turn % len(weights)]
            if sparse == "input":
                x = torch.randn(batch, cols) * (torch.rand(cols) >= zeros)
                calls.append(functools.partial(gather_linear, x, weight))
            else:
                active = (torch.rand(rows) >= zeros).expand(batch, rows)
                calls.append(functools.partial(gather_linear_rows, torch.randn(batch, cols), weight, active))
        dtype = getattr(torch, kind) if kind in ("float32", "bfloat16") else torch.float32
        promised = batch == 1 and kind in ("float32", "bfloat16")
        return Cell(
            labels,
            ours(calls),
            peers_of(rows, cols, dtype).of(torch.randn(batch, cols, dtype=dtype)),
            Bound((1 - zeros) * weights[0].nbytes, 2 * (1 - zeros) * rows * cols * batch),
            Goal(GOALS[zeros]) if promised else None,
        )

    for rows, cols in SHAPES[:1] if quick else SHAPES:
        for kind in ("float32", "bfloat16") if quick else ("float32", "bfloat16", "float16", "int8", "int4"):
            for sparse in ("input", "output"):
                for batch in (1,) if quick or kind not in ("float32", "int4") else (1, 4, 8):
                    for zeros in GOALS:
                        labels: dict[str, object] = {"shape": f"{rows}x{cols}", "weights": kind}
                        labels |= {"batch": batch, "zeros": f"{zeros:.0%}", "sparse": sparse}
                        form = (rows, cols, kind, batch, zeros, sparse)
                        yield Later(labels, functools.partial(build, labels, *form))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("gather_linear against the dense product", cells))
