"""Makes the lidar bundles of the zoo: DSVT on pillars and its dense-pillar twin.

    python -m zoo.vision.lidar.pretrain

They are the models of `zoo reproduce dsvt --epochs 24` after the same epochs, whose finished cells are taken
where they are. A bundle holds the model of seed 0, whatever its rank; its card has the figures of every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from zoo.bundles.card import Card, mean_and_spread
from zoo.bundles.catalog import cache_folder, open_bundle
from zoo.bundles.store import save
from zoo.errors import TaskError
from zoo.harness.evidence import record_evidence
from zoo.harness.experiments import CellCache
from zoo.harness.tasks import TaskResult, get_task
from zoo.progress import progress_bar
from zoo.vision.lidar.data import SOURCE
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.experiment import DSVTExperimentConfig, trained_cell, trained_model

EVIDENCE = "benchmarks/results/lidar-bundles.json"
TASK = "vision/lidar-scenes"
EPOCHS = 24  # the usual six of the experiment reach less than half of the precision
METRICS = ("bev_ap_loose", "ap_3d_loose", "bev_ap", "ap_3d")  # the task's primary metric first
TWIN, MODEL = "vision/dense-pillars-scenes", "vision/dsvt-pillars-scenes"
ENTRIES = {
    TWIN: ("dense pillars", "dense", "Lang et al. PointPillars. CVPR 2019."),
    MODEL: (
        "dsvt",
        "dsvt",
        "Wang et al. DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets. CVPR 2023.",
    ),
}
SUMMARIES = {
    TWIN: "Boxes of cars, pedestrians and cyclists in generated LiDAR scenes, from dense pillars.",
    MODEL: "Boxes of cars, pedestrians and cyclists in generated LiDAR scenes; attention to occupied pillars "
    "only, in rotated sets.",
}


@dataclass(frozen=True)
class Pretrain:
    """Which training the bundles are of.

    Args:
        experiment: options of `zoo reproduce dsvt`.
        out: folder of the bundles.
        evidence: file that collects the values of every seed.
        cells: folder of finished trainings; by default in the cache.
    """

    experiment: DSVTExperimentConfig = DSVTExperimentConfig(epochs=EPOCHS)
    out: Path = Path(__file__).parents[1] / "cards"
    evidence: Path = Path(__file__).parents[3] / EVIDENCE
    cells: Path | None = None


def cost_beside(card: Card | None, flops_dense: int, flops_own: int, parameters: int) -> dict[str, Any]:
    """The cost on the card of a model whose twin is `card`: dense figures are the larger of both.

    Args:
        card: of the dense twin; None for a dense model.
        flops_dense, flops_own: as the task counts them.
        parameters: of the model.
    """
    cost: dict[str, Any] = {
        "parameters": {},
        "bytes": {},
        "flops": {"dense": flops_dense, "sparse": flops_own},
    }
    if card is not None:
        cost["flops"]["dense"] = max(flops_dense, card.cost.flops.dense)
        if parameters < card.cost.parameters.dense:
            cost["parameters"]["dense"] = card.cost.parameters.dense
            cost["bytes"]["dense"] = card.cost.bytes.dense
    return cost


def write(config: Pretrain, name: str, models: Sequence[Detector], seconds: float) -> Path:
    """Save the model of seed 0 with the figures of all seeds, and record the evidence."""
    task = get_task(TASK)
    results: list[TaskResult] = [task.evaluate(model) for model in models]
    flops = task.flops(models[0])
    if flops is None:
        raise TaskError(f"{TASK} counts no operations of {type(models[0]).__name__}")
    _, method, citation = ENTRIES[name]
    folder = config.out / name.partition("/")[2]
    twin = None if method == "dense" else open_bundle(config.out / TWIN.partition("/")[2]).card
    metrics = []
    for metric in METRICS:
        per_seed = {seed: result.metrics[metric].value for seed, result in enumerate(results)}
        mean, spread = mean_and_spread(per_seed)
        figure: dict[str, Any] = {
            "task": TASK,
            "metric": metric,
            "split": "test",
            "protocol": "200 test scenes, last epoch",
            "value": results[0].metrics[metric].value,
            "stderr": results[0].metrics[metric].stderr or 0.0,
            "per_seed": per_seed,
            "mean": mean,
            "spread": spread,
        }
        if twin is not None:
            own = next(m for m in twin.metrics if m.metric == metric)
            values = {key: getattr(own, key) for key in ("value", "per_seed", "mean", "spread")}
            figure["dense"] = {"name": TWIN, **values}
        metrics.append(figure)
        record_evidence(config.evidence, name, TASK, metric, per_seed)
    options = config.experiment
    hyperparameters = {
        "epochs": options.epochs,
        "scenes": options.scenes,
        "batch": options.batch,
        "lr": options.lr,
    }
    parameters = sum(p.numel() for p in models[0].parameters())
    card: dict[str, Any] = {
        "name": name,
        "version": "1.0.0",
        "domain": "vision",
        "summary": SUMMARIES[name],
        "architecture": {"name": "vision/lidar-detector", "args": models[0].current_arguments()},
        "method": {"name": method, "hyperparameters": hyperparameters, "seed": 0},
        "cost": cost_beside(twin, flops.dense, flops.sparse, parameters),
        "metrics": metrics,
        "dense_twin": TWIN if twin is not None else None,
        "sparsity": {"parts": {}},
        "training": {"command": "python -m zoo.vision.lidar.pretrain", "seconds": round(seconds, 1)},
        "data": {"name": SOURCE.title, "source": SOURCE.origin, "licence": SOURCE.licence},
        "license": "Apache-2.0",
        "citation": citation,
        "evidence": EVIDENCE,
    }
    return save(models[0], folder, card=card, overwrite=True)


def main(config: Pretrain) -> None:
    """Train what is missing and write both bundles."""
    torch.set_num_threads(1)
    cells = CellCache(config.cells or cache_folder() / "cells" / "dsvt")
    options = config.experiment
    with progress_bar() as progress:
        for number, (name, (arm, _, _)) in enumerate(ENTRIES.items()):
            models, seconds = [], 0.0
            for seed in range(options.seeds):
                progress(number * options.seeds + seed, len(ENTRIES) * options.seeds, f"{arm} seed {seed}")
                seconds += trained_cell(options, arm, seed, options.epochs, cells)["seconds"]
                models.append(trained_model(options, arm, seed, options.epochs, cells))
            write(config, name, models, seconds)


if __name__ == "__main__":
    main(tyro.cli(Pretrain, description=__doc__))
