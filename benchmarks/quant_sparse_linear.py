"""quant_sparse_linear (four-bit 1 x 16 groups, half of them kept) against the best dense product of the
run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from _linear import DensePeers, beyond_cache, in_turn, layers

from zoo.shared import ops
from zoo.shared.bench import Bound, Cell, Later, main
from zoo.shared.ops.quant_sparse_linear import QuantGroups, quant_sparse_linear, quantise_groups

SIZE = 4096


def ours(weights: list[QuantGroups], x: torch.Tensor):
    def call(i: int):
        def run() -> torch.Tensor:
            with ops.backend("native"):
                return quant_sparse_linear(x, weights[i])

        return run

    return in_turn(call, len(weights))


def cells(quick: bool, threads: int) -> Iterator[Later]:
    dense = layers(SIZE, SIZE)
    peers = DensePeers(dense)

    @functools.lru_cache(maxsize=1)
    def packed_at(group: int, zeros: float) -> list[QuantGroups]:
        keep = torch.rand(SIZE, SIZE // group) >= zeros
        return [quantise_groups(weight, keep, group) for weight in dense]

    def build(labels: dict[str, object], group: int, zeros: float, batch: int) -> Cell:
        x, weights = torch.randn(batch, SIZE), packed_at(group, zeros)
        bound = Bound(weights[0].nbytes, 2 * weights[0].density * SIZE * SIZE * batch)
        if batch <= 8:
            weights = beyond_cache(weights, weights[0].nbytes, lambda w: replace(w, codes=w.codes.clone()))
        return Cell(labels, ours(weights, x), peers.of(x), bound)

    for group in (16,) if quick else (16, 64):
        for zeros in (0.5,) if quick else (0.0, 0.5, 0.75):
            for batch in (1,) if quick else (1, 4, 64):
                labels: dict[str, object] = {"group": group, "zeros": f"{zeros:.0%}", "batch": batch}
                yield Later(labels, functools.partial(build, labels, group, zeros, batch))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("quant_sparse_linear against the dense product", cells))
