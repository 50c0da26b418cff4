"""`zoo reproduce sparcl`: ten classes learned two at a time, dense and sparse from the first step on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import nn

from zoo.methods.contract import default_recipe
from zoo.methods.sparcl import SparCL, tasks_of
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves, mean_of
from zoo.studies.study import Arm, Study, Tuned, above, grid
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Value, View
from zoo.vision.data import correct
from zoo.vision.studies import common
from zoo.vision.studies.small import SmallOptions, whole

DENSE, STATIC, SET, OURS = "DER++, dense", "DER++, static mask", "DER++, SET", "SparCL"
NO_TDM, NO_DGM, NO_DDR = "SparCL, static mask", "SparCL, whole gradients", "SparCL, all data"
TUNING = 1000  # the seed with which learning rates are chosen


@dataclass(frozen=True)
class ContinualOptions(SmallOptions):
    """Options.

    Args:
        levels: shares of zeros; the parts of the method are taken out at the first.
        tasks: that the classes are divided into.
        epochs: of each task.
        buffer: examples kept for replay.
        lrs: learning rates, of which each arm takes the best on validation images.
    """

    train_images: int = 1200
    levels: tuple[float, ...] = (0.75, 0.9)
    tasks: int = 5
    epochs: int = 5
    buffer: int = 100
    lrs: tuple[float, ...] = (0.3, 0.6)


def learned(make: Any, options: ContinualOptions, case: Row, lr: float, part: str) -> Row:
    """One training over all tasks: accuracy over all classes at the end, by task after each task, cost."""
    images, matrix = options.images(), list[list[float]]()
    tasks, held = tasks_of(images.train.labels, options.tasks), getattr(images, part)
    method = make(sparsity=case["level"], tasks=options.tasks, buffer=options.buffer)
    job = options.job(Recipe(**{**default_recipe(method), "epochs": options.epochs, "lr": lr}), case["seed"])

    def after(model: nn.Module) -> None:
        right = correct(model, images, held).double()
        matrix.append([float(right[torch.isin(held.labels, classes)].mean()) for classes in tasks])

    start = time.process_time()
    method.learn(options.model(), *whole(images), tasks, job, after)
    drops = [max(row[j] for row in matrix[j:]) - matrix[-1][j] for j in range(len(tasks) - 1)]
    return {
        "accuracy": fmean(matrix[-1]),
        "forgetting": fmean(drops),
        "matrix": [[round(value, 3) for value in row] for row in matrix],
        "flops": job.cost.flops,
        "seconds": time.process_time() - start,
        "lr": lr,
    }


def measure(make: Any, options: ContinualOptions, case: Row, cells: CellCache) -> Row:
    """A run with the learning rate that is best on validation images for the arm, at its level."""
    tuning = {**case, "seed": TUNING}

    def tried(lr: float) -> float:
        key = STUDY.key(options, tuning) | {"lr": lr}
        found: Row = cells.cell(key, lambda: learned(make, options, tuning, lr, "val"))
        return float(found["accuracy"])

    return learned(make, options, case, max(options.lrs, key=tried), "test")


def cases(options: ContinualOptions) -> Iterator[Row]:
    """The parts at the first level, the others at all."""
    yield from grid(ARMS, [0.0], options.seeds, [DENSE])
    for level in options.levels:
        arms = [STATIC, SET, OURS] + [NO_TDM, NO_DGM, NO_DDR] * (level == options.levels[0])
        yield from grid(ARMS, [level], options.seeds, arms)


def facts(view: View) -> list[Verdict]:
    """The counted cost over the dense one, with the time."""
    level = view.options.levels[0]
    ratio, times = (
        view.mean(OURS, level, Value(name, 1.0)) / view.mean(DENSE, None, Value(name, 1.0))
        for name in ("flops", "seconds")
    )
    measured = f"{ratio:.2f}x the FLOPs, {times:.2f}x the time of a training whose zeros are multiplied"
    claim = f"at {level:.0%} zeros training takes at most 0.35x the counted FLOPs of dense DER++"
    return [view.fact(claim, "up to 23x less (abstract)", measured, ratio <= 0.35)]


_plain: dict[str, Any] = {"sparse_gradients": False, "removal": 0.0}
_rate = Tuned("learning rate", "validation images", "lrs")
ARMS = {
    DENSE: Arm(partial(SparCL, masks="dense", **_plain), tuned=_rate, flat=True),
    STATIC: Arm(partial(SparCL, masks="static", **_plain), tuned=_rate),
    SET: Arm(partial(SparCL, masks="set", **_plain), tuned=_rate),
    OURS: Arm(SparCL, tuned=_rate),
    NO_TDM: Arm(partial(SparCL, masks="static"), tuned=_rate),
    NO_DGM: Arm(partial(SparCL, sparse_gradients=False), tuned=_rate),
    NO_DDR: Arm(partial(SparCL, removal=0.0), tuned=_rate),
}
STUDY = Study(
    "sparcl",
    "SparCL: class-incremental learning of a network that is sparse throughout",
    "Wang et al., NeurIPS 2022, arXiv 2209.09476; DER++: Buzzega et al., NeurIPS 2020",
    ContinualOptions,
    ARMS,
    cases,
    measure,
    papers=(14,),
    claims=lambda options: [
        above(OURS, DENSE, -2.0, "up to 1.7 points above (abstract)", at=options.levels[:1]),
        above(OURS, STATIC, 1.0, at=options.levels[1:]),
        *(above(OURS, other, at=options.levels[:1]) for other in (SET, NO_TDM, NO_DGM, NO_DDR)),
    ],
    data=lambda options, where: common.content(options.images()),
    facts=facts,
    tables=[
        Columns(
            "Class-incremental learning",
            {
                "accuracy (%)": Value(),
                "forgetting (points)": Value("forgetting"),
                "GFLOPs": mean_of("flops", "{:,.1f}", 1e-9),
                "seconds": mean_of("seconds", "{:,.1f}"),
                "learning rate": mean_of("lr"),
            },
            "Forgetting is the mean fall of a task's accuracy from its best. FLOPs count kept weights "
            "and used gradients only; seconds are of one thread that multiplies the zeros.",
            levels=lambda view: view.levels(),
            heading="zeros",
        )
    ],
    plots=[
        Curves(
            "cost",
            "Accuracy after all tasks against counted cost",
            "GFLOPs of training",
            "accuracy over all classes (%)",
            x=Value("flops", 1e-9),
            points=True,
            alt="A point per arm and level: what it reaches at the end and what its training counts.",
        )
    ],
    notes=lambda options: [
        f"{options.dataset}, averaged to half its size, {options.train_images:,} training images, "
        f"{options.tasks} tasks, {options.epochs} epochs each of batches of 32, a buffer of {options.buffer} "
        "images; three convolutions, of which the last two are masked; no task is named at the test.",
        "The paper trains 250 epochs on five tasks; here a task has a few dozen steps, which a part of each "
        "gradient and fewer images shorten further. That is the probable reason of what is lost.",
    ],
)
