"""Makers of recipe rows (`zoo make`) that are particular to graphs."""

from __future__ import annotations

import torch
from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.graph.clicks import RECIPE, DeepFM, click_job
from zoo.graph.data import load_graph
from zoo.graph.molecule_tasks import molecule_job
from zoo.graph.train import graph_job, graph_recipe, train_best
from zoo.methods.contract import Sparsified
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Recipe
from zoo.tables import adult


def dense(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A dense network on the row's graph: the epoch of the best validation accuracy."""
    torch.manual_seed(seed)  # of the initial weights and of dropout
    model = ARCHITECTURES.get(str(row.architecture))(**row.arguments)
    data = load_graph(str(row.dataset))
    train_best(model, graph_job(model.to(work.device), data, graph_recipe(**row.recipe), seed=seed))
    return Sparsified(model.cpu().eval(), MaskSet({}))


def clicks(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A dense click model on Adult: the epoch of the best area on the rows held back."""
    torch.manual_seed(seed)
    model = DeepFM(adult().sizes.tolist(), **row.options)
    click_job(adult(), Recipe(**{**RECIPE, **row.recipe}), seed).fit(model, macs=lambda: 0.0).run()
    return Sparsified(model.eval(), MaskSet({}), arguments=model.current_arguments())


def molecules(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A dense graph transformer on BBBP."""
    with seeded(seed):
        model = ARCHITECTURES.get(str(row.architecture))(**row.arguments)
    molecule_job(Recipe(**row.recipe), seed).fit(model, macs=lambda: 0.0).run()
    return Sparsified(model.eval(), MaskSet({}), arguments=model.current_arguments())
