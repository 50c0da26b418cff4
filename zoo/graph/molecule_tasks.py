"""Molecules that pass the blood-brain barrier, as job and harness task."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from zoo.graph.methods.gtsp import GTSP, GraphTransformer
from zoo.graph.studies.gtsp import GraphBatches, graph_loss, split
from zoo.harness.network_task import NetworkTask
from zoo.harness.tasks import Measure, Progress, TaskResult, register_task
from zoo.shared.train import Job, Recipe


def molecule_job(recipe: Recipe | None = None, seed: int = 0) -> Job:
    """Training on four fifths of BBBP."""
    recipe = recipe or Recipe(**GTSP.recipe)
    return Job(GraphBatches(split(0)[0], recipe.batch), graph_loss, None, recipe, seed)


@register_task
class Barrier(NetworkTask):
    """BBBP of MoleculeNet, a fifth of the molecules of at most 32 atoms: area under the curve, and
    accuracy."""

    name, domain, primary = "graph/bbbp", "graph", "auc"
    network = GraphTransformer

    def measured_on(self) -> Any:
        """The molecules and their labels."""
        return list(split(0)[1])

    def example(self, model: GraphTransformer) -> tuple[Any, ...]:
        """One molecule."""
        return tuple(split(0)[1].part(torch.arange(1))[:3])

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """The area is no mean over samples; accuracy has those of every molecule."""
        test = split(0)[1]
        with torch.no_grad():
            logits = self.fitting(model)(test.features, test.edges, test.there)
        right = logits.argmax(1) == test.labels
        found = TaskResult.from_samples({"accuracy": right.double().tolist()}, f"bbbp:{len(right)}")
        score = roc_auc_score(test.labels.numpy(), (logits[:, 1] - logits[:, 0]).numpy())
        return TaskResult(
            {"auc": Measure(float(score)), **found.metrics}, found.samples, found.n, found.sample_set
        )
