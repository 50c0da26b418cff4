"""TEDDY as a method of the zoo: from a dense model to a ticket, `zoo sparsify graph/dense-... --method
teddy`.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

import torch
from torch import nn
from torch_geometric.data import Data

from zoo.errors import ConfigError
from zoo.graph.data import load_graph
from zoo.graph.models import GAT, GraphModel
from zoo.graph.parts import Loader, Parts, parts_job
from zoo.graph.teddy import check_sparsity, ticket_mask
from zoo.graph.ticket import EdgeTicket
from zoo.graph.train import L0Ball, WholeGraph, graph_job, graph_recipe, train_best, whole_graph
from zoo.methods.contract import Sparsified
from zoo.shared.masks import MaskSet, set_masks
from zoo.shared.train import Job


@dataclasses.dataclass
class Teddy:
    """Drop edges by degree, then train once on the l0 ball, distilling from the model that is given."""

    edge_sparsity: float = 0.3
    """Share of the edges to drop, from 0 up to 1."""

    weight_sparsity: float = 0.8
    """Share of the weights that end as zero, from 0 up to 1."""

    dataset: str | None = None
    """Graph to train on: cora, citeseer, pubmed, cs, digits, a plug-in's, or a file (graph.npz); by default
    the one on the model's card."""

    order: Literal["teddy", "reversed", "random"] = "teddy"
    """By which order edges go; the last two are what TEDDY is compared with."""

    distillation: float = 1.0
    """lambda, the weight of the distillation term."""

    epochs: int = 200
    """Full-batch epochs."""

    lr: float = 0.01
    """Adam's learning rate."""

    weight_decay: float = 5e-4
    """L2 penalty on all weights."""

    seed: int = 0
    """Of the new initial weights, of dropout and of a random order."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Train a ticket; `model` is the teacher and stays as it is.

        Args:
            model: one of the zoo's GCN, GAT and GIN.
            job: on a whole graph (`zoo.graph.train.graph_job`), which is trained on unless the option
                `dataset` names another, or on parts of one (`zoo.graph.parts.parts_job`); its recipe and seed
                take the place of those among the options.

        Raises:
            ConfigError: a model of another kind, no graph to train on, or a job on anything else.
            DataError: a sparsity out of range, or data that do not fit the model.
        """
        if not isinstance(model, GraphModel):
            raise ConfigError(f"TEDDY trains the zoo's GCN, GAT and GIN. Received: {type(model).__name__}.")
        check_sparsity(self.edge_sparsity, "edge_sparsity")
        check_sparsity(self.weight_sparsity, "weight_sparsity")
        if job is not None:
            recipe = job.recipe
            fields: Any = {"epochs": recipe.epochs, "lr": recipe.lr, "weight_decay": recipe.weight_decay}
            chosen = dataclasses.replace(self, **fields, seed=job.seed)
            if isinstance(job.batches, Parts):
                return chosen._ticket(model, job.batches.data, job.batches.loader)
            data = whole_graph(job, "TEDDY")
            return chosen.sparsify(model) if self.dataset else chosen._ticket(model, data)
        dataset = self.dataset or dataset_of(model)
        made = self._ticket(model, load_graph(dataset))
        return dataclasses.replace(made, hyperparameters=made.hyperparameters | {"dataset": dataset})

    def _ticket(self, model: GraphModel, data: Data, loader: Loader | None = None) -> Sparsified:
        """A ticket of this graph, trained on the parts that a loader draws of it or on all of it."""
        whole = WholeGraph.of(model, data)
        with torch.no_grad():
            teacher = model(whole.features, whole.graph).float()
        student = reinitialised(model, self.seed)
        keep = self._edges(student, data)
        recipe = graph_recipe(self.epochs, self.lr, self.weight_decay)
        taught: Any = {"keep": keep, "teacher": teacher, "distillation": self.distillation, "seed": self.seed}
        if loader is None:
            job = graph_job(student, data, recipe, **taught)
        else:
            job = parts_job(student, data, loader, recipe, **taught)
        constraint = L0Ball.for_sparsity(student, self.weight_sparsity)
        masks = MaskSet(train_best(student, job, constraint).masks)
        set_masks(student, masks)
        student.ticket = EdgeTicket.draw(data.edge_index, int(data.num_nodes), keep)
        return Sparsified(student.eval(), masks, student.ticket.to_extras(), dataclasses.asdict(self))

    def _edges(self, model: GraphModel, data: Data) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return ticket_mask(
            data.edge_index,
            int(data.num_nodes),
            self.edge_sparsity,
            add_self_loops=isinstance(model, GAT),
            order=self.order,
            generator=generator,
        )


def reinitialised(model: GraphModel, seed: int) -> GraphModel:
    """A copy in float32 without ticket and masks, its weights drawn anew; sets torch's seed."""
    fresh = copy.deepcopy(model).float()
    fresh.ticket, fresh.edges = None, "ticket"
    fresh.__dict__.pop("zoo_info", None)
    set_masks(fresh, None)
    torch.manual_seed(seed)
    for module in fresh.children():
        module.reset_parameters()  # type: ignore[operator]
    return fresh


def dataset_of(model: nn.Module) -> str:
    """The graph of the first figure on the card of a model from the zoo.

    Raises:
        ConfigError: the model is not from the zoo.
    """
    info: Any = getattr(model, "zoo_info", None)
    if info is None:
        raise ConfigError("This model has no card that names its graph: give the option dataset.")
    return dataset_measured(str(info.card.metrics[0].task))


def dataset_measured(task: str) -> str:
    """The data set of a task: `digits` of `graph/digits`, `mine.npz` of `nodes:mine.npz`."""
    return task.removeprefix("nodes:") if task.startswith("nodes:") else task.partition("/")[2]
