"""The pusher of `zoo reproduce sparse-dynamics` as maker and harness task."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.graph.methods.sparse_dynamics import FoldedReLU, SparseDynamics
from zoo.graph.studies.sparse_dynamics import (
    DynamicsOptions,
    by_samples,
    closed_loop,
    errors,
    perceptron_layers,
    predicts,
    squared,
    transitions,
)
from zoo.harness.network_task import NetworkTask
from zoo.harness.tasks import Measure, Progress, TaskResult, register_task
from zoo.methods.contract import Sparsified
from zoo.shared.masks import MaskSet
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job, Recipe


def pusher(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """Maker: dynamics of the pusher with as many ReLUs as the row's options say, folded; with all of them
    nothing is left out."""
    with seeded(seed):
        net = nn.Sequential(*perceptron_layers())
    recipe = Recipe(**{**SparseDynamics.recipe, **row.recipe})
    job = Job(DataLoader(transitions(), recipe.batch, shuffle=True), squared, recipe=recipe, seed=seed)
    made = SparseDynamics(**row.options).sparsify(net, job)
    model: Any = made.model
    return Sparsified(model, MaskSet({}), hyperparameters=made.hyperparameters, arguments=model.arguments)


@register_task
class Pusher(NetworkTask):
    """A pusher that moves two sliding blocks: errors after one and ten moves, and the cost of closed loops.

    Plans are by one round of 128 samples (CEM), so that they do not depend on the machine's speed.
    """

    name, domain, primary, higher_is_better = "graph/pusher", "graph", "ten", False
    network = FoldedReLU

    def example(self, model: FoldedReLU) -> tuple[Any, ...]:
        """A state with a move."""
        return (torch.zeros(1, 6),)

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure a model of changes."""
        own = self.fitting(model)
        with torch.no_grad():
            found = errors(own, 0)
            loops = closed_loop(by_samples(predicts(own), "cem"), DynamicsOptions(starts=10), 0, 0.0)
        metrics = {name: Measure(float(found[name])) for name in ("ten", "one")}
        cost = TaskResult.from_samples({"cost": loops["cost"]}, "pusher:10")
        return TaskResult({**metrics, **cost.metrics}, cost.samples, cost.n, cost.sample_set)
