"""Small graphs for the tests of the graph domain."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Data

from zoo.graph.splits import split_per_class


def build_graph(nodes: int = 60, features: int = 12, classes: int = 3, seed: int = 0) -> Data:
    """An undirected graph whose features and edges tell the class with noise; the last four nodes are
    isolated.
    """
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(nodes) % classes
    chance = torch.where(y[:, None] == y, 0.3, 0.03)
    chance[-4:], chance[:, -4:] = 0.0, 0.0
    upper = torch.triu(torch.rand(nodes, nodes, generator=generator) < chance, diagonal=1)
    edge_index = (upper | upper.t()).nonzero().t().contiguous()
    x = (torch.rand(nodes, features, generator=generator) < 0.15).float()
    x[torch.arange(nodes), y] = 1.0
    train, val, test = split_per_class(y, train=5, val=5, seed=seed)
    return Data(x=x, edge_index=edge_index, y=y, train_mask=train, val_mask=val, test_mask=test)


@pytest.fixture
def make_graph():
    """The function that makes a random graph of given size."""
    return build_graph


@pytest.fixture
def graph() -> Data:
    """A graph of 60 nodes, the last four of them isolated."""
    return build_graph()
