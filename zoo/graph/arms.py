"""The arms of TEDDY's comparison: which edges, which weights, distilled or not - one training run each.

Each run is a cell of the experiment: a plain description in, plain numbers out. All runs of a seed start from
the same initial weights; the teacher is the dense run of that seed. Times are processor seconds of the
training alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch_geometric.data import Data

from zoo.errors import UnknownNameError
from zoo.graph.models import GAT, GCN, GIN, GraphModel
from zoo.graph.teddy import Order, released_level, ticket_mask
from zoo.graph.train import Best, Constraint, Fit, FixedMasks, L0Ball, TrainConfig, accuracy_of
from zoo.graph.ugs import UGSConfig, ugs
from zoo.harness.experiments import CellCache
from zoo.shared.store.io import atomic_write

# Raise it when a change to the training code changes what a cell means.
CELL_VERSION = 1

ARCHITECTURES = ("gcn", "gin", "gat")


@dataclass(frozen=True)
class Arm:
    """One way to a sparse model.

    Args:
        edges: the order in which edges go, or None for the whole graph.
        weights: projection on the l0 ball at each step; magnitude of the trained dense weights, then rewound
            and trained with that mask; or dense.
        distilled: whether the dense run's logits are distilled.
    """

    edges: Order | None
    weights: Literal["l0", "magnitude", "dense"]
    distilled: bool


ARMS = {
    "teddy": Arm("teddy", "l0", True),
    "teddy, no distillation": Arm("teddy", "l0", False),
    "random": Arm("random", "l0", True),
    "random, no distillation": Arm("random", "l0", False),
    "reversed": Arm("reversed", "l0", True),
    "reversed, no distillation": Arm("reversed", "l0", False),
    "magnitude weights": Arm(None, "magnitude", False),
    "l0 weights": Arm(None, "l0", False),
    "l0 weights, distilled": Arm(None, "l0", True),
    "dense, distilled": Arm(None, "dense", True),
}


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share."""

    architecture: str
    dataset: str
    epochs: int = 200
    hidden: int = 128

    def key(self, **rest: Any) -> dict[str, Any]:
        """A cell's key."""
        shared = {"architecture": self.architecture, "dataset": self.dataset, "epochs": self.epochs}
        return {"experiment": "teddy", "version": CELL_VERSION, **shared, "hidden": self.hidden, **rest}


def new_model(architecture: str, data: Data, hidden: int, seed: int) -> GraphModel:
    """A freshly initialised model for this graph; sets torch's seed, on which initialisation and dropout
    depend.

    Args:
        architecture: gcn, gat or gin.
        data: features and labels give the widths of input and output.
        hidden: width of the hidden layer; GAT divides it by its 8 heads.
        seed: of the initial weights and of everything random after them.
    """
    torch.manual_seed(seed)
    inputs, classes = data.x.shape[1], int(data.y.max()) + 1
    if architecture == "gcn":
        return GCN(inputs, hidden, classes)
    if architecture == "gin":
        return GIN(inputs, hidden, classes)
    if architecture == "gat":
        return GAT(inputs, hidden // 8, classes)
    raise UnknownNameError(f"Unknown architecture {architecture!r}. There are: {', '.join(ARCHITECTURES)}.")


def loops_count(architecture: str) -> bool:
    """Whether self-loops are added before scoring and count among the entries: TEDDY does so for GAT."""
    return architecture == "gat"


def dense_run(setting: Setting, data: Data, seed: int, cells: CellCache) -> dict[str, Any]:
    """The dense model of this seed, whose logits the other arms distil."""
    key = setting.key(arm="dense", seed=seed)
    teacher = _teacher_file(cells, key)

    def compute() -> dict[str, Any]:
        model = new_model(setting.architecture, data, setting.hidden, seed)
        start = time.process_time()
        best = Fit(model, data, TrainConfig(setting.epochs, distillation=0.0)).run()
        seconds = time.process_time() - start
        teacher.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(
            teacher, save({"logits": best.logits, **{f"weights/{k}": v for k, v in best.weights.items()}})
        )
        entries = data.edge_index.shape[1]
        return _report(best, data, seconds, entries, sum(p.numel() for p in model.parameters()))

    if not teacher.exists():
        cells.path(key).unlink(missing_ok=True)
    found: dict[str, Any] = cells.cell(key, compute)
    return found


def arm_run(
    setting: Setting,
    data: Data,
    arm: str,
    level: tuple[float, float],
    seed: int,
    cells: CellCache,
    distillation: float = 1.0,
) -> dict[str, Any]:
    """One run of an arm at (edge sparsity, weight sparsity)."""
    spec = ARMS[arm]
    weight = distillation if spec.distilled else 0.0
    edge_sparsity, weight_sparsity = level
    key = setting.key(
        edges=spec.edges or "whole",
        weights=spec.weights,
        seed=seed,
        distillation=weight,
        edge_sparsity=round(edge_sparsity, 12) if spec.edges else 0.0,
        weight_sparsity=round(weight_sparsity, 12) if spec.weights != "dense" else 0.0,
    )
    if (stored := cells.get(key)) is not None:
        cells.hits += 1
        return dict(stored)
    needs_dense = spec.distilled or spec.weights == "magnitude"
    dense = dense_run(setting, data, seed, cells) if needs_dense else None
    teacher = load_file(_teacher_file(cells, setting.key(arm="dense", seed=seed))) if needs_dense else {}

    def compute() -> dict[str, Any]:
        keep = edge_mask(setting.architecture, data, edge_sparsity, spec.edges, seed)
        model = new_model(setting.architecture, data, setting.hidden, seed)
        start = time.process_time()
        constraint = _constraint(model, spec, weight_sparsity, teacher)
        recipe = TrainConfig(setting.epochs, distillation=weight)
        logits = teacher["logits"] if spec.distilled else None
        best = Fit(model, data, recipe, keep=keep, teacher=logits, constraint=constraint).run()
        seconds = time.process_time() - start + (dense["seconds"] if dense else 0.0)
        total = sum(p.numel() for p in model.parameters())
        kept = sum(int(m.sum()) for m in best.masks.values()) if best.masks else total
        return _report(best, data, seconds, int(keep.sum()), kept)

    return dict(cells.cell(key, compute))


def ugs_run(
    setting: Setting, data: Data, levels: tuple[int, ...], seed: int, cells: CellCache
) -> dict[int, dict[str, Any]]:
    """All levels of UGS for one seed."""
    key = setting.key(arm="ugs", levels=list(levels), seed=seed)

    def compute() -> dict[str, Any]:
        model = new_model(setting.architecture, data, setting.hidden, seed)
        config = UGSConfig.released(setting.dataset, setting.epochs)
        found = ugs(model, data, config, levels, self_loops_count=loops_count(setting.architecture))
        return {
            str(k): _report(
                level.best,
                data,
                level.seconds,
                int(level.keep.sum()),
                sum(int(m.sum()) for m in level.best.masks.values()),
            )
            for k, level in found.items()
        }

    return {int(k): value for k, value in cells.cell(key, compute).items()}


def edge_mask(architecture: str, data: Data, sparsity: float, order: Order | None, seed: int) -> Tensor:
    """The kept entries of an arm; random draws depend on the seed, TEDDY's do not."""
    if order is None or sparsity == 0:
        return torch.ones(data.edge_index.shape[1], dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    nodes = int(data.num_nodes)
    loops = loops_count(architecture)
    return ticket_mask(
        data.edge_index, nodes, sparsity, add_self_loops=loops, order=order, generator=generator
    )


def levels_of(ks: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    """(edge sparsity, weight sparsity) of each chosen level."""
    return {k: released_level(k) for k in ks}


def _constraint(model: GraphModel, spec: Arm, sparsity: float, dense: dict[str, Tensor]) -> Constraint | None:
    if spec.weights == "dense" or sparsity == 0:
        return None
    ball = L0Ball.for_sparsity(model, sparsity)
    if spec.weights == "l0":
        return ball
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(dense[f"weights/{name}"])
    fixed = FixedMasks(ball(model))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(initial[name])
    fixed(model)
    return fixed


def _report(best: Best, data: Data, seconds: float, entries: int, weights: int) -> dict[str, Any]:
    test = accuracy_of(best.logits, data.y, data.test_mask.nonzero().flatten())
    return {
        "test": test,
        "val": best.val_accuracy,
        "epoch": best.epoch,
        "seconds": seconds,
        "edges_kept": entries,
        "weights_kept": weights,
    }


def _teacher_file(cells: CellCache, key: dict[str, Any]) -> Path:
    return cells.path(key).with_suffix(".safetensors")
