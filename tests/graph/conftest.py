"""Small graphs for the tests of the graph domain."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.utils import erdos_renyi_graph, to_undirected

from zoo.graph.splits import split_per_class


def build_graph(nodes: int = 60, features: int = 12, classes: int = 3, seed: int = 0) -> Data:
    """A random undirected graph whose features tell the class with noise; some nodes are isolated."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    edge_index = to_undirected(erdos_renyi_graph(nodes - 4, 0.12), num_nodes=nodes)
    y = torch.arange(nodes) % classes
    x = (torch.rand(nodes, features, generator=generator) < 0.15).float()
    x[torch.arange(nodes), y] = 1.0
    train, val, test = split_per_class(y, train=5, val=5, seed=seed)
    data = Data(x=x, edge_index=edge_index, y=y, train_mask=train, val_mask=val, test_mask=test)
    return data.coalesce()


@pytest.fixture
def make_graph():
    """The function that makes a random graph of given size."""
    return build_graph


@pytest.fixture
def graph() -> Data:
    """A graph of 60 nodes, the last four of them isolated."""
    return build_graph()
