"""Graph neural networks with few edges and few weights: TEDDY's one-shot tickets and what they are measured
against; low rank for ratings and clicks.

Importing this package imports neither torch nor torch-geometric: everything is registered by address.
"""

from __future__ import annotations

import importlib
from typing import Any

from zoo.registry import (
    ARCHITECTURES,
    CONTENTS,
    DATASETS,
    FINETUNERS,
    JOBS,
    MAKERS,
    MEASURED,
    METHODS,
    RECIPE_CHECKS,
    STUDIES,
    TASKS,
)

ARCHITECTURES.register("graph/gcn", "zoo.graph.models:GCN")
ARCHITECTURES.register("graph/gin", "zoo.graph.models:GIN")
ARCHITECTURES.register("graph/gat", "zoo.graph.models:GAT")
ARCHITECTURES.register("graph/transformer", "zoo.graph.methods.gtsp:GraphTransformer")
ARCHITECTURES.register("graph/deepfm", "zoo.graph.clicks:DeepFM")
ARCHITECTURES.register("graph/factors", "zoo.graph.factors:Factors")
ARCHITECTURES.register("graph/folded-relu", "zoo.graph.methods.sparse_dynamics:FoldedReLU")
METHODS.register("gtsp", "zoo.graph.methods.gtsp:GTSP")
METHODS.register("low-rank", "zoo.graph.methods.low_rank:LowRank")
METHODS.register("sparse-dynamics", "zoo.graph.methods.sparse_dynamics:SparseDynamics")
METHODS.register("teddy", "zoo.graph.method:Teddy")
METHODS.register("ugs", "zoo.graph.ugs:UGS")
TASKS.register("graph/cora", "zoo.graph.tasks:Cora")
TASKS.register("graph/citeseer", "zoo.graph.tasks:Citeseer")
TASKS.register("graph/pubmed", "zoo.graph.tasks:Pubmed")
TASKS.register("graph/cs", "zoo.graph.tasks:CoauthorCS")
TASKS.register("graph/digits", "zoo.graph.tasks:Digits")
TASKS.register("graph/adult", "zoo.graph.click_tasks:Adult")
TASKS.register("graph/bbbp", "zoo.graph.molecule_tasks:Barrier")
TASKS.register("graph/filmtrust", "zoo.graph.factors:FilmTrust")
TASKS.register("graph/pusher", "zoo.graph.pusher:Pusher")
TASKS.register("nodes", "zoo.graph.tasks:Nodes")
for _name in ("cora", "citeseer", "pubmed", "cs", "digits"):
    DATASETS.register(f"graph/{_name}", f"zoo.graph.data:{_name}")
MEASURED.register("graph", "zoo.graph.tasks:measured_on_graph")
CONTENTS.register("graph", "zoo.graph.domain:content")
STUDIES.register("gtsp", "zoo.graph.studies.gtsp:STUDY")
STUDIES.register("gtsp-nodes", "zoo.graph.studies.gtsp_nodes:STUDY")
STUDIES.register("low-rank-clicks", "zoo.graph.studies.low_rank:STUDY")
STUDIES.register("matrix-completion", "zoo.graph.studies.matrix_completion:STUDY")
STUDIES.register("sparse-dynamics", "zoo.graph.studies.sparse_dynamics:STUDY")
STUDIES.register("smash", "zoo.graph.studies.smash:STUDY")
STUDIES.register("teddy", "zoo.graph.studies.teddy:STUDY")
MAKERS.register("graph/dense", "zoo.graph.makers:dense")
MAKERS.register("graph/clicks", "zoo.graph.makers:clicks")
MAKERS.register("graph/factors", "zoo.graph.factors:factors")
MAKERS.register("graph/molecules", "zoo.graph.makers:molecules")
MAKERS.register("graph/pusher", "zoo.graph.pusher:pusher")
FINETUNERS.register("graph", "zoo.graph.finetune:Finetune")
RECIPE_CHECKS.register("graph", "zoo.graph.recipe_check:Graph")
JOBS.register("graph", "zoo.graph.domain:make_job")

_PUBLIC = {
    "GAT": "models",
    "GCN": "models",
    "GIN": "models",
    "PrunedEdges": "pruned",
    "PrunedRelations": "relations",
    "TeddyPrune": "transform",
    "load_graph": "data",
    "parts_job": "parts",
    "save_graph": "files",
    "ticket_mask": "teddy",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"zoo.graph.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
