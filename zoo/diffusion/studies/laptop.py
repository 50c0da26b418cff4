"""`zoo reproduce laptop`: whole layers removed by a knapsack on output losses, then distillation."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torchmetrics.functional.regression import spearman_corrcoef

from zoo.diffusion.domain import make_job
from zoo.diffusion.methods.laptop import Laptop, output_loss, removable_layers
from zoo.diffusion.plan import Plan
from zoo.diffusion.prompting import Jobs
from zoo.diffusion.studies import common
from zoo.diffusion.units import Layer
from zoo.errors import ConfigError
from zoo.shared.pruning.knapsack import cheapest_cover
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves, Grid
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.tables import Table, Verdict
from zoo.studies.verdict import mean_cell
from zoo.studies.view import Row, Value, View

DENSE, ADDITIVE, DISTILLED = "dense", "additivity", 0.35
SUBSETS = 14
Score = Literal["output", "guided", "magnitude", "random"]
DISTIL: dict[str, Any] = {"lr": 1e-3, "optimizer": "adam", "weight_decay": 0.0, "decay": "cosine"}


@dataclass(frozen=True)
class LaptopOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        levels: shares of the denoiser's parameters to remove.
        images: per figure.
        steps: of distillation, after the removal of 35 %.
    """

    seeds: int = 3
    levels: tuple[float, ...] = (0.2, 0.35)
    images: int = 200
    steps: int = 60

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.levels or self.steps < 1:
            raise ConfigError("give at least one seed, one level and one step")


def measure(make: Any, options: LaptopOptions, case: Row, cells: CellCache) -> Row:
    """Figures of the model without its layers, or how additive its layers' output losses are."""
    seed, model = case["seed"], common.victim()
    recipe = Recipe(steps=options.steps, batch=48, **DISTIL)
    job = make_job("digits", recipe=recipe, seed=seed, model=model)
    if case["arm"] == ADDITIVE:
        return additivity(seed)
    if make is None:
        return {**common.figures(model, seed, options.images), "left": 1.0}
    method = make(remove=case["level"])
    removable = removable_layers(model.unet)
    freed, total = method.freed(model, removable, None)
    chosen = method.choose(removable, list(scored(method.score, seed)), freed, total)
    model.cut(Plan(dropped=tuple(layer.name for layer in chosen)))
    if method.distil:
        method.train_on(model, common.victim(), job)
    found = common.figures(model, seed, options.images)
    return {**found, "left": common.share_left(model), "dropped": len(chosen)}


@functools.lru_cache(maxsize=8)
def scored(score: Score, seed: int) -> tuple[float, ...]:
    """What each layer of the dense model costs."""
    model = common.victim()
    job = make_job("digits", seed=seed, model=model)
    return tuple(Laptop(score=score).costs(model, removable_layers(model.unet), job))


def additivity(seed: int) -> Row:
    """Rank correlations of summed single costs with true output losses over random subsets of two to five
    layers, and how far the knapsack is from the best of all subsets."""
    model = common.victim()
    removable = removable_layers(model.unet)
    job = make_job("digits", seed=seed, model=model)
    outputs = Jobs(model, job).outputs(128)
    generator = torch.Generator().manual_seed(seed)
    subsets = []
    for index in range(SUBSETS):
        chosen = torch.randperm(len(removable), generator=generator)[: 2 + index % 4]
        subsets.append(chosen.tolist())
    true = [output_loss(model.unet, [removable[i].name for i in subset], outputs) for subset in subsets]
    row: Row = {}
    scores: tuple[Score, ...] = ("output", "magnitude")
    for score in scores:
        costs = list(scored(score, seed))
        sums = [sum(costs[i] for i in subset) for subset in subsets]
        row[f"spearman of {score}"] = float(spearman_corrcoef(torch.tensor(sums), torch.tensor(true)))
        if score == "output":
            row["excess"] = max(excess(removable, costs, share, model) for share in (0.2, 0.35))
    return row


def excess(removable: list[Layer], costs: list[float], share: float, model: Any) -> float:
    """How much more the knapsack's choice costs than the best of all subsets, as a share of that."""
    weights = torch.tensor([layer.parameters for layer in removable], dtype=torch.float64)
    target = math.ceil(share * sum(p.numel() for p in model.unet.parameters()))
    values = torch.tensor(costs, dtype=torch.float64)
    taken = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(removable))), dtype=torch.float64)
    best = float((taken @ values)[taken @ weights >= target].min())
    chosen = cheapest_cover([layer.parameters for layer in removable], costs, target)
    return sum(costs[i] for i in chosen) / best - 1


def cases(options: LaptopOptions) -> Iterator[Row]:
    """The dense model, additivity, each choice of layers at every level, and each distillation."""
    for seed in range(options.seeds):
        yield {"arm": ADDITIVE, "level": "", "seed": seed}
        yield {"arm": DENSE, "level": 0.0, "seed": seed}
        for level, arm in itertools.product(options.levels, CHOICES):
            yield {"arm": arm, "level": level, "seed": seed}
        for arm in DISTILLATIONS:
            yield {"arm": arm, "level": DISTILLED, "seed": seed}


def knapsack(view: View) -> list[Verdict]:
    """What needs no seeds: the knapsack against all subsets."""
    worst = max((row["excess"] for row in view.part(arm=ADDITIVE).rows), default=None)
    if worst is None:
        return []
    claim = "the knapsack's choice at 20 % and 35 % costs what the best of all subsets of layers costs"
    words = f"at most {100 * worst:.3f} % more"
    return [Verdict(claim, "exact", words, "holds" if worst < 1e-9 else "does not hold", paper=(46,))]


def correlations(view: View) -> Table | None:
    """Additivity of the two scores."""
    if ADDITIVE not in view.arms():
        return None
    figures = [f"spearman of {score}" for score in ("output", "magnitude")]
    body = [
        [name.removeprefix("spearman of "), mean_cell(view.values(ADDITIVE, "", Value(name, 1.0)), 3)]
        for name in figures
    ]
    note = f"Sums of single costs against true output losses, over {SUBSETS} random subsets of 2 to 5 layers."
    return Table("Additivity", ["score", "Spearman correlation"], body, note)


CHOICES = ("output", "guided", "magnitude", "random")
_free = functools.partial(Laptop, allow_unconditional=True)
_distilled = functools.partial(Laptop, distil=True, score="guided", normalised=0.0)
DISTILLATIONS: dict[str, Any] = {
    "task and output": _distilled,
    "plain features": functools.partial(_distilled, feature=1.0),
    "normalised features": functools.partial(_distilled, normalised=1.0),
}
ARMS = {
    ADDITIVE: Arm(),
    DENSE: Arm(flat=True),
    "output": Arm(functools.partial(_free, score="output")),
    "guided": Arm(functools.partial(Laptop, score="guided")),
    "magnitude": Arm(functools.partial(_free, score="magnitude")),
    "random": Arm(functools.partial(_free, score="random")),
    **{name: Arm(made) for name, made in DISTILLATIONS.items()},
}
SPEARMAN = Value("spearman of output", 1.0, 3, "correlation", 3)
LEFT = Value("left", 100.0, 1)
STUDY = Study(
    "laptop",
    "LAPTOP-Diff: whole layers removed by a knapsack, then distilled",
    "Zhang et al. LAPTOP-Diff: Layer Pruning and Normalized Distillation. arXiv 2404.11098",
    LaptopOptions,
    ARMS,
    cases,
    measure,
    papers=(46,),
    claims=[
        Claim(
            "output losses of single layers add up: rank correlation with the true loss of at least 0.9",
            "the most additive of four criteria (paper)",
            ADDITIVE,
            bar=0.9,
            value=SPEARMAN,
        ),
        Claim(
            "without {level} of the parameters the Frechet distance is 3 times below random removals",
            BAR,
            "output",
            "random",
            math.log(3),
            (0.2,),
            value=common.FRECHET_RATIO,
        ),
        Claim(
            "without {level} of the parameters the Frechet distance is below that by magnitude",
            "output loss above magnitude (paper)",
            "output",
            "magnitude",
            value=common.FRECHET_RATIO,
        ),
        Claim(
            "without {level} of the parameters the guided score keeps 2 points more accuracy than the plain",
            "not the paper's: this zoo's score",
            "guided",
            "output",
            2.0,
            (0.35,),
            value=common.ACCURACY,
        ),
        Claim(
            "distillation after {level} brings the Frechet distance to within 10 of the dense model's",
            BAR,
            "normalised features",
            DENSE,
            -10.0,
            value=common.FRECHET,
        ),
        Claim(
            "normalised features distil to a lower drift than plain ones",
            "normalised above plain (paper)",
            "normalised features",
            "plain features",
            value=common.DRIFT,
        ),
    ],
    value=common.FRECHET,
    varies=("seeds", "levels"),
    data=common.data,
    facts=knapsack,
    tables=[
        correlations,
        *(
            Grid(title, value=value, arms=(DENSE, *CHOICES, *DISTILLATIONS), levels=(0.0, 0.2, 0.35))
            for title, value in (
                ("Frechet distance by the share of parameters removed", common.FRECHET),
                ("Prompt accuracy (%)", common.ACCURACY),
                ("Drift", common.DRIFT),
                ("Parameters of the denoiser that are left (%)", LEFT),
            )
        ),
    ],
    plots=[
        Curves(
            "frechet",
            "Frechet distance without training",
            "parameters removed (%)",
            "Frechet distance",
            CHOICES,
        )
    ],
    notes=lambda options: [
        common.NOTE,
        f"Distillations go on from the guided choice at 35 % for {options.steps} steps of 48 images; they "
        "share one recipe, and none was tuned.",
        "The guided score, tried because the plain one hardly sees the prompt, chose the same layers at both "
        "shares and every seed: in this network the layers that matter to the prompt are those that matter "
        "to the image.",
    ],
)
