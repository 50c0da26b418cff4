"""nm_linear (2:4, 1:4, 2:8, 4:8) on a 4096 x 4096 layer against the best dense product of the run."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from _linear import dense_peers, in_turn, layers

from shared import ops
from shared.bench import Bound, Cell, main
from shared.ops.nm_linear import PATTERNS, NMWeight, nm_linear, pack_nm

SIZE = 4096


def ours(weights: list[NMWeight], x: torch.Tensor):
    def call(i: int):
        def run() -> torch.Tensor:
            with ops.backend("native"):
                return nm_linear(x, weights[i])

        return run

    return in_turn(call, len(weights))


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    dense = layers(SIZE, SIZE)
    for n, m in PATTERNS[:1] if quick else PATTERNS:
        masks = [(torch.rand(SIZE, SIZE // m, m).argsort(-1) < n).reshape(SIZE, SIZE) for _ in dense]
        for dtype in (torch.float32, torch.bfloat16):
            packed = [pack_nm(w.to(dtype), mask, n, m) for w, mask in zip(dense, masks, strict=True)]
            for batch in (1,) if quick else (1, 4, 8, 64):
                x = torch.randn(batch, SIZE)
                yield Cell(
                    {"pattern": f"{n}:{m}", "values": str(dtype)[6:], "batch": batch},
                    ours(packed, x),
                    dense_peers(dense, x),
                    Bound(packed[0].packed.nbytes, 2 * packed[0].packed.kept * batch),
                )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("nm_linear is faster than the best dense product", cells))
