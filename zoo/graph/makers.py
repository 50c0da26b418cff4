"""Makers of recipe rows (`zoo make`) that are particular to graphs."""

from __future__ import annotations

import torch
from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.graph.data import load_graph
from zoo.graph.train import Fit, TrainConfig
from zoo.methods.contract import Sparsified
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet


def dense(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A dense network on the row's graph: the epoch of the best validation accuracy."""
    torch.manual_seed(seed)  # of the initial weights and of dropout
    model = ARCHITECTURES.get(str(row.architecture))(**row.arguments)
    config = TrainConfig(**row.recipe, distillation=0.0)
    best = Fit(model.to(work.device), load_graph(str(row.dataset)), config).run()
    model.cpu().load_state_dict(best.weights)
    return Sparsified(model.eval(), MaskSet({}))
