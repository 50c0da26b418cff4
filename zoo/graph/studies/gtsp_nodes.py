"""`zoo reproduce gtsp-nodes`: the papers of Cora classified by a graph transformer, in which every node may
attend to every other, with half of its tokens, heads, layers or weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.graph.data import load_graph
from zoo.graph.methods.gtsp import GraphTransformer
from zoo.graph.splits import split_per_class
from zoo.graph.studies.gtsp import ARMS, halved_claims, least_milliseconds, trained
from zoo.graph.studies.gtsp import STUDY as MOLECULES
from zoo.shared.measure.modes import eval_mode
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves
from zoo.studies.options import StudyOptions
from zoo.studies.study import Study
from zoo.studies.view import Row, Value

TRAINING = 80  # nodes of each class


@dataclass(frozen=True)
class NodeOptions(StudyOptions):
    """Options of the experiment.

    Args:
        seeds: how many, from 0; each has a split of its own.
        epochs: of every arm; an epoch is one step on the whole graph.
    """

    seeds: int = 5
    epochs: int = 60


class Nodes(NamedTuple):
    """A graph as a transformer takes it: features [1, n, f], the mean over neighbours as weights of edges
    [1, n, n], which nodes there are [1, n]; labels [n], which of them are for training, for testing [n]."""

    features: Float[Tensor, "1 n f"]
    edges: Float[Tensor, "1 n n"]
    there: Bool[Tensor, "1 n"]
    labels: Int[Tensor, " n"]
    train: Bool[Tensor, " n"]
    test: Bool[Tensor, " n"]


@lru_cache(maxsize=1)
def nodes(seed: int) -> Nodes:
    """Cora with `TRAINING` nodes of each class to train on, the rest to test on."""
    data = load_graph("cora")
    n = int(data.num_nodes)
    edges = torch.zeros(n, n)
    edges[data.edge_index[1], data.edge_index[0]] = 1.0
    edges /= edges.sum(1, keepdim=True).clamp(min=1)
    train, _, test = split_per_class(data.y, train=TRAINING, val=0, seed=seed)
    features = data.x / data.x.std()
    return Nodes(features[None], edges[None], torch.ones(1, n, dtype=torch.bool), data.y, train, test)


class OneGraph:
    """The same graph in each epoch."""

    def __init__(self, graph: Nodes) -> None:
        self.graph = graph

    def __len__(self) -> int:
        return 1

    def draw(self, generator: torch.Generator) -> Iterator[Nodes]:
        yield self.graph

    def example(self) -> tuple[Tensor, ...]:
        return tuple(self.graph[:3])


def node_loss(model: nn.Module, graph: Nodes) -> Tensor:
    """Cross-entropy of the training nodes."""
    logits = model(graph.features, graph.edges, graph.there)[0]
    return nn.functional.cross_entropy(logits[graph.train], graph.labels[graph.train])


def measure(make: Any, options: NodeOptions, case: Row, cells: CellCache) -> Row:
    """One training from fresh weights."""
    graph = nodes(case["seed"])
    with seeded(case["seed"]):
        model: nn.Module = GraphTransformer(
            graph.features.shape[2], 32, (4, 4, 4, 4), 8, classes=int(graph.labels.max()) + 1, nodes=True
        )
    recipe = Recipe(epochs=options.epochs, lr=3e-3, optimizer="adam", weight_decay=1e-4)
    model = trained(make, model, Job(OneGraph(graph), node_loss, recipe=recipe, seed=case["seed"]))
    with torch.no_grad(), eval_mode(model):
        right = model(*graph[:3])[0].argmax(1) == graph.labels
    return {
        "accuracy": float(right[graph.test].double().mean()),
        "ms": least_milliseconds(model, *graph[:3]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def cases(options: NodeOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        yield from ({"arm": arm, "level": "Cora", "seed": seed} for arm in ARMS)


ACCURACY, TIME = Value("accuracy", 100.0, 1, "points", 1), Value("ms", 1.0, 1, "ms", 1, lower=True)
STUDY = Study(
    "gtsp-nodes",
    "Graph transformers on nodes, with half of their parts",
    MOLECULES.paper,
    NodeOptions,
    ARMS,
    cases,
    measure,
    papers=(16,),
    claims=halved_claims(
        "graph classification only; this zoo's bar", "faster than dense on the whole graph", TIME
    ),
    value=ACCURACY,
    data=lambda options, case: [getattr(load_graph("cora"), name) for name in ("x", "y", "edge_index")],
    tables=[
        Columns(
            "Papers of Cora by subject",
            {"accuracy, %": ACCURACY, "ms of the graph": TIME, "parameters": Value("parameters", 1.0, 0)},
        )
    ],
    plots=[
        Curves(
            "accuracy",
            "Accuracy by time",
            "ms of the graph",
            "accuracy (%)",
            x=Value("ms", 1.0),
            levels=("Cora",),
            points=True,
        )
    ],
    notes=lambda options: [
        f"Cora, {TRAINING} nodes of each class to train on, the rest to test on; one graph of 2,708 tokens, "
        "4 layers of width 32, 4 heads, means over neighbours beside attention, "
        f"{options.epochs} steps. Nothing was tuned. Weights: packed, parameters of the packed model.",
        "Processor time on one thread, the least of eight passes.",
    ],
)
