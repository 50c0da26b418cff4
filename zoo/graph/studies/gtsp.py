"""`zoo reproduce gtsp`: a graph transformer on molecules with half of its tokens, heads, layers or
weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from zoo.graph.methods.gtsp import GTSP, GraphTransformer
from zoo.graph.molecules import Graphs, bbbp
from zoo.shared.bench.timing import threads
from zoo.shared.measure.modes import eval_mode
from zoo.shared.ops import packing
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves
from zoo.studies.options import StudyOptions
from zoo.studies.study import BAR, Arm, Claim, Study, above
from zoo.studies.view import Row, Value

DENSE, TOKENS, HEADS, LAYERS, WEIGHTS = (
    "dense",
    "half the tokens",
    "half the heads",
    "half the layers",
    "half the weights",
)
SOME_TOKENS, SOME_HEADS = "tokens by chance", "heads by chance"

LARGEST = 32  # atoms of a molecule


@dataclass(frozen=True)
class GraphOptions(StudyOptions):
    """Options of the experiment.

    Args:
        seeds: how many, from 0; each has a split of its own.
        epochs: of every arm.
    """

    seeds: int = 3
    epochs: int = 4


class GraphBatches:
    """Graphs in random order, each batch as wide as its largest graph."""

    def __init__(self, graphs: Graphs, size: int = 32) -> None:
        self.graphs, self.size = graphs, size

    def __len__(self) -> int:
        return -(-len(self.graphs.labels) // self.size)

    def draw(self, generator: torch.Generator) -> Iterator[Graphs]:
        order = torch.randperm(len(self.graphs.labels), generator=generator)
        for chosen in order.split(self.size):
            yield self.graphs.part(chosen)

    def example(self) -> tuple[Tensor, ...]:
        one = self.graphs.part(torch.arange(1))
        return (one.features, one.edges, one.there)


def graph_loss(model: nn.Module, batch: Graphs) -> Tensor:
    """Cross-entropy of the graphs' classes."""
    return nn.functional.cross_entropy(model(batch.features, batch.edges, batch.there), batch.labels)


def split(seed: int) -> tuple[Graphs, Graphs]:
    """Four fifths to train on, a fifth to judge."""
    graphs = bbbp(LARGEST)
    order = torch.randperm(len(graphs.labels), generator=torch.Generator().manual_seed(seed))
    first = 4 * len(order) // 5
    return graphs.part(order[:first]), graphs.part(order[first:])


def figures(model: nn.Module, test: Graphs) -> Row:
    """Area under the curve, and milliseconds for 128 graphs."""
    with torch.no_grad(), eval_mode(model):
        logits = model(test.features, test.edges, test.there)
    some = test.part(torch.arange(128))
    score = (logits[:, 1] - logits[:, 0]).numpy()
    milliseconds = least_milliseconds(model, some.features, some.edges, some.there)
    return {"auc": float(roc_auc_score(test.labels.numpy(), score)), "ms": milliseconds}


@torch.no_grad()
def least_milliseconds(model: nn.Module, *inputs: Tensor) -> float:
    """Processor time of a pass on one thread, the least of eight."""
    spent = []
    with threads(1), eval_mode(model):
        for _ in range(8):
            start = time.process_time()
            model(*inputs)
            spent.append(time.process_time() - start)
    return 1000 * min(spent)


def trained(make: Any, model: nn.Module, job: Job) -> nn.Module:
    """A model trained densely, or by an arm; masks packed."""
    if make is None:
        job.fit(model, macs=lambda: 0.0).run()
        return model
    made = make.sparsify(model, job)
    packed: nn.Module = packing.pack(made.model, made.masks) if made.masks else made.model
    return packed


def measure(make: Any, options: GraphOptions, case: Row, cells: CellCache) -> Row:
    """One training from fresh weights."""
    train, test = split(case["seed"])
    with seeded(case["seed"]):
        model: nn.Module = GraphTransformer(train.features.shape[2], dim=48, width=12)
    recipe = Recipe(epochs=options.epochs, lr=1e-3, optimizer="adam", weight_decay=1e-5)
    job = Job(GraphBatches(train), graph_loss, recipe=recipe, seed=case["seed"])
    model = trained(make, model, job)
    parameters = sum(p.numel() for p in model.parameters())
    return {**figures(model, test), "parameters": parameters}


def cases(options: GraphOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        yield from ({"arm": arm, "level": "BBBP", "seed": seed} for arm in ARMS)


ARMS = {
    DENSE: Arm(),
    TOKENS: Arm(GTSP("tokens")),
    HEADS: Arm(GTSP("heads")),
    LAYERS: Arm(GTSP("layers")),
    WEIGHTS: Arm(GTSP("weights")),
    SOME_TOKENS: Arm(GTSP("tokens", by_chance=True)),
    SOME_HEADS: Arm(GTSP("heads", by_chance=True)),
}
AUC, TIME = Value("auc", 100.0, 1, "AUC points", 1), Value("ms", 1.0, 2, "ms", 2, lower=True)
HALVED = (TOKENS, HEADS, LAYERS, WEIGHTS)


def halved_claims(published: str, faster: str, value: Value) -> list[Claim]:
    """That half of each part costs at most two points, that choosing matters, and that it is faster."""
    return [
        *(above(arm, DENSE, -2.0, published) for arm in HALVED),
        above(TOKENS, SOME_TOKENS, published="chosen tokens matter"),
        above(HEADS, SOME_HEADS, published="chosen heads matter"),
        *(
            Claim(
                f"'{arm}' runs {faster}",
                "30 to 47 % fewer operations; time " + BAR,
                arm,
                DENSE,
                value=value,
            )
            for arm in HALVED
        ),
    ]


STUDY = Study(
    "gtsp",
    "Graph transformers with half of their parts",
    "Chuang Liu, Yibing Zhan, Xueqi Ma, Liang Ding, Dapeng Tao, Jia Wu, Wenbin Hu, Bo Du: Exploring "
    "Sparsity in Graph Transformers, 2023",
    GraphOptions,
    ARMS,
    cases,
    measure,
    papers=(16,),
    claims=halved_claims("no loss at half", "faster than dense", TIME),
    value=AUC,
    data=lambda options, case: list(bbbp(LARGEST)),
    tables=[
        Columns(
            "Molecules that pass the blood-brain barrier",
            {"AUC, %": AUC, "ms of 128 graphs": TIME, "parameters": Value("parameters", 1.0, 0)},
        )
    ],
    plots=[
        Curves(
            "auc",
            "AUC by time",
            "ms of 128 graphs",
            "AUC (%)",
            x=Value("ms", 1.0),
            levels=("BBBP",),
            points=True,
        )
    ],
    notes=lambda options: [
        f"BBBP, molecules of at most {LARGEST} atoms, four fifths to train on for {options.epochs} epochs; 4 "
        "layers of width 48, 4 heads, "
        "messages along bonds beside attention. Nothing was tuned. Weights: packed, parameters of the packed "
        "model.",
        "Processor time on one thread, the least of eight passes.",
    ],
)
