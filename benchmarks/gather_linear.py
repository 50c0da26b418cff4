"""gather_linear and gather_linear_rows (sparse activations) against torch's dense product, finding the
active set included."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from _linear import dense_peers, in_turn, layers
from torch import Tensor

from shared import ops
from shared.bench import Bound, Cell, Goal, main
from shared.ops.dense_rows import DenseRows, store_rows
from shared.ops.gather_linear import gather_linear, gather_linear_rows

SHAPES = ((4096, 4096), (4096, 11008))
GOALS = {0.5: 1.9, 0.75: 3.5, 0.9: 8.0}


def ours(call: Callable[[DenseRows], Tensor], weights: list[DenseRows]) -> Callable[[], object]:
    def run(i: int) -> Callable[[], object]:
        def once() -> Tensor:
            with ops.backend("native"):
                return call(weights[i])

        return once

    return in_turn(run, len(weights))


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    for rows, cols in SHAPES[:1] if quick else SHAPES:
        dense = layers(rows, cols)
        kinds = ("float32", "bfloat16") if quick else ("float32", "bfloat16", "float16", "int8", "int4")
        for kind in kinds:
            by_input = [store_rows(weight.t(), kind) for weight in dense]
            by_output = [store_rows(weight, kind) for weight in dense]
            dtype = getattr(torch, kind) if kind in ("float32", "bfloat16") else torch.float32
            same = [weight.to(dtype) for weight in dense]
            for batch in (1,) if quick or kind not in ("float32", "int4") else (1, 4, 8):
                for zeros, goal in GOALS.items():
                    x = torch.randn(batch, cols) * (torch.rand(cols) >= zeros)
                    active = (torch.rand(rows) >= zeros).expand(batch, rows)
                    whole = torch.randn(batch, cols)
                    peers = dense_peers(same, whole.to(dtype))
                    labels = {"shape": f"{rows}x{cols}", "weights": kind, "batch": batch}
                    labels["zeros"] = f"{zeros:.0%}"
                    promised = Goal(goal) if batch == 1 and kind in ("float32", "bfloat16") else None
                    yield Cell(
                        {**labels, "sparse": "input"},
                        ours(lambda w, x=x: gather_linear(x, w), by_input),
                        peers,
                        Bound((1 - zeros) * by_input[0].nbytes, 2 * (1 - zeros) * rows * cols * batch),
                        promised,
                    )
                    yield Cell(
                        {**labels, "sparse": "output"},
                        ours(lambda w, x=whole, a=active: gather_linear_rows(x, w, a), by_output),
                        peers,
                        Bound((1 - zeros) * by_output[0].nbytes, 2 * (1 - zeros) * rows * cols * batch),
                        promised,
                    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("gather_linear skips what sparse activations do not need", cells))
