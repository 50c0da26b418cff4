"""Full-batch training on one graph: what the one loop, `zoo.shared.train.Fit`, is given for it.

TEDDY's recipe is cross-entropy on the training nodes, distillation from a teacher's logits over all nodes,
Adam, and a constraint on the weights after each step; the result is taken at the epoch of best validation
accuracy, the last of equals, measured after the constraint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.data import Data

from zoo.errors import ConfigError, DataError
from zoo.graph.models import Features, GraphModel
from zoo.shared.learned.constraints import project_l0_
from zoo.shared.train import Job, Recipe, output_kl

# Called after each optimiser step; returns the mask of each parameter, by name.
Constraint = Callable[[nn.Module], dict[str, Tensor]]


def graph_recipe(epochs: int = 200, lr: float = 0.01, weight_decay: float = 5e-4) -> Recipe:
    """The paper's recipe: Adam at a constant rate with an L2 penalty on every tensor, the best epoch."""
    return Recipe(
        epochs,
        lr,
        batch=1,
        weight_decay=weight_decay,
        optimizer="adam",
        options={"fused": True},
        warmup=0.0,
        decay="constant",
        select="best",
    )


@dataclass(frozen=True)
class L0Ball:
    """Keep the `kept` largest magnitudes over all parameters; a zero may come back at a later step."""

    kept: int

    @classmethod
    def for_sparsity(cls, model: nn.Module, sparsity: float) -> L0Ball:
        """ceil(P sparsity) of the P weights are zero."""
        total = sum(p.numel() for p in model.parameters())
        return cls(total - math.ceil(total * sparsity))

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        names, tensors = zip(*model.named_parameters(), strict=True)
        return dict(zip(names, project_l0_([t.data for t in tensors], self.kept), strict=True))


@dataclass(frozen=True)
class FixedMasks:
    """The same zeros at every step, by parameter name."""

    masks: Mapping[str, Tensor]

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        for name, parameter in model.named_parameters():
            if name in self.masks:
                parameter.data.mul_(self.masks[name])
        return dict(self.masks)


@dataclass(frozen=True)
class WholeGraph:
    """A graph as the only batch of an epoch, converted once for the model that is trained on it.

    Attributes:
        data: the graph as it was given.
        features, graph: what `GraphModel.prepare` made.
        labels: class of every node.
        train_nodes, val_nodes: ids.
    """

    data: Data
    features: Features
    graph: Any
    labels: Int[Tensor, " nodes"]
    train_nodes: Int[Tensor, " train"]
    val_nodes: Int[Tensor, " val"]

    @classmethod
    def of(cls, model: GraphModel, data: Data, keep: Bool[Tensor, " E"] | None = None) -> WholeGraph:
        """A graph for a model, on its device.

        Args:
            keep: the entries of `data.edge_index` to train on; by default those of the model's ticket.

        Raises:
            DataError: weighted edges, or other features and classes than the model's.
        """
        unweighted(data, type(model).__name__)
        widths = int(data.x.shape[1]), int(data.y.max()) + 1
        if (model.in_channels, model.out_channels) != widths:
            raise DataError(
                f"The graph has {widths[0]} features and {widths[1]} classes, the model {model.in_channels} "
                f"and {model.out_channels}. Make a dense model for it first: zoo finetune graph --model NAME "
                "--dataset DATA --out DIR."
            )
        device = next(model.parameters()).device
        features, graph = model.prepare(data.x, data.edge_index, keep)
        nodes = (mask.nonzero().flatten().to(device) for mask in (data.train_mask, data.val_mask))
        return cls(data, features.to(device), graph.to(device), data.y.to(device), *nodes)

    def __len__(self) -> int:
        return 1

    def draw(self, generator: torch.Generator) -> Iterator[WholeGraph]:
        """The graph."""
        yield self

    def example(self) -> tuple[Any, ...]:
        """Features and prepared edges of all nodes."""
        return self.features, self.graph

    def accuracy(self, model: nn.Module) -> float:
        """Share of the validation nodes that the model classifies rightly."""
        return accuracy_of(model(self.features, self.graph), self.labels, self.val_nodes)


def unweighted(data: Data, model: str) -> Data:
    """The graph, whose edges have no weights.

    Raises:
        DataError: they have some, which the zoo's models would leave out.
    """
    if data.get("edge_weight") is not None:
        raise DataError(
            f"The graph has edge weights, which {model} does not use: leave edge_weight out of the data, or "
            "prune them with TeddyPrune or PrunedEdges for a model of your own."
        )
    return data


def whole_graph(job: Job, method: str) -> Data:
    """The graph that a job trains on at once.

    Raises:
        ConfigError: it trains on batches of something else, parts of a graph that a loader samples say.
    """
    if not isinstance(job.batches, WholeGraph):
        raise ConfigError(
            f"{method} scores and trains on a whole graph: make the job with zoo.graph.domain.make_job or "
            f"zoo.graph.train.graph_job. Received: batches of {type(job.batches).__name__}. To train "
            "TEDDY on parts make the job with zoo.graph.parts_job; for anything else prune the graph first "
            "(zoo.graph.TeddyPrune) and give the pruned one to the loader."
        )
    return job.batches.data


def graph_job(
    model: GraphModel,
    data: Data,
    recipe: Recipe | None = None,
    *,
    keep: Bool[Tensor, " E"] | None = None,
    teacher: Float[Tensor, "nodes classes"] | None = None,
    distillation: float = 1.0,
    seed: int = 0,
) -> Job:
    """Training a model on one graph.

    Args:
        model: whose inputs the graph is converted to.
        data: features, labels and split.
        recipe: by default `graph_recipe()`.
        keep: the entries of `data.edge_index` to train on; by default those of the model's ticket, else all.
        teacher: logits of every node to distil from.
        distillation: weight of that term.
        seed: of dropout.

    Raises:
        ConfigError: a weight that is negative or not finite.
    """
    if not 0 <= distillation < math.inf:
        raise ConfigError(f"distillation must be finite and not negative. Received: {distillation}.")
    whole = WholeGraph.of(model, data, keep)
    target = None if teacher is None or distillation == 0 else teacher.to(whole.labels.device)

    def loss(trained: nn.Module, batch: WholeGraph) -> Tensor:
        logits = trained(batch.features, batch.graph)
        return distilled_loss(logits, batch.labels, batch.train_nodes, target, distillation)

    device = whole.labels.device
    return Job(whole, loss, whole.accuracy, recipe or graph_recipe(), seed, device)


@dataclass(frozen=True)
class Best:
    """What the best validation epoch left behind."""

    epoch: int
    val_accuracy: float
    logits: Float[Tensor, "nodes classes"]
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]


def train_best(model: GraphModel, job: Job, constraint: Constraint | None = None) -> Best:
    """Train a model in place; it ends with the weights of the best epoch.

    Args:
        constraint: applied to the weights after each step; must leave weights alone that meet it already.
    """
    fit = job.fit(model, macs=lambda: 0.0)
    fit.run(None if constraint is None else lambda: constraint(model))
    best, whole = fit.best, job.batches
    assert best is not None  # the recipe selects by the score
    masks = constraint(model) if constraint is not None else {}
    with torch.no_grad():
        logits = model.eval()(whole.features, whole.graph)
    return Best(best.step, best.score, logits, best.state, masks)


def distilled_loss(
    logits: Float[Tensor, "nodes classes"],
    labels: Int[Tensor, " nodes"],
    train_nodes: Int[Tensor, " train"],
    teacher: Float[Tensor, "nodes classes"] | None,
    weight: float,
) -> Float[Tensor, ""]:
    """Cross-entropy on the training nodes + weight (1/n) sum over all n nodes of KL(teacher || model),
    temperature 1.

    Args:
        logits: the model's output.
        labels: class of every node.
        train_nodes: ids of the nodes whose labels may be used.
        teacher: logits of the teacher, or None for no distillation.
        weight: lambda.
    """
    loss = functional.cross_entropy(logits[train_nodes], labels[train_nodes])
    return loss if teacher is None else loss + weight * output_kl(logits, teacher)


def accuracy_of(
    logits: Float[Tensor, "nodes classes"], labels: Int[Tensor, " nodes"], nodes: Int[Tensor, " chosen"]
) -> float:
    """Share of `nodes` whose largest logit is their label's."""
    return float((logits[nodes].argmax(1) == labels[nodes]).double().mean())
