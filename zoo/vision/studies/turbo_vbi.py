"""`zoo reproduce turbo-vbi`: is the support of a Bayesian compression clustered, and does that save bytes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.methods.contract import default_recipe
from zoo.methods.turbo_vbi import TurboVBI
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.pruning.choose import magnitude_masks
from zoo.shared.pruning.inventory import prunable_parameters
from zoo.shared.store.formats import save_packed
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves
from zoo.studies.study import Arm, Study, Tuned, above, grid
from zoo.studies.view import Row, Value
from zoo.vision.data import accuracy
from zoo.vision.models import MLP
from zoo.vision.studies import common
from zoo.vision.studies.small import SmallOptions

OURS, ALONE, LASSO, MAGNITUDE = "Turbo-VBI", "VBI, independent support", "group lasso", "magnitude"
RANDOM, LATE = "random mask", "random mask, cut as late"
TUNING = 1000
Chance = Literal["no", "first", "late"]


@dataclass(frozen=True)
class TurboOptions(SmallOptions):
    """Options.

    Args:
        levels: shares of zeros.
        epochs: of every arm, a third of them after the cut.
        weights: of the group lasso, of which the best on validation images is taken.
    """

    levels: tuple[float, ...] = (0.9, 0.95)
    epochs: int = 30
    weights: tuple[float, ...] = (1e-4, 3e-4, 1e-3)

    def mlp(self) -> MLP:
        """Two hidden layers, of 128 and 64 units."""
        return MLP(int(self.images().train.images[0].numel()), (128, 64))


def measure(make: Any, options: TurboOptions, case: Row, cells: CellCache) -> Row:
    """Accuracy, clusters of the support, and bytes in the zoo's format."""
    seed, level, images = case["seed"], case["level"], options.images()
    recipe = Recipe(**{**default_recipe(TurboVBI), "epochs": options.epochs})
    job = options.job(recipe, seed)
    if isinstance(make, TurboVBI):
        found: nn.Module = replace(make, sparsity=level).sparsify(options.mlp(), job).model
    elif case["arm"] == LASSO:

        def tried(weight: float) -> float:
            key = STUDY.key(options, {**case, "seed": TUNING}) | {"weight": weight}
            held = options.job(recipe, TUNING)
            return float(
                cells.cell(key, lambda: accuracy(lasso(options, held, level, weight), images, images.val))
            )

        found = lasso(options, job, level, max(options.weights, key=tried))
    else:
        found = lasso(options, job, level, 0.0, make or "no")
    masks = masks_of(found)
    assert masks is not None
    return {
        "accuracy": accuracy(found, images, images.test),
        **clusters(masks),
        "bytes": encoded(found, masks),
    }


def lasso(options: TurboOptions, job: Any, level: float, weight: float, chance: Chance = "no") -> nn.Module:
    """Train with a group lasso on rows and columns, cut the smallest weights, train on; or cut by chance,
    then or before the first step."""
    model = reinitialised(options.mlp(), job.seed)
    weights = [model.get_parameter(name) for name in prunable_parameters(model)]

    def penalty() -> Tensor:
        norms = [w.norm(dim=d).sum() * w.shape[d] ** 0.5 for w in weights for d in (0, 1)]
        return weight * torch.stack(norms).sum()

    fit = job.fit(model, penalty=penalty if weight else None)
    if chance != "first":
        fit.run(until_step=fit.steps * 2 // 3)
    masks = magnitude_masks(model, level)
    if chance != "no":
        generator = torch.Generator().manual_seed(job.seed)
        order = {n: torch.randperm(m.numel, generator=generator) for n, m in masks.items()}
        masks = MaskSet({n: m.keep.flatten()[order[n]].view(m.shape) for n, m in masks.items()})
    fit.penalty = None
    with masks.attach(model, fit.optimizer):
        fit.run()
    return model.eval()


def clusters(masks: MaskSet) -> Row:
    """Boundaries of runs along rows over kept weights, and the share of rows and columns without any."""
    edges = kept = empty = lines = 0
    for mask in masks.values():
        keep = mask.keep.flatten(1)
        padded = torch.nn.functional.pad(keep.int(), (1, 1))
        edges += int(padded.diff(dim=1).abs().sum())
        kept += mask.kept
        empty += int((~keep.any(0)).sum() + (~keep.any(1)).sum())
        lines += sum(keep.shape)
    return {"edges": edges / kept, "empty": empty / lines}


def encoded(model: nn.Module, masks: MaskSet) -> int:
    """Bytes of the kept values in half precision and of the index, as the packed format stores them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        save_packed(file, {k: v.half().contiguous() for k, v in model.state_dict().items()}, masks)
        return file.stat().st_size


BYTES = Value("bytes", 1e-3, 1, "in ln bytes", 3, lower=True, log=True)
EDGES = Value("edges", 1.0, 2, "in ln", 3, lower=True, log=True)
EMPTY = Value("empty", 100.0, 1)
ARMS = {
    OURS: Arm(TurboVBI(), control=RANDOM),
    ALONE: Arm(TurboVBI(clustered=False)),
    LASSO: Arm(control=RANDOM, tuned=Tuned("weight", "validation images, another seed", "weights")),
    MAGNITUDE: Arm(control=LATE),
    RANDOM: Arm("first"),
    LATE: Arm("late"),
}
STUDY = Study(
    "turbo-vbi",
    "Turbo-VBI: Bayesian compression with clustered support",
    "Xia, Tsang and Lau, IEEE Transactions on Signal Processing 71 (2023), arXiv 2302.10483",
    TurboOptions,
    ARMS,
    lambda options: grid(ARMS, options.levels, options.seeds),
    measure,
    papers=(40,),
    claims=[
        above(OURS, RANDOM),
        above(OURS, ALONE, -0.5),
        above(OURS, ALONE, 0.05, "more regular (abstract)", value=EDGES),
        above(OURS, ALONE, 5.0, "more regular (abstract)", value=EMPTY),
        *(
            claim
            for other in (LASSO, MAGNITUDE)
            for claim in (
                above(OURS, other, -0.5, "better accuracy (abstract)"),
                above(OURS, other, 0.0, "better compression (abstract)", value=BYTES),
            )
        ),
    ],
    data=lambda options, where: common.content(options.images()),
    tables=[
        Columns(
            "Compression with equal zeros",
            {
                "accuracy (%)": Value(),
                "run boundaries per kept weight": EDGES,
                "empty rows and columns (%)": EMPTY,
                "kB": BYTES,
            },
            "kB: the file in the zoo's packed format, values in half precision.",
            levels=lambda view: view.levels(),
            heading="zeros",
        )
    ],
    plots=[
        Curves(
            "size",
            "Accuracy against bytes in the packed format",
            "kB",
            "test accuracy (%)",
            x=Value("bytes", 1e-3),
            points=True,
            alt="A point per arm and level.",
        )
    ],
    notes=lambda options: [
        f"{options.dataset} at half its size, {options.train_images:,} training images, a perceptron of 128 "
        f"and 64 hidden units, {options.epochs} epochs of Adam for every arm, cut after two thirds of them "
        "to the same share of zeros by one threshold of all layers. Chances and variances of the prior are "
        "the method's defaults, which were set on other data; nothing was tuned here for it.",
        "The random mask stands from the first step, the others are cut after two thirds of them: at 95 % "
        "ten epochs after the cut are too few for magnitudes, which end below that mask. What their choice "
        "is worth is told by a mask that is drawn as late, which is their arm of chance.",
    ],
)
