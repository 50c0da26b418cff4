"""Training on parts of a graph that any loader of torch-geometric samples.

    job = parts_job(model, data, lambda data: NeighborLoader(data, [10, 10], data.train_mask, batch_size=512))
    ticket = zoo.sparsify(model, method="teddy", job=job)

A loader is given as a function of the graph, since TEDDY prunes the graph first and then samples what is
left. NeighborLoader needs pyg-lib or torch-sparse beside torch-geometric; RandomNodeLoader needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch_geometric.data import Data

from zoo.errors import DataError
from zoo.graph.edges import cut_edges, homogeneous
from zoo.graph.train import accuracy_of, distilled_loss, graph_recipe
from zoo.shared.train import Job, Recipe, as_batches

Loader = Callable[[Data], Any]


@dataclass(frozen=True)
class Parts:
    """Parts of a graph as batches, and the whole graph to score on.

    Attributes:
        data: the whole graph, all its edges.
        loader: makes the loader of a graph.
        kept: the graph that is sampled, with `n_id`, the id of each node.
        parts: what the loader yields: a Data with x, edge_index, y, n_id and either `batch_size` (the first
            nodes are the ones asked for, as NeighborLoader has it) or train_mask.
    """

    data: Data
    loader: Loader
    kept: Data
    parts: Any

    @classmethod
    def of(cls, data: Data, loader: Loader, keep: Bool[Tensor, " E"] | None = None) -> Parts:
        """Parts of a graph, or of those of its entries that are kept.

        Raises:
            DataError: no homogeneous graph.
            TrainingError: a loader without a length or without a batch.
        """
        kept = homogeneous(data, "parts_job") if keep is None else cut_edges(data, keep)
        kept = kept.clone() if keep is None else kept
        kept.n_id = torch.arange(int(kept.num_nodes or 0))
        return cls(data, loader, kept, as_batches(loader(kept)))

    @property
    def features(self) -> Tensor:
        """Of all nodes."""
        x: Tensor = self.kept.x
        return x

    @property
    def graph(self) -> Tensor:
        """The edges that are trained on."""
        edges: Tensor = self.kept.edge_index
        return edges

    def __len__(self) -> int:
        return len(self.parts)

    def draw(self, generator: torch.Generator) -> Iterator[Data]:
        """The parts of one epoch."""
        yield from self.parts.draw(generator)

    def example(self) -> tuple[Any, ...]:
        """Features and edges of the whole graph."""
        return self.features, self.graph

    def accuracy(self, model: nn.Module) -> float:
        """Share of the validation nodes that the model classifies rightly, on the whole graph at once."""
        device = next(model.parameters()).device
        logits = called(model, self.kept.to(device))
        return accuracy_of(logits.cpu(), self.kept.y.cpu(), self.kept.val_mask.nonzero().flatten().cpu())


def parts_job(
    model: nn.Module,
    data: Data,
    loader: Loader,
    recipe: Recipe | None = None,
    *,
    keep: Bool[Tensor, " E"] | None = None,
    teacher: Float[Tensor, "nodes classes"] | None = None,
    distillation: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Job:
    """Training a model that is called as `model(x, edge_index)`, with `edge_weight=` if the graph has some.

    Args:
        model: any module of torch-geometric for classes of nodes.
        data: features, labels and split.
        loader: makes a loader of a graph, one that yields parts as `Parts` says.
        recipe: by default `graph_recipe()`; its epochs go through the loader once each.
        keep: the entries of `data.edge_index` to sample from.
        teacher: logits of every node to distil from.
        distillation: weight of that term.
        seed: of the parts and of dropout.
        device: where the model is trained; parts are moved there one by one.

    Raises:
        DataError: no homogeneous graph, or parts that lack what `Parts` names.
    """
    parts = Parts.of(data, loader, keep)

    def loss(trained: nn.Module, part: Data) -> Tensor:
        part = part.to(next(trained.parameters()).device)
        logits, ids = called(trained, part), part.get("n_id")
        if ids is None or (part.get("batch_size") is None and part.get("train_mask") is None):
            raise DataError("A part of a graph needs n_id, and batch_size or train_mask: see Parts.")
        if part.get("batch_size") is not None:
            logits, ids = logits[: part.batch_size], ids[: part.batch_size]
            nodes = torch.arange(len(ids), device=ids.device)
        else:
            nodes = part.train_mask.nonzero().flatten()
        if not len(nodes):
            return logits.sum() * 0
        known = None if teacher is None or distillation == 0 else teacher.to(ids.device)[ids]
        return distilled_loss(logits, part.y[: len(ids)], nodes, known, distillation)

    return Job(parts, loss, parts.accuracy, recipe or graph_recipe(), seed, device)


def called(model: nn.Module, part: Data) -> Tensor:
    """Logits of all nodes of a graph or of a part."""
    weight: Any = {} if part.get("edge_weight") is None else {"edge_weight": part.edge_weight}
    logits: Tensor = model(part.x, part.edge_index, **weight)
    return logits
