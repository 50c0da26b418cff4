"""`zoo reproduce clip-sharpness`: the line from a dual encoder of all domains to one fine-tuned on one."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from zoo.methods.interpolation import barriers, between, check_ends, mended, placed, sharpness, stragglers
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Grid
from zoo.studies.study import BAR, Arm, Claim, Study, above
from zoo.studies.tables import Plot, Series
from zoo.studies.view import Row, Value, View
from zoo.vision.models import ViT
from zoo.vision.studies import common
from zoo.vision.studies.small import SmallOptions, whole

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DOMAINS = ("turned", "inverted", "noisy", "mirrored", "shifted")
PATH, MENDED, STRAGGLERS, WHOLE = "line", "line, stragglers pruned", "straggler layers", "whole network"
RANDOM = "line, random layers pruned"
LINES = (PATH, MENDED, RANDOM)
SCALE = 10.0  # of cosines


@dataclass(frozen=True)
class ClipOptions(SmallOptions):
    """Options.

    Args:
        epochs: of the encoder of all domains.
        tuning: epochs of fine-tuning on upright images.
        rates: learning rates of fine-tuning, each an end of a line.
        points: inner points of a line.
        layers: stragglers.
        sparsity: of their changes.
    """

    train_images: int = 1500
    test_images: int = 500
    epochs: int = 12
    tuning: int = 6
    rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    points: int = 5
    layers: int = 3
    sparsity: float = 0.5


class DualEncoder(nn.Module):
    """Images of 14x14 and the words of their classes in one space: logits are scaled cosines.

    Args:
        width: of the space.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.image = ViT(14, 7, 48, 3, 4, 96, width, 1)
        self.letters = nn.Embedding(27, 32)
        self.text = nn.Sequential(nn.Linear(160, 64), nn.ReLU(), nn.Linear(64, width))
        codes = [[ord(letter) - 96 for letter in word.ljust(5, "`")] for word in WORDS]
        self.words: Tensor
        self.register_buffer("words", torch.tensor(codes))

    def forward(self, images: Tensor) -> Tensor:
        """Cosines of images and all ten words, times ten."""
        pictures = functional.normalize(self.image(images), dim=1)
        words = functional.normalize(self.text(self.letters(self.words).flatten(1)), dim=1)
        return SCALE * pictures @ words.T


def changed(x: Tensor, domain: str) -> Tensor:
    """Images of another domain."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return {
        "upright": x,
        "turned": x.rot90(1, (2, 3)),
        "inverted": -x,
        "noisy": x + noise,
        "mirrored": x.flip(3),
        "shifted": x.roll((3, 3), (2, 3)),
    }[domain]


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float, seed: int) -> nn.Module:
    """The model itself, by Adam for the first encoder and SGD in fine-tuning."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    batches = [(x[rows], y[rows]) for rows in order.split(100)]
    first = {"optimizer": "adam", "lr": 1e-3} if not lr else {"lr": lr}
    Job(batches, recipe=Recipe(epochs=epochs, weight_decay=0.0, **first), seed=seed).fit(model).run()
    return model


def measure(make: Any, options: ClipOptions, case: Row, cells: CellCache) -> list[Row]:
    """All lines of a seed."""
    seed, rows = case["seed"], list[Row]()
    x, y = whole(options.images())
    held, labels = whole(options.images(), "test")
    everything = torch.cat([changed(x, d) for d in ("upright", *DOMAINS)])
    with seeded(seed):
        model: nn.Module = DualEncoder()
    first = trained(
        model, everything, y.repeat(1 + len(DOMAINS)), options.epochs // 2, 0.0, seed
    ).state_dict()
    first = {name: value.clone() for name, value in first.items()}
    layers = [n for n, p in model.named_parameters() if p.dim() == 2]
    seen = changed(x[:300], "upright"), y[:300]

    def loss(one: nn.Module) -> Tensor:
        return functional.cross_entropy(one(seen[0]), seen[1])

    def right(state: Any) -> tuple[float, float]:
        one = placed(model, state)
        with torch.no_grad():
            found = [
                (one(changed(held, d)).argmax(1) == labels).double().mean().item()
                for d in ("upright", *DOMAINS)
            ]
        return found[0], fmean(found[1:])

    shares = [i / (options.points + 1) for i in range(options.points + 2)]
    points: dict[str, list[float]] = {"ood": [], STRAGGLERS: [], WHOLE: []}
    generator = torch.Generator().manual_seed(seed)
    for rate in options.rates:
        last = trained(placed(model, first), x, y, options.tuning, rate, seed).state_dict()
        check_ends(model, first, last)
        behind = stragglers(barriers(model, first, last, layers, loss), options.layers)
        others = [
            layers[i] for i in torch.randperm(len(layers), generator=generator)[: options.layers].tolist()
        ]
        for arm, end in (
            (PATH, last),
            (MENDED, mended(first, last, behind, options.sparsity)),
            (RANDOM, mended(first, last, others, options.sparsity)),
        ):
            found = [right(between(first, end, a)) for a in shares]
            ood = [one[1] for one in found]
            row: Row = {
                "arm": arm,
                "level": f"rate {rate:g}",
                "id": found[-1][0],
                "ood": ood[-1],
                "curve": ood,
            }
            row["dip"] = min(ood[1:-1]) - min(ood[0], ood[-1])
            row["lowest"] = min(ood[1:-1])
            rows.append(row | ({"layers": behind} if arm == MENDED else {}))
            if arm == PATH:
                for share, value in list(zip(shares, ood, strict=True))[1:-1]:
                    inner = placed(model, between(first, end, share))
                    points["ood"].append(value)
                    points[STRAGGLERS].append(sharpness(inner, loss, names=behind))
                    points[WHOLE].append(sharpness(inner, loss))
    for arm in (STRAGGLERS, WHOLE):
        rho = float(spearmanr(points[arm], points["ood"]).statistic)
        rows.append({"arm": arm, "level": "all lines", "rho": rho})
    return [{**row, "seed": seed} for row in rows]


def plot(view: View) -> Plot:
    """Accuracy on other domains along the lines, in the mean over seeds."""
    series = []
    for level in [one for one in view.levels() if str(one).startswith("rate")]:
        curves = [row["curve"] for row in view.required(PATH, level)]
        shares = [i / (len(curves[0]) - 1) for i in range(len(curves[0]))]
        means = [100 * fmean(values) for values in zip(*curves, strict=True)]
        series.append(Series(str(level), shares, means))
    return Plot(
        "lines",
        "Accuracy on five other domains between zero-shot and fine-tuned",
        "share of the fine-tuned weights",
        "accuracy (%)",
        series,
        "One line per learning rate of fine-tuning, from the encoder of all domains to that of one.",
    )


DIP, RHO = Value("dip"), Value("rho", 1.0, 2, "", 2, lower=True)
LOWEST, ID = Value("lowest"), Value("id")
ARMS = {PATH: Arm(), MENDED: Arm(control=RANDOM), RANDOM: Arm(), STRAGGLERS: Arm(), WHOLE: Arm()}
STUDY = Study(
    "clip-sharpness",
    "Interpolation of a dual encoder: sharpness, straggler layers and their pruning",
    "Abdollahpoorrostam et al., 2024, arXiv 2410.16476",
    ClipOptions,
    ARMS,
    lambda options: ({"arm": "all", "level": "all", "seed": seed} for seed in range(options.seeds)),
    measure,
    papers=(41,),
    claims=lambda options: [
        Claim(
            "lines dip below both ends on other domains",
            "a failure mode (paper)",
            PATH,
            at=tuple(f"rate {rate:g}" for rate in options.rates),
            mean=True,
            value=Value("dip", 100.0, 1, "points", 1, lower=True),
        ),
        Claim(
            "sharper straggler layers, less accuracy on other domains (rank correlation)",
            "correlated (abstract)",
            STRAGGLERS,
            value=RHO,
        ),
        Claim("more so than the whole network", "that does not (abstract)", STRAGGLERS, WHOLE, value=RHO),
        *(
            above(
                MENDED,
                other,
                bar,
                said,
                at=tuple(f"rate {rate:g}" for rate in options.rates),
                mean=True,
                value=value,
            )
            for other, bar, said, value in (
                (PATH, 0.0, "mitigates the failure (abstract)", LOWEST),
                (RANDOM, 0.0, BAR, LOWEST),
                (PATH, -0.5, BAR, ID),
            )
        ),
    ],
    data=lambda options, where: common.content(options.images()),
    tables=[
        Grid("Lowest inner point of a line, five other domains (%)", value=LOWEST, arms=LINES),
        Grid("Lowest inner point minus the lower end (points)", value=DIP, arms=LINES),
        Grid("Accuracy on upright images at the fine-tuned end (%)", value=ID, arms=LINES),
        Grid("Rank correlation of sharpness and accuracy elsewhere", value=RHO, arms=[STRAGGLERS, WHOLE]),
    ],
    plots=[plot],
    notes=lambda options: [
        "A stand-in for CLIP: a transformer of three blocks for images and an embedding of letters for the "
        f"words of ten digits, in one space; first trained on {options.train_images:,} MNIST images in six "
        f"domains, then on upright ones alone. {options.layers} stragglers by the barrier of their own "
        f"line, half of their changes pruned. Correlations are over {options.points} inner points of "
        f"{len(options.rates)} lines of a seed. Nothing was tuned until the failure appears.",
        "As no line dips below its ends, there is nothing that pruning could mend: it moves the lowest point "
        "by 0.1 points, random layers as well as stragglers.",
    ],
)
