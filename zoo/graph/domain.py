"""Jobs on the graphs and click tables of the zoo."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.graph.clicks import DeepFM, click_job
from zoo.graph.data import SOURCES, load_graph
from zoo.graph.files import is_file
from zoo.graph.method import dataset_of
from zoo.graph.methods.gtsp import GraphTransformer
from zoo.graph.models import GraphModel
from zoo.graph.molecule_tasks import molecule_job
from zoo.graph.train import graph_job
from zoo.registry import DATASETS
from zoo.shared.train import Job, Recipe, device_named
from zoo.tables import adult


def make_job(
    dataset: str | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    model: nn.Module | None = None,
) -> Job:
    """Full-batch training on a graph by name; of a DeepFM training on Adult, of a graph transformer on BBBP.

    Args:
        dataset: cora, citeseer, pubmed, cs, digits, a plug-in's, or a file; by default the one on the model's
            card.
        recipe: by default TEDDY's.
        seed: of dropout.
        device: where to train; the model is moved there.
        model: whose inputs the graph is converted to; of the zoo's GCN, GAT and GIN, a DeepFM or a
            GraphTransformer.

    Raises:
        ConfigError: no such model is given, or one without a card and no graph.
        DataError: an unknown graph.
    """
    if isinstance(model, DeepFM):
        if dataset not in (None, "adult"):
            raise ConfigError(f"a DeepFM trains on adult; received {dataset!r}")
        return click_job(adult(), recipe, seed)
    if isinstance(model, GraphTransformer):
        if dataset not in (None, "bbbp"):
            raise ConfigError(f"a graph transformer trains on bbbp; received {dataset!r}")
        return molecule_job(recipe, seed)
    if not isinstance(model, GraphModel):
        raise ConfigError(
            f"a graph is prepared for one of the zoo's GCN, GAT and GIN. Received: {type(model).__name__}."
        )
    return graph_job(
        model.to(device_named(device)), load_graph(dataset or dataset_of(model)), recipe, seed=seed
    )


def content(dataset: str) -> list[Any] | None:
    """What the digest of a graph on a card is taken of, of Adult its rows; None for other data."""
    if dataset == "adult":
        return list(adult())
    if not is_file(dataset) and dataset not in SOURCES and f"graph/{dataset}" not in DATASETS:
        return None
    graph = load_graph(dataset)
    return [graph.x, graph.edge_index, graph.y, graph.train_mask, graph.val_mask, graph.test_mask]
