"""`zoo reproduce structured-pruning`: channels of the published ResNet-20 removed at an equal budget of work.

Every arm starts from the same weights, trains as long before the cut and as long after it, and is left with
the same share of the multiply-adds. An arm with a penalty is run with each of a grid; what it
is judged by is the penalty with the best validation accuracy right after the cut, over seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.methods.channels import Budget, ChannelMethod, Units, mask_again
from zoo.methods.mask_sparsity import MaskSparsity
from zoo.methods.sparse_ift import forward_macs
from zoo.methods.wgsef import ROLES, WGSEF
from zoo.shared.pruning.budgets import check_sparsity
from zoo.shared.structure.groups import GroupMap
from zoo.shared.structure.relatives import copied
from zoo.shared.train import Fit, Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns
from zoo.studies.options import StudyOptions
from zoo.studies.study import Arm, Study, Tuned, above
from zoo.studies.tuning import at_best
from zoo.studies.view import Row, Value, View
from zoo.vision.data import Images, Split, accuracy, load_images
from zoo.vision.domain import image_job
from zoo.vision.models import pretrained_resnet
from zoo.vision.studies.common import content


@dataclass
class RandomChannels(ChannelMethod):
    """The control: channels drawn at random, after as much training."""

    seed: int = 0

    def sparse_stage(self, model: nn.Module, groups: GroupMap, budget: Budget, job: Job) -> Fit:
        return job.fit(model).run(mask_again(model), until=self.sparse_epochs)

    def scores(self, model: nn.Module, groups: GroupMap, budget: Budget) -> Units:
        generator = torch.Generator().manual_seed(self.seed)
        return {name: torch.rand(family.units, generator=generator) for name, family in groups.items()}


@dataclass
class GroupLasso(ChannelMethod):
    """Group lasso over the same channels: its subgradient in the loss, ranked like WGSEF."""

    penalty: float = 1e-3

    def sparse_stage(self, model: nn.Module, groups: GroupMap, budget: Budget, job: Job) -> Fit:
        fit = job.fit(model, penalty=lambda: self.penalty * groups.penalty(model, ROLES))
        fit.run(mask_again(model), until=self.sparse_epochs)
        fit.penalty = None
        return fit

    scores = WGSEF.scores


@dataclass(frozen=True)
class StructuredOptions(StudyOptions):
    """Options.

    Args:
        levels: shares of the network's multiply-adds to be removed.
        wgsef: penalties that are tried for WGSEF.
        lasso: those for group lasso.
        scales: those for L1 on norm scales, all or the marked ones.
        sparse_epochs: epochs before the cut.
        epochs: epochs before and after it together.
        lr: peak learning rate.
        batch: images of a step.
        train_images: the first so many training images; 0 for all.
        test_images: the first so many test images; 0 for all.
    """

    may_be_none: ClassVar[tuple[str, ...]] = ("train_images", "test_images")
    levels: tuple[float, ...] = (0.5,)
    wgsef: tuple[float, ...] = (0.03, 0.1, 0.3)
    lasso: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    scales: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    sparse_epochs: int = 2
    epochs: int = 3
    lr: float = 0.05
    batch: int = 64
    train_images: int = 3200
    test_images: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for level in self.levels:
            check_sparsity(level)
        if min((*self.wgsef, *self.lasso, *self.scales)) <= 0:
            raise ConfigError("penalties are positive; without one an arm is there already")
        if self.sparse_epochs >= self.epochs:
            raise ConfigError(
                f"leave an epoch after the cut; received {self.sparse_epochs} of {self.epochs} epochs"
            )

    def images(self) -> Images:
        """True pixels of CIFAR-10."""
        data = load_images("cifar10-true")
        if self.train_images:
            data = data.subset(self.train_images)
        if self.test_images:
            test = Split(data.test.images[: self.test_images], data.test.labels[: self.test_images])
            data = Images(**{**vars(data), "test": test})
        return data


def measure(make: Any, options: StructuredOptions, case: Row, cells: CellCache) -> Row:
    """Accuracy on validation and test images right after the cut and at the end; what the network still
    costs. A penalty that empties a layer is told as chance: nothing is left to measure."""
    images, model = options.images(), pretrained_resnet()
    job = image_job(images, Recipe(options.epochs, options.lr, options.batch), case["seed"])
    given = {} if case["penalty"] is None else {"penalty": case["penalty"]}
    if make is RandomChannels:
        given["seed"] = case["seed"]
    method = make(case["level"], budget="macs", sparse_epochs=options.sparse_epochs, **given)
    made = copied(model)
    whole = forward_macs(model, job.batches.example())
    try:
        fit = method.cut(made, job)[0]
    except ConfigError:
        chance = 1 / (1 + int(images.test.labels.max()))
        return {"validation": chance, "cut": chance, "tuned": chance, "macs": 0.0, "weights": 0.0}
    found = {"validation": accuracy(made, images, images.val), "cut": accuracy(made, images, images.test)}
    fit.run(mask_again(made))
    return {
        **found,
        "tuned": accuracy(made, images, images.test),
        "macs": forward_macs(made, job.batches.example()) / whole,
        "weights": sum(p.numel() for p in made.parameters()) / sum(p.numel() for p in model.parameters()),
    }


def cases(options: StructuredOptions) -> Iterator[Row]:
    """Each arm with each penalty of its grid, every seed before the next."""
    for seed in range(options.seeds):
        for level in options.levels:
            for name, arm in ARMS.items():
                grid = getattr(options, str(arm.tuned.grid)) if arm.tuned else (None,)
                for penalty in grid:
                    yield {"arm": name, "level": level, "seed": seed, "penalty": penalty}


def _penalty(view: View, arm: str, level: Any) -> str:
    chosen = {row["penalty"] for row in view.chosen(arm, level)} - {None}
    return ", ".join(f"{one:g}" for one in sorted(chosen)) or "-"


def protocol(options: StructuredOptions) -> str:
    """What was trained on what, in a sentence."""
    count = f"{options.train_images:,}" if options.train_images else "all"
    return (
        f"CIFAR-10 (true pixels): the published ResNet-20 (91.6 % on the 932 test images), {count} training "
        f"images, {options.sparse_epochs} epochs before the cut and {options.epochs - options.sparse_epochs} "
        f"after it, peak rate {options.lr:g}, batch {options.batch}, {options.seeds} seeds. The validation "
        "images that choose penalties were seen by whoever trained the network; the test images were not."
    )


CUT, TUNED, CHANCE = Value("cut"), Value("tuned"), "random channels"
_ON = "validation images"
ARMS = {
    CHANCE: Arm(RandomChannels),
    "weight norms": Arm(partial(WGSEF, penalty=0.0), control=CHANCE),
    "norm scales": Arm(partial(MaskSparsity, regularise="none"), control=CHANCE),
    "group lasso": Arm(GroupLasso, control=CHANCE, tuned=Tuned("penalty", _ON, "lasso")),
    "WGSEF": Arm(WGSEF, tuned=Tuned("penalty", _ON, "wgsef")),
    "MaskSparsity": Arm(MaskSparsity, tuned=Tuned("penalty", _ON, "scales")),
    "L1 on all scales": Arm(
        partial(MaskSparsity, regularise="all"), control=CHANCE, tuned=Tuned("penalty", _ON, "scales")
    ),
}
_WGSEF: dict[str, Any] = {"papers": (17,), "value": CUT}
_MASK: dict[str, Any] = {"papers": (8,), "value": CUT}
STUDY = Study(
    "structured-pruning",
    "Channels of ResNet-20 removed at an equal budget: penalties before the cut",
    "Jiang et al., Pattern Recognition 2023 (MaskSparsity); the group envelope with a chosen budget (WGSEF)",
    StructuredOptions,
    ARMS,
    cases,
    measure,
    papers=(8, 17),
    claims=[
        above("WGSEF", "weight norms", 5.0, "not stated; right after the cut", **_WGSEF),
        above("WGSEF", "group lasso", 1.0, "not stated; right after the cut", **_WGSEF),
        above("WGSEF", "weight norms", -0.3, "negligible loss; fine-tuned", papers=(17,)),
        above("WGSEF", CHANCE, 1.0, "not stated; fine-tuned", papers=(17,)),
        above("MaskSparsity", "L1 on all scales", 1.0, "above; right after the cut", **_MASK),
        above("MaskSparsity", "norm scales", 5.0, "above; right after the cut", **_MASK),
        above("MaskSparsity", "L1 on all scales", published="above; fine-tuned", papers=(8,)),
        above("MaskSparsity", "weight norms", 1.0, "not stated; right after the cut", **_MASK),
        above("MaskSparsity", "weight norms", published="not stated; fine-tuned", papers=(8,)),
        above("MaskSparsity", CHANCE, 1.0, "not stated; fine-tuned", papers=(8,)),
    ],
    value=TUNED,
    varies=("seeds", "levels", "wgsef", "lasso", "scales"),
    data=lambda options, where: content(options.images()),
    prepare=lambda rows, options: at_best(rows, "penalty"),
    tables=[
        Columns(
            "Accuracy (%) and what is left",
            {
                "penalty": _penalty,
                "right after the cut": CUT,
                "fine-tuned": TUNED,
                "multiply-adds left": Value("macs"),
                "weights left": Value("weights"),
            },
            lambda view: protocol(view.options),
            levels=lambda view: view.options.levels,
            heading="removed",
        ),
    ],
    notes=lambda options: [
        protocol(options),
        "Accuracy is that of the test images in percent, mean ± sample standard deviation over seeds. What "
        "is left counts the whole network, in percent.",
        "The two claims against weight norms were added when both arms that rank by scales without a marked "
        "penalty had turned out below random channels, which makes them no controls: scales that no mask "
        "shaped do not tell here which channels matter, with any penalty of the grid.",
    ],
)
