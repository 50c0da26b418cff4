"""`zoo finetune graph`: train a ticket on, on its own graph or on another, with every zero kept."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from zoo.bundles.catalog import Bundle, find
from zoo.bundles.publish import Figure
from zoo.bundles.store import load_bundle
from zoo.errors import ConfigError, UnknownNameError
from zoo.graph.data import load_graph
from zoo.graph.method import dataset_measured, dataset_of
from zoo.graph.models import GraphModel
from zoo.graph.tasks import measured_on_graph
from zoo.graph.train import graph_job, graph_recipe
from zoo.graph.transfer import transferred
from zoo.shared.train import Job
from zoo.training.finetune import FineTuner, Plan


@dataclass
class Finetune(FineTuner):
    """Fine-tune a graph model; the zeros of a sparse one stay zero.

    On its own graph the model goes on from its weights. On another graph whose features and classes differ,
    the layers that meet them are new: their weights are drawn with the seed and masked at the model's weight
    sparsity by magnitude, edges are dropped by degree at the model's edge sparsity, and only layers of the
    same shape keep weights and masks.
    """

    domain: ClassVar[str] = "graph"
    shares: ClassVar[bool] = False

    dataset: str | None = None
    """Graph to train on: cora, citeseer, pubmed, cs, digits, a plug-in's, or a file (graph.npz); by default
    the model's own."""

    epochs: int = 100
    """Full-batch epochs."""

    lr: float = 0.005
    """Adam's learning rate."""

    weight_decay: float = 5e-4
    """L2 penalty on all weights."""

    checkpoint_every: int = 10
    """Epochs between checkpoints."""

    def plan(self, source: Bundle, loaded: nn.Module, twin: Bundle | None, device: torch.device) -> Plan:
        """Full-batch training of the model, made ready for the graph."""
        if not isinstance(loaded, GraphModel):
            raise ConfigError(f"{source.card.name} is none of the zoo's GCN, GAT and GIN.")
        dataset = self.dataset or dataset_of(loaded)
        data = load_graph(dataset)
        model, changes = transferred(loaded, data, self.seed)
        for line in changes:
            print(f"zoo: {line}", file=sys.stderr)
        teacher = None
        if self.distillation and twin is not None:
            with torch.no_grad():
                teacher = load_bundle(twin)(data.x, data.edge_index).float()
        job = graph_job(
            model.to(device),
            data,
            graph_recipe(self.epochs, self.lr, self.weight_decay),
            teacher=teacher,
            distillation=self.distillation,
            seed=self.seed,
        )
        task, origin = measured_on_graph(dataset)
        widths: dict[str, Any] = {"in_channels": model.in_channels, "out_channels": model.out_channels}
        return Plan(
            model,
            job,
            dataset,
            arguments={**source.card.architecture.args, **widths},
            figures=[Figure(task)],
            data={"name": origin.title, "source": origin.origin, "licence": origin.licence},
            extras=model.ticket.to_extras() if model.ticket is not None else {},
            identity={"dataset": dataset},
        )

    def taught(self, job: Job, twin: Bundle) -> Job:
        """The teacher sees the whole graph and is asked once, in `plan`."""
        return job

    def twin_of(self, source: Bundle) -> Bundle | None:
        """The dense model of this architecture on the graph to train on."""
        own = dataset_measured(source.card.metrics[0].task)
        if source.card.dense_twin is None or self.twin is not None or self.dataset in (None, own):
            return super().twin_of(source)
        architecture = source.card.architecture.name.partition("/")[2]
        try:
            return find(f"graph/dense-{architecture}-{self.dataset}")
        except UnknownNameError as error:
            raise ConfigError(
                f"No dense twin to stand beside on {self.dataset}: name one with --twin. {error}"
            ) from error
