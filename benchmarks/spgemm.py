"""The square of a graph: row-wise product against scipy, MKL (through torch) and sort-merge of products.

scipy leaves the columns of a row in any order, MKL sorts them: each is met on its own terms, and scipy with
its sort beside MKL.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import scipy.sparse
import torch
from _graphs import named, torch_csr

from zoo.shared import ops
from zoo.shared.bench import Bound, Cell, Goal, main
from zoo.shared.ops.spgemm import CSR, multiplications, spgemm, spgemm_reference

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

        def unsorted(matrix: CSR = matrix) -> CSR:
            with ops.backend("native"):
                return spgemm(matrix, matrix, sort=False)

        entries, products = ours().col.numel(), multiplications(matrix, matrix)
        if entries != (sparse @ sparse).nnz:
            raise AssertionError(f"{name}: {entries} entries, scipy has {(sparse @ sparse).nnz}")
        size = {"entries": entries, "products/entry": f"{products / max(entries, 1):.1f}"}
        bound = Bound(8 * (2 * col.numel() + entries), 2 * products)

        def by_scipy(a: scipy.sparse.csr_matrix = sparse) -> scipy.sparse.csr_matrix:
            product = a @ a
            product.sort_indices()
            return product

        yield Cell(
            {"graph": name, "columns": "any order", **size},
            unsorted,
            {"scipy": lambda a=sparse: a @ a},
            bound,
            Goal(2),
        )
        peers = {"scipy": by_scipy, "MKL int32": lambda a=csr32: a @ a, "MKL int64": lambda a=csr64: a @ a}
        if products <= PRODUCTS:
            peers["sort-merge"] = lambda a=matrix: spgemm_reference(a, a)
        yield Cell(
            {"graph": name, "columns": "sorted", **size},
            ours,
            peers,
            bound,
            Goal(1, over=("MKL int32", "MKL int64")),
        )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Sparse")
    sys.exit(main("the square of a graph against scipy and MKL", cells))
