"""The square of wide graphs by hash tables, SMASH's windows on a CPU, against dense accumulators and scipy.

The labels of a row hold what decides how hash tables do: slots looked at for a lookup, the longest search,
and the heaviest row as a share of a chunk, of which each thread has 16.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import scipy.sparse
import torch
from _graphs import named

from zoo.shared import ops
from zoo.shared.bench import Bound, Cell, main
from zoo.shared.ops.spgemm import CSR, multiplications, probes, spgemm

# Columns against entries: the first fits a cache as an array, the last does not by far.
GRAPHS = ("rmat-17-200000", "rmat-20-300000", "rmat-22-300000", "rmat-23-300000")


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    for name, nodes, crow, col in named(*GRAPHS[: 2 if quick else None]):
        matrix = CSR(crow, col, torch.rand(col.numel()) + 0.1, nodes)
        sparse = scipy.sparse.csr_matrix((matrix.values.numpy(), col.numpy(), crow.numpy()), (nodes, nodes))

        def run(accumulator: str, matrix: CSR = matrix) -> CSR:
            with ops.backend("native"):
                return spgemm(matrix, matrix, sort=False, accumulator=accumulator)

        entries, products = run("hash").col.numel(), multiplications(matrix, matrix)
        if entries != run("dense").col.numel():
            raise AssertionError(f"{name}: the accumulators disagree")
        lookups, slots, longest = probes(matrix, matrix)
        lengths = crow.diff().long()
        heaviest = int(torch.zeros(nodes).index_add_(0, rows_of(crow), lengths[col.long()].float()).max())
        yield Cell(
            {
                "graph": name,
                "accumulator": "hash",
                "entries": entries,
                "products/entry": f"{products / entries:.1f}",
                "slots/lookup": f"{slots / lookups:.2f}",
                "longest": longest,
                "heaviest row": f"{heaviest / (products / (16 * threads)):.2f}",
            },
            lambda run=run: run("hash"),
            {"dense accumulator": lambda run=run: run("dense"), "scipy": lambda a=sparse: a @ a},
            Bound(8 * (2 * col.numel() + entries), 2 * products),
        )


def rows_of(crow: torch.Tensor) -> torch.Tensor:
    return torch.arange(crow.numel() - 1).repeat_interleave(crow.diff().long())


if __name__ == "__main__":
    sys.exit(main("the square of wide graphs, hash tables against dense accumulators", cells))
