"""`zoo reproduce low-rank-clicks`: click models made thin by outputs, by weights, from the start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoo.graph.clicks import RECIPE, DeepFM, area, click_job, click_loss, logits_of, parts_of
from zoo.graph.methods.low_rank import LowRank
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.digests import code_digest
from zoo.studies.figures import Columns, Curves
from zoo.studies.options import StudyOptions
from zoo.studies.study import Arm, Claim, Study, Tuned, above
from zoo.studies.view import Row, Value
from zoo.tables import Clicks, adult, criteo

OUTPUTS, WEIGHTS, RANDOM = "by outputs", "by weights", "random basis"
DENSE, FURTHER, SMALL = "dense", "dense, tuned as well", "narrow from the start"
TABLES = {"adult": adult, "criteo": criteo}


@dataclass(frozen=True)
class ClickOptions(StudyOptions):
    """Options of the experiment.

    Args:
        table: adult, or criteo, on which 1,600 rows only try the pipeline.
        seeds: how many, from 0.
        ratios: of compression.
        epochs: of the dense model.
        tuning: epochs after compression.
    """

    table: str = "adult"
    seeds: int = 5
    ratios: tuple[int, ...] = (3, 5)
    epochs: int = 6
    tuning: int = 2


def figures(model: nn.Module, clicks: Clicks) -> Row:
    """Area and log-loss on test rows, parameters, seconds of 4,096 rows."""
    _, _, (fields, labels) = parts_of(clicks)
    logits, spent = logits_of(model, fields), []
    for _ in range(5):
        start = time.process_time()
        logits_of(model, fields[:4096])
        spent.append(time.process_time() - start)
    with torch.no_grad():
        loss = click_loss(lambda _: logits, (fields, labels))  # type: ignore[arg-type]
    return {
        "auc": area(logits, labels),
        "loss": float(loss),
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms": 1000 * min(spent),
    }


def recipe_of(epochs: int, lr: float = 1e-3) -> Recipe:
    """The recipe of the study with other epochs and rate."""
    return Recipe(**{**RECIPE, "batch": 512, "epochs": epochs, "lr": lr})


def trained(options: ClickOptions, seed: int, cells: CellCache) -> DeepFM:
    """The dense model of a seed, trained once."""
    clicks = TABLES[options.table]()
    sizes = clicks.sizes.tolist()
    key = {
        "study": "low-rank-clicks",
        "cell": DENSE,
        "table": options.table,
        "epochs": options.epochs,
        "seed": seed,
        "code": code_digest(trained),
    }

    def compute() -> tuple[None, dict[str, torch.Tensor]]:
        with seeded(seed):
            model = DeepFM(sizes)
        click_job(clicks, recipe_of(options.epochs), seed).fit(model, macs=lambda: 0.0).run()
        return None, dict(model.state_dict())

    made = DeepFM(sizes)
    made.load_state_dict(cells.tensors(key, compute)[1])
    return made


def measure(make: Any, options: ClickOptions, case: Row, cells: CellCache) -> Row:
    """Figures after compression, `raw` before tuning."""
    clicks, seed, ratio = TABLES[options.table](), case["seed"], case["level"]
    if case["arm"] == SMALL:
        # Widths that give as many parameters as the factors.
        hidden = next(h for h in range(128, 1, -1) if _parameters(clicks, h) <= _thin(clicks, ratio))
        with seeded(seed):
            model: nn.Module = DeepFM(clicks.sizes.tolist(), 16, (hidden,) * 3)
        click_job(clicks, recipe_of(options.epochs + options.tuning), seed).fit(model, macs=lambda: 0.0).run()
        return figures(model, clicks)
    model = trained(options, seed, cells)
    job = click_job(clicks, recipe_of(options.tuning, 5e-4), seed)
    found: Row = {}
    if case["arm"] != DENSE and case["arm"] != FURTHER:
        model = LowRank(ratio=float(ratio), by=make, tune=False).sparsify(model, job).model
        found = {"raw": figures(model, clicks)["auc"]}
    if case["arm"] != DENSE:
        job.fit(model, macs=lambda: 0.0).run()
    return figures(model, clicks) | found


def _parameters(clicks: Clicks, hidden: int) -> int:
    return sum(p.numel() for p in DeepFM(clicks.sizes.tolist(), 16, (hidden,) * 3).parameters())


def _thin(clicks: Clicks, ratio: float) -> int:
    job = click_job(clicks, recipe_of(1))
    made = LowRank(ratio=float(ratio), by="weights", tune=False).sparsify(DeepFM(clicks.sizes.tolist()), job)
    return sum(p.numel() for p in made.model.parameters())


def cases(options: ClickOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        for arm in ARMS:
            for ratio in (1,) if ARMS[arm].flat else options.ratios:
                yield {"arm": arm, "level": ratio, "seed": seed}


_SHARED = Tuned("epoch", "rows held back", ("every epoch",))
ARMS = {
    OUTPUTS: Arm("outputs", tuned=_SHARED),
    WEIGHTS: Arm("weights", control=RANDOM, tuned=_SHARED),
    RANDOM: Arm("random", tuned=_SHARED),
    SMALL: Arm(tuned=_SHARED),
    DENSE: Arm(flat=True, tuned=_SHARED),
    FURTHER: Arm(flat=True, tuned=_SHARED),
}
AUC, RAW = Value("auc", 100.0, 2, "AUC points", 2), Value("raw", 100.0, 2, "AUC points", 2)
COLUMNS = {
    "AUC, %": AUC,
    "before tuning, %": RAW,
    "log-loss": Value("loss", 1.0, 4),
    "parameters": Value("parameters", 1.0, 0),
    "ms of 4,096 rows": Value("ms", 1.0, 1),
}
STUDY = Study(
    "low-rank-clicks",
    "Click models made thin by low rank",
    "Hao Yu, Minghao Fu, Jiandong Ding, Yusheng Zhou, Jianxin Wu: Unified Low-rank Compression Framework for "
    "Click-through Rate Prediction, KDD 2024",
    ClickOptions,
    ARMS,
    cases,
    measure,
    papers=(55,),
    claims=lambda options: (
        [
            above(OUTPUTS, DENSE, published="higher AUC at 3 to 5 times fewer parameters"),
            above(OUTPUTS, DENSE, -0.3),
            above(OUTPUTS, FURTHER, published="higher AUC at 3 to 5 times fewer parameters"),
            above(OUTPUTS, WEIGHTS, published="better than decomposing weights"),
            Claim(
                "before tuning, outputs are a better guide than weights at {level}",
                "better than decomposing weights",
                OUTPUTS,
                WEIGHTS,
                value=RAW,
            ),
            above(OUTPUTS, SMALL),
        ]
        if options.table == "adult"
        else []
    ),
    value=AUC,
    varies=("seeds", "ratios", "device"),
    data=lambda options, case: TABLES[options.table](),
    tables=[
        Columns("Thin models", COLUMNS, arms=(OUTPUTS, WEIGHTS, RANDOM, SMALL), levels=(), heading="ratio"),
        Columns("Dense models", COLUMNS, arms=(DENSE, FURTHER)),
    ],
    plots=[
        Curves(
            "auc",
            "AUC by parameters",
            "parameters",
            "AUC (%)",
            x=Value("parameters", 1.0),
            points=True,
            log_x=True,
        ),
    ],
    notes=lambda options: [
        f"DeepFM, embeddings of 16, 128-128-128; {options.epochs} epochs dense, {options.tuning} after. "
        "The ratio is of each layer and table that is factored; the parameters are of the whole model.",
        "Adult: income in place of clicks. Criteo's sample of 1,999 rows, `--table criteo`, is judged by no "
        "claim.",
    ],
)
