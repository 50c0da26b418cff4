"""`zoo reproduce unlearning`: how far five ways to forget are from training again, dense and pruned first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zoo.methods.training import train_held
from zoo.methods.unlearning import Part, Unlearning, Way, figures
from zoo.shared.pruning.inventory import prunable_parameters
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.relatives import copied, reinitialised
from zoo.shared.train import Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, mean_of
from zoo.studies.study import Arm, Study, Tuned, above
from zoo.studies.tables import Plot, Series
from zoo.studies.verdict import deviation
from zoo.studies.view import Row, Value, View
from zoo.vision.models import ConvNet
from zoo.vision.studies import common
from zoo.vision.studies.small import SmallOptions, whole

CLASS, RANDOM = "one class", "a tenth at random"
RETRAIN, ALL, PRUNED = "trained again", "mean of the five", ", pruned first"
SHORT: dict[str, Way] = {"FT": "fine-tune", "GA": "ascend", "IU": "influence", "FF": "fisher"}
WAYS: dict[str, Way] = {**SHORT, "l1-sparse": "l1-sparse"}
SMALL = "FT at a tenth of the training's rate"
FIGURES = ("ua", "mia", "ra", "ta")
TUNING = 1000
RATE = 0.1  # of the trainings


@dataclass(frozen=True)
class UnlearningOptions(SmallOptions):
    """Options.

    Args:
        sparsity: of the convolutions that are pruned first.
        epochs: of the trainings.
        rewind: epoch whose weights come back after pruning.
        few: epochs of FT and l1-sparse; GA has half of them.
        rates: learning rates that are tried for FT; a tenth and a hundredth of them for GA.
        lengths: tried for the influence step.
        noises: variances tried for FF.
        weights: tried for the L1 norm.
    """

    dataset: str = "cifar10-jpeg"
    train_images: int = 800
    test_images: int = 600
    sparsity: float = 0.95
    epochs: int = 20
    rewind: int = 2
    few: int = 4
    rates: tuple[float, ...] = (0.02, 0.1)
    lengths: tuple[float, ...] = (0.01, 0.1)
    noises: tuple[float, ...] = (1e-8, 1e-7)
    weights: tuple[float, ...] = (1e-3, 5e-3)

    def model(self) -> ConvNet:
        """Three convolutions, with fresh weights."""
        return ConvNet((16, 32, 64), (2, 2, 1), channels=3 if self.dataset.startswith("cifar10") else 1)

    def tried(self, arm: str) -> tuple[float, ...]:
        """Strengths of a way."""
        rates = tuple(rate / 10 for rate in self.rates)
        found = {"FT": self.rates, "GA": rates, "IU": self.lengths, "FF": self.noises, SMALL: (RATE / 10,)}
        return found.get(arm, self.weights)


def measure(make: Any, options: UnlearningOptions, case: Row, cells: CellCache) -> list[Row]:
    """All ways on one network, each with the strength that was nearest to training again on another seed."""

    def tuned() -> dict[str, float]:
        found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in (*WAYS, SMALL)}
        for arm, strength, row in forgotten(options, {**case, "seed": TUNING}, None):
            if arm in found:
                found[arm].append((row["gap"], strength))
        return {arm: min(tries)[1] for arm, tries in found.items()}

    chosen = cells.cell(STUDY.key(options, {**case, "seed": TUNING}), tuned)
    mark = PRUNED if case["pruned"] else ""
    rows = [{**row, "arm": arm + mark, "strength": s} for arm, s, row in forgotten(options, case, chosen)]
    own = [row for row in rows if row["arm"].removesuffix(PRUNED) in WAYS]
    means = {name: fmean(row[name] for row in own) for name in ("gap", "ua_gap", "mia_gap", "seconds")}
    return [*rows, {**means, "arm": ALL + mark}]


def forgotten(
    options: UnlearningOptions, case: Row, chosen: dict[str, float] | None
) -> Iterator[tuple[str, float, Row]]:
    """Arm, strength, and figures: of training again, then of each way with the chosen strengths or all."""
    images, seed = options.images(), case["seed"]
    x, y = whole(images)
    held = whole(images, "val" if seed == TUNING else "test")
    gone = y == seed % 10 if case["what"] == CLASS else _tenth(len(y), seed)
    keep = ~torch.isin(held[1], y[gone].unique()) if case["what"] == CLASS else torch.ones(len(held[1])) > 0
    test = Part(held[0][keep], held[1][keep])
    parts = Part(x[gone], y[gone]), Part(x[~gone], y[~gone])
    test = Part(*(value[: len(parts[1].y)] for value in test))
    recipe = Recipe(options.epochs, RATE, 50)
    start: nn.Module = reinitialised(options.model(), seed)
    sparsity = options.sparsity if case["pruned"] else 0.0
    trained, start = learned(start, Part(x, y), recipe, seed, sparsity, options.rewind)
    clock = time.process_time()
    again, _ = fitted(start, parts[1], recipe, seed)
    target = figures(again, *parts, test)
    yield RETRAIN, 0.0, {**target, "gap": 0.0, "seconds": time.process_time() - clock}
    for arm, way in {**WAYS, SMALL: SHORT["FT"]}.items():
        few = options.few // 2 if way == "ascend" else options.few
        job = Job([(x[:1], y[:1])], recipe=replace(recipe, epochs=few, lr=options.rates[0]), seed=seed)
        for strength in options.tried(arm) if chosen is None else [chosen[arm]]:
            clock = time.process_time()
            made = Unlearning(way, strength).forget(trained, *parts, job)
            seconds = time.process_time() - clock
            found = figures(made, *parts, test)
            gaps = {name: abs(found[name] - target[name]) for name in FIGURES}
            more = {"ua_gap": gaps["ua"], "mia_gap": gaps["mia"], "gap": fmean(gaps.values())}
            yield arm, strength, {**found, **more, "seconds": seconds}


def learned(
    start: nn.Module, part: Part, recipe: Recipe, seed: int, sparsity: float, rewind: int
) -> tuple[nn.Module, nn.Module]:
    """A trained network, and what it started from; with a sparsity pruned by one-shot magnitude after a first
    training, whose weights of an early epoch come back."""
    trained, early = fitted(start, part, recipe, seed, rewind)
    if not sparsity:
        return trained, start
    masks = sparsify(trained, sparsity=sparsity, names=prunable_parameters(trained)[:-1])
    trained.load_state_dict(early)
    masks.attach(trained).detach()
    start = copied(trained)
    return fitted(start, part, recipe, seed)[0], start


def _tenth(count: int, seed: int) -> Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order < count // 10


def fitted(
    start: nn.Module, part: Part, recipe: Recipe, seed: int, rewind: int = 0
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy trained with its masks held, and its weights of an early epoch."""
    model = copied(start)
    data = DataLoader(TensorDataset(*part), recipe.batch, shuffle=True, drop_last=True)
    fit = Job(data, recipe=recipe, seed=seed).fit(model)
    train_held(fit, until=rewind)
    early = {name: value.clone() for name, value in model.state_dict().items()}
    train_held(fit)
    return model.eval(), early


def cases(options: UnlearningOptions) -> Iterator[Row]:
    """Both kinds of forgetting, dense and pruned."""
    for what in (CLASS, RANDOM):
        for pruned in (False, True):
            yield from (
                {"what": what, "pruned": pruned, "level": what, "seed": s} for s in range(options.seeds)
            )


def plot(view: View) -> Plot:
    """The mean gap of each way, dense and pruned first."""
    places = list(range(1, len(WAYS) + 1))
    series = []
    for label, mark in (("dense", ""), ("pruned first", PRUNED)):
        values = [view.values(arm + mark, None, GAP) for arm in WAYS]
        means = [view.mean(arm + mark, None, GAP) for arm in WAYS]
        series.append(Series(label, places, means, [deviation(v) for v in values], "points"))
    return Plot(
        f"gaps-{'class' if view.where['what'] == CLASS else 'random'}",
        f"Mean gap to training again, forgetting {view.title}",
        ", ".join(f"{place}: {arm}" for place, arm in zip(places, WAYS, strict=True)),
        "gap (points)",
        series,
        "A point per way to forget, for the dense network and for the one that was pruned first.",
    )


GAP, UA_GAP = Value("gap", lower=True), Value("ua_gap", lower=True)
TA = Value("ta")
TRIED = {"FT": "rates", "GA": "rates", "IU": "lengths", "FF": "noises", "l1-sparse": "weights"}
_tuned = {
    arm: Tuned(
        "learning rate" if arm in ("FT", "GA") else "strength", "validation images, another seed", TRIED[arm]
    )
    for arm in WAYS
}
ARMS = {
    arm + mark: Arm(tuned=_tuned.get(arm)) for mark in ("", PRUNED) for arm in (RETRAIN, *WAYS, SMALL, ALL)
}
STUDY = Study(
    "unlearning",
    "Unlearning by five ways, dense and after 95 % one-shot magnitude pruning",
    "Jia et al., NeurIPS 2023, arXiv 2304.04934",
    UnlearningOptions,
    ARMS,
    cases,
    measure,
    papers=(31,),
    by=("what",),
    claims=[
        above(SMALL + PRUNED, SMALL, 10.0, "UA 22.5 to 73.6 (paper)", value=UA_GAP, only={"what": CLASS}),
        above(ALL + PRUNED, ALL, 0.0, "the gap shrinks (abstract)", value=GAP),
        *(above(arm + PRUNED, arm, 0.0, "the gap shrinks (abstract)", value=GAP) for arm in WAYS),
        above("l1-sparse", SMALL, 0.0, "77 % more unlearned (abstract)", value=UA_GAP),
        above("FT", SMALL, 0.0, value=UA_GAP),
        above(RETRAIN + PRUNED, RETRAIN, -2.0, value=TA),
    ],
    data=lambda options, where: common.content(options.images()),
    tables=[
        Columns(
            "Forgetting {where}",
            {
                "UA (%)": Value("ua"),
                "MIA (%)": Value("mia"),
                "RA (%)": Value("ra"),
                "TA (%)": TA,
                "mean gap": GAP,
                "RTE (s)": mean_of("seconds", "{:.2f}"),
            },
            "UA: error on what is forgotten; MIA: share of it judged never seen; RA, TA: accuracy on what is "
            "kept and on test images; mean gap: of the four, to training again; RTE: processor seconds.",
        )
    ],
    plots=[plot],
    notes=lambda options: [
        f"{options.dataset}, {options.train_images} training images of 16x16 learned by heart in "
        f"{options.epochs} epochs; three convolutions; pruned: {options.sparsity:.0%} of all "
        f"convolutions' weights by one global threshold, weights of epoch {options.rewind} put back, trained "
        "again. The class that goes is that of the seed's number. Strengths are those with the smallest mean "
        "gap on another seed, whose test part are validation images: training again must be known for that, "
        "as in the paper.",
        "After a first look l1-sparse and fine-tuning at a chosen rate are compared with fine-tuning at a "
        "tenth of the rate, in place of each other.",
    ],
)
