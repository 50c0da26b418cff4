"""The square of a graph: row-wise product against scipy, MKL (through torch) and sort-merge of products."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import scipy.sparse
import torch
from _graphs import named, torch_csr

from shared import ops
from shared.bench import Bound, Cell, Goal, main
from shared.ops.spgemm import CSR, multiplications, spgemm, spgemm_reference

# Entries of the result: 9e4, 4e4 and 1e6 (citations), 2e7, 2e8 and 1e9 (R-MAT).
GRAPHS = ("cora", "citeseer", "pubmed", "rmat-14-250000", "rmat-16-1000000", "rmat-18-4000000")
# The square of the last graph takes 12 GB, and that of each peer as much again.
MEMORY = 48 << 30
# Products that sort-merge may hold at once, at 24 bytes each.
PRODUCTS = 1 << 24


def physical_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return int(next(line for line in file if line.startswith("MemTotal")).split()[1]) << 10
    except OSError:
        return 0


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    names = GRAPHS[:4] if quick else GRAPHS if physical_memory() >= MEMORY else GRAPHS[:5]
    for name, nodes, crow, col in named(*names):
        values = torch.rand(col.numel()) + 0.1
        matrix = CSR(crow, col, values, nodes)
        sparse = scipy.sparse.csr_matrix((values.numpy(), col.numpy(), crow.numpy()), (nodes, nodes))
        csr32, csr64 = (torch_csr(crow, col, values, nodes, kind) for kind in (torch.int32, torch.int64))

        def ours(matrix: CSR = matrix) -> CSR:
            with ops.backend("native"):
                return spgemm(matrix, matrix)

        entries, products = ours().col.numel(), multiplications(matrix, matrix)
        if entries != (sparse @ sparse).nnz:
            raise AssertionError(f"{name}: {entries} entries, scipy has {(sparse @ sparse).nnz}")
        labels = {"graph": name, "entries": entries, "products/entry": f"{products / max(entries, 1):.1f}"}
        bound = Bound(8 * (2 * col.numel() + entries), 2 * products)
        yield Cell(labels, ours, {"scipy": lambda a=sparse: a @ a}, bound, Goal(2))
        yield Cell(
            labels, ours,
            {"MKL int32": lambda a=csr32: a @ a, "MKL int64": lambda a=csr64: a @ a}, bound, Goal(1),
        )
        if products <= PRODUCTS:
            yield Cell(labels, ours, {"sort-merge": lambda a=matrix: spgemm_reference(a, a)}, bound)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Sparse")
    sys.exit(main("the square of a graph is made faster than by scipy and by MKL", cells))
