"""nm_linear (2:4, 1:4, 2:8, 4:8) on a 4096 x 4096 layer against the best dense product of the run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from _linear import DensePeers, beyond_cache, copy_of, in_turn, layers

from zoo.shared import ops
from zoo.shared.bench import Bound, Cell, Later, main
from zoo.shared.ops.nm_linear import PATTERNS, NMWeight, nm_linear, pack_nm

SIZE = 4096


def ours(weights: list[NMWeight], x: torch.Tensor):
    def call(i: int):
        def run() -> torch.Tensor:
            with ops.backend("native"):
                return nm_linear(x, weights[i])

        return run

    for i in range(len(weights)):
        for _ in range(2):  # a large batch has its own form of the weight, made at the second call
            call(i)()
    return in_turn(call, len(weights))


def cells(quick: bool, threads: int) -> Iterator[Later]:
    dense = layers(SIZE, SIZE)
    peers = DensePeers(dense)

    @functools.lru_cache(maxsize=1)
    def packed_at(n: int, m: int, dtype: torch.dtype) -> list[NMWeight]:
        masks = [(torch.rand(SIZE, SIZE // m, m).argsort(-1) < n).reshape(SIZE, SIZE) for _ in dense]
        return [pack_nm(w.to(dtype), mask, n, m) for w, mask in zip(dense, masks, strict=True)]

    def build(labels: dict[str, object], n: int, m: int, dtype: torch.dtype, batch: int) -> Cell:
        x, weights = torch.randn(batch, SIZE), packed_at(n, m, dtype)
        packed = weights[0].packed
        if batch <= 8:
            weights = beyond_cache(weights, packed.nbytes, lambda w: replace(w, packed=copy_of(w.packed)))
        bound = Bound(packed.nbytes, 2 * packed.kept * batch)
        return Cell(labels, ours(weights, x), peers.of(x), bound)

    for n, m in PATTERNS[:1] if quick else PATTERNS:
        for dtype in (torch.float32, torch.bfloat16):
            for batch in (1,) if quick else (1, 4, 8, 64):
                labels: dict[str, object] = {"pattern": f"{n}:{m}", "values": str(dtype)[6:], "batch": batch}
                yield Later(labels, functools.partial(build, labels, n, m, dtype, batch))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("nm_linear against the best dense product", cells))
