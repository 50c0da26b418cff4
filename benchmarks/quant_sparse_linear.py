"""quant_sparse_linear (four-bit 1 x 16 groups, half of them kept) against the best dense product of the
run."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from _linear import dense_peers, in_turn, layers

from shared import ops
from shared.bench import Bound, Cell, main
from shared.ops.quant_sparse_linear import QuantGroups, quant_sparse_linear, quantise_groups

SIZE = 4096


def ours(weights: list[QuantGroups], x: torch.Tensor):
    def call(i: int):
        def run() -> torch.Tensor:
            with ops.backend("native"):
                return quant_sparse_linear(x, weights[i])

        return run

    return in_turn(call, len(weights))


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    dense = layers(SIZE, SIZE)
    for group in (16,) if quick else (16, 64):
        for zeros in (0.5,) if quick else (0.0, 0.5, 0.75):
            keep = torch.rand(SIZE, SIZE // group) >= zeros
            packed = [quantise_groups(weight, keep, group) for weight in dense]
            for batch in (1,) if quick else (1, 4, 64):
                x = torch.randn(batch, SIZE)
                yield Cell(
                    {"group": group, "zeros": f"{zeros:.0%}", "batch": batch},
                    ours(packed, x),
                    dense_peers(dense, x),
                    Bound(packed[0].nbytes, 2 * packed[0].density * SIZE * SIZE * batch),
                )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("quant_sparse_linear reads a tenth of the bytes of a dense layer", cells))
