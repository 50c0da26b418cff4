"""`zoo reproduce ofb`: sizes and importance of a vision transformer in one search, in two stages, and not
at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zoo.shared.measure.account import count
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.digests import code_digest
from zoo.studies.figures import Columns, Curves
from zoo.studies.options import StudyOptions
from zoo.studies.study import BAR, Arm, Claim, Study, above
from zoo.studies.view import Row, Value
from zoo.vision.data import Images, accuracy, load_images
from zoo.vision.domain import image_job
from zoo.vision.methods.ofb import OFB
from zoo.vision.models import ViT

BOTH, TWO, UNIFORM, DENSE = "one search", "sizes after importance", "the same share everywhere", "dense"


@dataclass(frozen=True)
class SearchOptions(StudyOptions):
    """Options of the experiment.

    Args:
        seeds: how many, from 0.
        images: to train on.
        dense: epochs of the dense network.
        search: epochs of the search.
        tuning: epochs after the cut.
    """

    seeds: int = 3
    images: int = 2000
    dense: int = 10
    search: int = 5
    tuning: int = 3


@cache
def images_of(limit: int) -> Images:
    """CIFAR-10's true pixels, some of the training images."""
    return load_images("cifar10-true").subset(limit)


def recipe_of(epochs: int) -> Recipe:
    """AdamW, the same for every arm."""
    return Recipe(epochs=epochs, lr=1.5e-3, batch=64, optimizer="adamw", weight_decay=0.01, decay="cosine")


def fresh() -> ViT:
    """A small vision transformer for 32 pixels."""
    return ViT(size=32, patch=8, dim=48, depth=3, heads=4, hidden=96, classes=10, channels=3)


def trained(options: SearchOptions, seed: int, cells: CellCache) -> ViT:
    """The dense network of a seed, trained once."""
    key = {
        "study": "ofb",
        "cell": DENSE,
        "images": options.images,
        "epochs": options.dense,
        "seed": seed,
        "code": code_digest(trained),
    }

    def compute() -> tuple[None, dict[str, Tensor]]:
        with seeded(seed):
            model = fresh()
        job = image_job(images_of(options.images), recipe_of(options.dense), seed)
        job.fit(model, macs=lambda: 0.0).run()
        return None, dict(model.state_dict())

    made = fresh()
    made.load_state_dict(cells.tensors(key, compute)[1])
    return made


def measure(make: Any, options: SearchOptions, case: Row, cells: CellCache) -> Row:
    """Accuracy after search, cut and tuning; multiply-adds and milliseconds of what is left."""
    data, model = images_of(options.images), trained(options, case["seed"], cells)
    job = image_job(data, recipe_of(options.search + options.tuning), case["seed"])
    if make is None:
        job.fit(model, macs=lambda: 0.0).run()
        made: Any = model.eval()
    else:
        made = (
            OFB(sparsity=0.5, budget="macs", sparse_epochs=options.search, by=make).sparsify(model, job).model
        )
    some, spent = data.normalised(data.test.images[:128]), []
    with torch.no_grad():
        macs = count(made, (some[:2],)).total.macs / 2
        for _ in range(6):
            start = time.process_time()
            made(some)
            spent.append(time.process_time() - start)
    return {"accuracy": accuracy(made, data, data.test), "macs": macs, "ms": 1000 * min(spent)}


def cases(options: SearchOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        yield from ({"arm": arm, "level": "half", "seed": seed} for arm in ARMS)


ARMS = {BOTH: Arm("both"), TWO: Arm("sizes"), UNIFORM: Arm("uniform"), DENSE: Arm()}
TIME, MACS = Value("ms", 1.0, 1, "ms", 2, lower=True), Value("macs", 1e-6, 2)
STUDY = Study(
    "ofb",
    "Importance and sizes of a vision transformer in one search",
    "Hancheng Ye, Chong Yu, Peng Ye, Renqiu Xia, Yansong Tang, Jiwen Lu, Tao Chen, Bo Zhang: Once for Both: "
    "Single Stage of Importance and Sparsity Search for Vision Transformer Compression, CVPR 2024",
    SearchOptions,
    ARMS,
    cases,
    measure,
    papers=(30,),
    claims=[
        above(BOTH, TWO, published="above two-stage searches"),
        above(BOTH, UNIFORM),
        above(BOTH, DENSE, -2.0),
        Claim("the cut network is faster than the dense one", BAR, BOTH, DENSE, value=TIME),
    ],
    data=lambda options, case: [
        images_of(options.images).train.images,
        images_of(options.images).test.images,
    ],
    tables=[
        Columns(
            "Half of the multiply-adds of hidden units and heads",
            {"accuracy, %": Value(), "million multiply-adds": MACS, "ms of 128 images": TIME},
        )
    ],
    plots=[
        Curves(
            "accuracy",
            "Accuracy by multiply-adds",
            "million multiply-adds",
            "accuracy (%)",
            x=MACS,
            levels=("half",),
            points=True,
        )
    ],
    notes=lambda options: [
        f"CIFAR-10's true pixels, {options.images} training images, 932 to test; a ViT of 3 blocks of width "
        f"48. All arms start from one network of {options.dense} epochs; {options.search} of search and "
        f"{options.tuning} after the cut, or as many of plain training. The budget is of the layers that "
        "make units. Nothing was tuned.",
    ],
)
