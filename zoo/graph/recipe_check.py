"""Recipes of graphs, tried on small random ones (see `zoo.recipes.check`)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch_geometric.data import Data
from torch_geometric.utils import to_undirected

import zoo
from zoo.graph import save_graph
from zoo.recipes import Entry
from zoo.recipes.check import Library


class Graph(Library):
    """A file with the features and classes of the data set."""

    def base(self, entry: Entry, work: Path) -> Path:
        """A random model at reduced size."""
        generator = torch.Generator().manual_seed(0)
        classes, features = int(entry.config["classes"]), int(entry.config["features"])
        nodes = 8 * classes
        x = torch.randn(nodes, features, generator=generator)
        edges = torch.randint(nodes, (2, 4 * nodes), generator=generator)
        edges = to_undirected(edges[:, edges[0] != edges[1]])
        masks = {
            f"{part}_mask": torch.arange(nodes) // classes % 4 == n for n, part in enumerate(("train", "val"))
        }
        data = Data(x=x, edge_index=edges, y=torch.arange(nodes) % classes, **masks)
        data.test_mask = ~(data.train_mask | data.val_mask)
        return save_graph(data, work / "graph.npz")

    def zeros(self, entry: Entry, work: Path) -> float:
        """Share of zeros in what was pruned."""
        return zoo.info(zoo.load(work / "out")).card.sparsity.parts["weights"].sparsity

    def quick(self, work: Path) -> list[str]:
        """Two epochs."""
        return ["--epochs", "2"]
