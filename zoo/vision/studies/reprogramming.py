"""`zoo reproduce reprogramming`: lottery tickets of CIFAR-10 that are to tell digits apart, frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zoo.methods.reprogramming import Probe, Prompt, calibration_error, train_probe, train_prompt
from zoo.shared.masks import masks_of
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.relatives import copied, reinitialised
from zoo.shared.train import Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves
from zoo.studies.study import BAR, Arm, Claim, Study, above
from zoo.studies.view import Row, Rows, Value
from zoo.vision.data import accuracy
from zoo.vision.studies import common
from zoo.vision.studies.small import SmallOptions

SOURCE, PROBE, PROMPT, FRESH = "source", "linear probe", "visual prompt", "visual prompt, untrained source"
FALLS = {PROBE: "loss of tickets, linear probe", PROMPT: "loss of tickets, visual prompt"}
FEW, FULL = "ten of each class", "all"
SIDE = 16


@dataclass(frozen=True)
class ReprogramOptions(SmallOptions):
    """Options.

    Args:
        levels: shares of zeros of the tickets, rising.
        epochs: of each training of the source.
        steps: of probes and prompts.
        classes: of digits.
    """

    dataset: str = "cifar10-jpeg"
    train_images: int = 1500
    test_images: int = 1000
    levels: tuple[float, ...] = (0.36, 0.59, 0.83, 0.93)
    epochs: int = 10
    steps: int = 120
    classes: int = 6


def tickets(options: ReprogramOptions, seed: int) -> Iterator[tuple[float, nn.Module]]:
    """The dense source and its tickets: trained, cut, put back to the weights of the first epoch, again."""
    job = options.job(Recipe(options.epochs, 0.1, 64), seed)
    model = reinitialised(options.model(), seed)
    fit = job.fit(model)
    fit.run(until=1)
    early = {name: value.clone() for name, value in model.state_dict().items()}
    fit.run()
    yield 0.0, copied(model).eval()
    for level in options.levels:
        masks = sparsify(model, sparsity=level)
        model.load_state_dict(early)
        fit = job.fit(model)
        fit.epoch = 1
        with masks.attach(model, fit.optimizer):
            fit.run()
        yield level, copied(model).eval()


def target(options: ReprogramOptions, shots: str, seed: int) -> tuple[Tensor, ...]:
    """Digits in [0, 1] with three channels, and their classes: of training and of testing."""
    images = common.digits()
    parts = []
    for split in (images.train, images.test):
        keep = split.labels < options.classes
        parts += [split.images[keep].float().expand(-1, 3, -1, -1) / images.scale, split.labels[keep]]
    if shots == FEW:
        order = torch.randperm(len(parts[1]), generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([order[parts[1][order] == c][:10] for c in range(options.classes)])
        parts[:2] = [parts[0][rows], parts[1][rows]]
    return tuple(parts)


def measure(make: Any, options: ReprogramOptions, case: Row, cells: CellCache) -> list[Row]:
    """All tickets of a seed, probed and prompted, with few and all images."""
    images, seed, rows = options.images(), case["seed"], list[Row]()
    mean, std = torch.tensor(images.mean), torch.tensor(images.std)
    recipe = Recipe(lr=0.01, batch=60, weight_decay=0.0, optimizer="adam", steps=options.steps)

    def prompted(net: nn.Module, parts: tuple[Tensor, ...], job: Job) -> Row:
        made = train_prompt(Prompt(net, SIDE, 3, mean, std, options.classes), parts[0], parts[1], job)
        return _judged(made(parts[2]), parts[3])

    sources = list(tickets(options, seed))
    untrained = reinitialised(options.model(), seed + 500).eval()
    for shots in (FEW, FULL):
        parts = target(options, shots, seed)
        data = DataLoader(TensorDataset(*parts[:2]), recipe.batch, shuffle=True, drop_last=True)
        job = Job(data, recipe=recipe, seed=seed)
        framed = [torch.nn.functional.pad(x, (4,) * 4, value=0.5) for x in (parts[0], parts[2])]
        framed = [(x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1) for x in framed]
        loader = DataLoader(TensorDataset(framed[0], parts[1]), recipe.batch, shuffle=True, drop_last=True)
        where = {"shots": shots, "seed": seed}
        rows.append({**where, "arm": FRESH, "level": 0.0, **prompted(untrained, parts, job)})
        for level, net in sources:
            masks = masks_of(net)
            probe = train_probe(Probe(net, options.classes, seed), replace(job, batches=loader))
            rows.append({**where, "arm": PROBE, "level": level, **_judged(probe(framed[1]), parts[3])})
            rows.append({**where, "arm": PROMPT, "level": level, **prompted(net, parts, job)})
            assert masks is None or not masks.lost_zeros(net)
            upstream = accuracy(net, images, images.test)
            rows.append({**where, "arm": SOURCE, "level": level, "accuracy": upstream})
    return rows


def _judged(logits: Tensor, labels: Tensor) -> Row:
    logits = logits.detach()
    right = float((logits.argmax(1) == labels).double().mean())
    return {"accuracy": right, "ece": calibration_error(logits, labels)}


def with_falls(rows: Rows, options: ReprogramOptions) -> Rows:
    """The rows, and by seed how much less accurate and less well calibrated tickets are in the mean than the
    dense source, and how much accuracy falls over the tickets with a tenth more zeros."""
    more = []
    for shots in (FEW, FULL):
        for arm, name in FALLS.items():
            for seed in sorted({row["seed"] for row in rows}):
                own = [r for r in rows if (r["arm"], r["seed"], r["shots"]) == (arm, seed, shots)]
                dense = next((r for r in own if r["level"] == 0.0), None)
                if dense is None:
                    continue
                cut = [r for r in own if r["level"] > 0.0]
                fall = {
                    k: fmean(sign * (dense[k] - r[k]) for r in cut)
                    for k, sign in (("accuracy", 1), ("ece", -1))
                }
                x, y = [r["level"] for r in cut], [r["accuracy"] for r in cut]
                slope = sum((a - fmean(x)) * (b - fmean(y)) for a, b in zip(x, y, strict=True))
                fall["slope"] = -0.1 * slope / sum((a - fmean(x)) ** 2 for a in x)
                more.append({"shots": shots, "arm": name, "level": "mean", "seed": seed, **fall})
    return [*rows, *more]


ECE, SLOPE = Value("ece"), Value("slope", decimals=2)
ARMS = {
    SOURCE: Arm(),
    PROBE: Arm(),
    PROMPT: Arm(control=FRESH),
    FRESH: Arm(),
    **{name: Arm() for name in FALLS.values()},
}
STUDY = Study(
    "reprogramming",
    "Lottery tickets, frozen, by a linear probe and by a visual prompt",
    "Stefanski et al., 2023, arXiv 2308.14969; ILM-VP: Chen et al., CVPR 2023",
    ReprogramOptions,
    ARMS,
    lambda options: ({"arm": "all", "level": 0.0, "seed": seed} for seed in range(options.seeds)),
    measure,
    papers=(51,),
    by=("shots",),
    titles={FEW: "ten images of each class", FULL: "all images"},
    prepare=with_falls,
    claims=[
        Claim(
            "{where}: tickets are below dense under prompts", "far below on some (abstract)", FALLS[PROMPT]
        ),
        Claim("{where}: they lose more under prompts than under probes", BAR, FALLS[PROMPT], FALLS[PROBE]),
        Claim(
            "{where}: accuracy under prompts falls with zeros, a tenth more", BAR, FALLS[PROMPT], value=SLOPE
        ),
        Claim(
            "{where}: dense is better calibrated under probes", "always (abstract)", FALLS[PROBE], value=ECE
        ),
        Claim(
            "{where}: dense is better calibrated under prompts", "always (abstract)", FALLS[PROMPT], value=ECE
        ),
        above(PROMPT, FRESH, 0.0, at=(0.0,)),
    ],
    data=lambda options, where: [*common.content(options.images()), *common.content(common.digits())],
    tables=[
        Columns(
            "Digits by a frozen network, {where}",
            {"accuracy (%)": Value(), "calibration error (%)": ECE},
            "Of the source: accuracy on its own test images. Losses of tickets: dense minus their mean "
            "accuracy, and their mean calibration error minus dense.",
            levels=lambda view: view.levels(),
            heading="zeros",
        )
    ],
    plots=[
        Curves(
            "accuracy-{slug}",
            "Accuracy of frozen tickets, {where}",
            "zeros (%)",
            "accuracy (%)",
            [SOURCE, PROBE, PROMPT],
        ),
        Curves(
            "calibration-{slug}",
            "Calibration error of frozen tickets, {where}",
            "zeros (%)",
            "expected calibration error (%)",
            [PROBE, PROMPT],
            value=ECE,
        ),
    ],
    notes=lambda options: [
        f"Source: three convolutions on {options.dataset} at 16x16, {options.train_images:,} training "
        f"images, {options.epochs} epochs; tickets by magnitude of all layers, put back to the first epoch's "
        f"weights and trained again. Target: the first {options.classes} digits of scikit-learn, 8x8, in a "
        f"frame of {SIDE} pixels, grey under the probe; {options.steps} steps of Adam for both; the last "
        "step counts, nothing was tuned.",
    ],
)
