"""`zoo reproduce dass`: architectures searched sparse, searched dense and drawn, pruned and trained alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from zoo.methods.training import train_gradually
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, mean_of
from zoo.studies.options import StudyOptions
from zoo.studies.study import Arm, Study, above
from zoo.studies.tables import Plot, Series
from zoo.studies.view import Row, Value, View
from zoo.vision.data import Images, accuracy, load_images
from zoo.vision.domain import image_job
from zoo.vision.methods.dass import DASS, OPERATIONS, CellNet, counted, random_genotype

SPARSE, DENSE, DRAWN = "searched sparse (DASS)", "searched dense (DARTS)", "drawn by chance"


@dataclass(frozen=True)
class DassOptions(StudyOptions):
    """Options of the experiment.

    Args:
        seeds: how many, from 0.
        images: of the search, half for weights and half for the mix; all for the training after it.
        stages: epochs of the sparse search; the dense one has as many in all.
        epochs: of training the architecture, pruned gradually.
        sparsity: of the search's last stage and of the pruning.
        width: of maps after the search; a search has 8.
    """

    seeds: int = 3
    images: int = 2000
    stages: tuple[int, int, int] = (3, 1, 3)
    epochs: int = 10
    sparsity: float = 0.9
    width: int = 24


@cache
def images_of(first: int, last: int) -> Images:
    """CIFAR-10's true pixels, some of the training images."""
    found = load_images("cifar10-true")
    return dataclasses.replace(found, train=found.train.take(torch.arange(first, last)))


def job_of(options: DassOptions, first: int, last: int, epochs: int, seed: int) -> Job:
    """Training on some images."""
    return image_job(images_of(first, last), Recipe(epochs=epochs, lr=0.05, batch=64), seed)


def measure(make: Any, options: DassOptions, case: Row, cells: CellCache) -> Row:
    """Accuracy of the architecture after its own training and pruning, and what the search took."""
    seed, half, start = case["seed"], options.images // 2, time.process_time()
    if make == "random":
        genotype = random_genotype(seed)
    else:
        stages = options.stages if make == "sparse" else (sum(options.stages), 0, 0)
        jobs = [job_of(options, first, first + half, 1, seed) for first in (0, half)]
        genotype, _ = DASS(options.sparsity, stages).search(*jobs)
    spent = time.process_time() - start
    with seeded(seed):
        model = CellNet(options.width, genotype=genotype)
    job = job_of(options, 0, options.images, options.epochs, seed)
    train_gradually(model, job, options.sparsity)
    data = images_of(0, options.images)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "accuracy": accuracy(model.eval(), data, data.test),
        "seconds": spent,
        "parameters": parameters,
        **counted(genotype),
    }


def cases(options: DassOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        yield from ({"arm": arm, "level": "pruned", "seed": seed} for arm in ARMS)


def runs(view: View) -> Plot:
    """Accuracy by the parameters that the architecture has before pruning."""
    series = [
        Series(arm, view.values(arm, None, Value("parameters", 1.0)), view.values(arm), kind="points")
        for arm in view.arms()
    ]
    return Plot("runs", "Every architecture", "parameters before pruning", "accuracy (%)", series, "Points.")


ARMS = {SPARSE: Arm("sparse"), DENSE: Arm("dense", control=DRAWN), DRAWN: Arm("random")}
STUDY = Study(
    "dass",
    "Architecture search with sparse operations",
    "Hamid Mousavi, Mohammad Loni, Mina Alibeigi, Masoud Daneshtalab: DASS: Differentiable Architecture "
    "Search for Sparse Neural Networks, 2023",
    DassOptions,
    ARMS,
    cases,
    measure,
    papers=(7,),
    claims=[
        above(SPARSE, DENSE, published="81.4 against 73.4 for MobileNet-v2 at 99 % zeros"),
        above(SPARSE, DRAWN),
    ],
    data=lambda options, case: [
        images_of(0, options.images).train.images,
        images_of(0, options.images).test.images,
    ],
    tables=[
        Columns(
            "Architectures after equal training and pruning",
            {
                "accuracy, %": Value(),
                "seconds of search": Value("seconds", 1.0, 0),
                "parameters": Value("parameters", 1.0, 0),
                **{f"{name}, of 8 edges": mean_of(name, "{:.1f}") for name in OPERATIONS[1:]},
            },
        )
    ],
    plots=[runs],
    notes=lambda options: [
        f"CIFAR-10's true pixels: {options.images} training images, 932 to test. Searches of "
        f"{sum(options.stages)} epochs at width 8 with half of the images for the mix; then {options.epochs} "
        f"epochs at width {options.width}, pruned to {100 * options.sparsity:g} % zeros on the way. "
        "First-order steps; nothing was tuned.",
        "Searches of minutes hardly move the mix: a tie is what to expect.",
    ],
)
