"""Node classification on the zoo's graphs, as harness tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.bundles.sources import Source
from zoo.errors import TaskError
from zoo.graph.data import load_graph, source_named
from zoo.graph.edges import fingerprint
from zoo.graph.flops import count_graph
from zoo.graph.models import GraphModel
from zoo.graph.train import unweighted
from zoo.harness.tasks import Flops, Progress, Task, TaskResult, register_task
from zoo.registry import TASKS


class NodeClassification(Task):
    """Accuracy on the test nodes of one graph, in one full-batch pass over the whole graph.

    The model is called as `model(x, edge_index)` with all edges; a ticket drops its own. Subclasses name the
    graph.
    """

    domain = "graph"
    primary = "accuracy"
    graph: str
    features: int
    classes: int

    def widths(self) -> tuple[int, int]:
        """Features and classes of the graph."""
        return self.features, self.classes

    def accepts(self, card: Any) -> bool:
        """Models whose widths are those of the graph."""
        args = card.architecture.args
        widths = (args.get("in_channels"), args.get("out_channels"))
        return card.domain == self.domain and widths == self.widths()

    def measured_on(self) -> Any:
        """Features, edges, labels and the test nodes."""
        data = load_graph(self.graph)
        return [data.x, data.edge_index, data.y, data.test_mask]

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Accuracy with its standard error over the test nodes; samples are 1 for right and 0 for wrong."""
        data = unweighted(load_graph(self.graph), type(model).__name__)
        nodes = data.test_mask.nonzero().flatten()
        with torch.no_grad():
            logits = self._logits(model, data.x, data.edge_index)
        right = logits[nodes].argmax(1) == data.y[nodes]
        digest = f"{fingerprint(data.edge_index, int(data.num_nodes))}:{len(nodes)}"
        return TaskResult.from_samples({"accuracy": right.double().tolist()}, digest)

    def flops(self, model: nn.Module) -> Flops | None:
        """Operations of one pass over the graph; dropped edges and weights are not among the sparse ones."""
        if not isinstance(model, GraphModel):
            return None
        data = load_graph(self.graph)
        total = count_graph(model, data.x, data.edge_index).total
        return Flops(total.flops, total.flops_kept)

    def _logits(self, model: nn.Module, x: Tensor, edge_index: Tensor) -> Tensor:
        try:
            logits = model(x, edge_index)
        except (TypeError, RuntimeError, ValueError) as error:
            raise TaskError(
                f"{self.name} calls model(x, edge_index), which {type(model).__name__} does not take: {error}"
            ) from error
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (len(x), self.widths()[1]):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TaskError(
                f"{self.name} expects logits of shape {(len(x), self.widths()[1])}. Received: {shape}."
            )
        return logits


@register_task
class Cora(NodeClassification):
    """Cora, Planetoid's public split (1,000 test nodes)."""

    name, graph, features, classes = "graph/cora", "cora", 1433, 7


@register_task
class Citeseer(NodeClassification):
    """CiteSeer, Planetoid's public split (1,000 test nodes)."""

    name, graph, features, classes = "graph/citeseer", "citeseer", 3703, 6


@register_task
class Pubmed(NodeClassification):
    """PubMed, Planetoid's public split (1,000 test nodes)."""

    name, graph, features, classes = "graph/pubmed", "pubmed", 500, 3


@register_task
class CoauthorCS(NodeClassification):
    """Coauthor-CS, 20 training and 30 validation nodes per class drawn once, 17,583 test nodes."""

    name, graph, features, classes = "graph/cs", "cs", 6805, 15


@register_task
class Digits(NodeClassification):
    """scikit-learn's digits, 8-nearest-neighbour graph, 1,297 test images."""

    name, graph, features, classes = "graph/digits", "digits", 64, 10


@register_task
class Nodes(NodeClassification):
    """The test nodes of a graph of your own, `nodes:FILE`, or of a plug-in's data set, `nodes:NAME`."""

    name = "nodes"

    def __init__(self, graph: str) -> None:
        self.graph, self.name = graph, f"nodes:{graph}"

    def widths(self) -> tuple[int, int]:
        """Features and classes of the graph."""
        data = load_graph(self.graph)
        return int(data.x.shape[1]), int(data.y.max()) + 1


def measured_on_graph(dataset: str) -> tuple[str, Source]:
    """The task that is measured on a graph by name or file, and what a card says of it."""
    source = source_named(dataset)
    return (f"graph/{dataset}" if f"graph/{dataset}" in TASKS else f"nodes:{dataset}"), source
