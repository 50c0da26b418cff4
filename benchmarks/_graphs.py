"""The graphs that the benchmarks of graph operations run on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.graph.data import load_graph
from zoo.shared.bench.random_graphs import rmat
from zoo.shared.ops.csr import csr_from_edges


def named(*names: str) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """(name, nodes, crow, col), int32: "cora", "citeseer", "pubmed" or "rmat-<log2 nodes>-<entries>".

    A graph whose files are neither here nor to be had is named on the screen and left out.
    """
    for name in names:
        if name.startswith("rmat-"):
            _, scale, entries = name.split("-")
            nodes, edges = 1 << int(scale), rmat(1 << int(scale), int(entries))
        else:
            try:
                data = load_graph(name)
            except (DataError, OSError) as error:
                print(f"{name} is left out: {error}")
                continue
            nodes, edges = data.num_nodes, data.edge_index
        crow, col, _ = csr_from_edges(edges[:, edges[1].argsort(stable=True)], nodes)
        yield name, nodes, crow.int(), col.int()


def torch_csr(crow: Tensor, col: Tensor, values: Tensor, nodes: int, dtype: torch.dtype) -> Tensor:
    """The same graph as a sparse tensor of torch, with indices of the given type."""
    return torch.sparse_csr_tensor(
        crow.to(dtype), col.to(dtype), values, (nodes, nodes), check_invariants=False
    )
