"""`zoo reproduce slimflow`: a small one-step flow by annealing reflow and guided distillation."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from zoo.bundles.catalog import find
from zoo.bundles.store import load_bundle
from zoo.diffusion.domain import make_job
from zoo.diffusion.flows import Flow, MLPFlow, UNetFlow
from zoo.diffusion.methods.ecodiff import column_norms, kept_units
from zoo.diffusion.methods.slimflow import RECIPE, Pairs, SlimFlow
from zoo.diffusion.plan import Plan
from zoo.diffusion.tasks import flow_distances
from zoo.diffusion.units import unit_groups
from zoo.errors import ConfigError
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves, Grid
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Value, View

TEACHER = "diffusion/dense-flow-digits"
IMAGES = 1000


@dataclass(frozen=True)
class SlimFlowOptions:
    """Options.

    Args:
        seeds: how many, from 0; of other numbers of pairs than the first at most 3.
        pairs: how many the teacher makes; the first number is that of the pruned UNet, too.
        reflow_steps: of each small flow.
        distil_steps: of each distillation.
        unet_steps: of reflow, and of distillation, of the pruned UNet.
    """

    seeds: int = 5
    pairs: tuple[int, ...] = (300, 3000)
    reflow_steps: int = 800
    distil_steps: int = 400
    unet_steps: int = 40

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.pairs:
            raise ConfigError("give at least one seed and one number of pairs")


@functools.lru_cache(maxsize=1)
def teacher() -> MLPFlow:
    """The shipped flow of 50 steps."""
    model = load_bundle(find(TEACHER))
    if not isinstance(model, MLPFlow):
        raise ConfigError(f"{TEACHER} is a {type(model).__name__}, no flow")
    return model.eval()


def small(seed: int) -> MLPFlow:
    """A small flow with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLPFlow(steps=1, width=48, blocks=2)


def pruned_unet(seed: int) -> UNetFlow:
    """A UNet of which the heads and the layers with the smallest weights are cut, with the rest's weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNetFlow(steps=1)
    groups = unit_groups(model.unet)
    scores = {group.name: column_norms(model.unet, group) for group in groups}
    units = {name: tuple(kept) for name, kept in kept_units(groups, scores, 0.5, "local")}
    model.cut(Plan(units, ("mid_block.resnets.1",)))
    return model


def one_step(flow: Flow, steps: int = 1) -> Row:
    """Distances of images that a flow makes of the same noise."""
    noise = torch.randn((IMAGES, *flow.sample_shape), generator=torch.Generator().manual_seed(77))
    with torch.no_grad():
        return dict(flow_distances(flow.eval().images(noise, steps), "digits"))


def measure(make: Any, options: SlimFlowOptions, case: Row, cells: CellCache) -> list[Row]:
    """Every arm of a seed: they share pairs, and distillations start from one reflowed network."""
    if case["level"] == "teacher":
        return [{"arm": f"teacher, {n} steps", **one_step(teacher(), n)} for n in (1, 2, 8, 50)]
    seed, steps = case["seed"], options.reflow_steps
    pairs = Pairs.of(teacher(), case["level"], 50, seed)
    job = make_job("digits", recipe=Recipe(batch=128), seed=seed, model=teacher())
    method = SlimFlow(reflow_steps=steps, distil_steps=options.distil_steps)
    found: dict[str, Flow] = {}

    def plain(model: Flow, count: int, batch: int = 128) -> Flow:
        recipe = Recipe(steps=count, batch=batch, **RECIPE)
        make_job("digits", recipe=recipe, seed=seed, model=model).fit(model).run()
        return model

    found[PLAIN] = plain(small(seed), steps)
    found[REFLOW] = small(seed)
    replace(method, annealing=0.0).reflow(found[REFLOW], pairs, job)
    found[HALF] = plain(small(seed), steps // 2)
    replace(method, annealing=0.0, reflow_steps=steps - steps // 2).reflow(found[HALF], pairs, job)
    found[ANNEALED] = small(seed)
    method.reflow(found[ANNEALED], pairs, job)
    for arm, guide in GUIDES.items():
        found[arm] = copy.deepcopy(found[ANNEALED])
        replace(method, guide=guide).distil(found[arm], pairs, job)
    if case["level"] == options.pairs[0]:
        short = replace(method, reflow_steps=options.unet_steps, distil_steps=options.unet_steps)
        found[UNET_PLAIN] = plain(pruned_unet(seed), 2 * options.unet_steps, 32)
        found[UNET] = pruned_unet(seed)
        short.slim(found[UNET], pairs, job.replace(recipe=Recipe(batch=32)))
    sizes = {arm: sum(p.numel() for p in model.parameters()) for arm, model in found.items()}
    return [{"arm": arm, "parameters": sizes[arm], **one_step(model)} for arm, model in found.items()]


def cases(options: SlimFlowOptions) -> Iterator[Row]:
    """The teacher once, and every number of pairs for every seed."""
    yield {"level": "teacher", "seed": 0}
    for count in options.pairs:
        for seed in range(options.seeds if count == options.pairs[0] else min(3, options.seeds)):
            yield {"level": count, "seed": seed}


def sizes(view: View) -> list[Verdict]:
    """What needs no seeds: how much smaller the one-step flow is."""
    own = [row["parameters"] for row in view.part(arm=GUIDED).rows]
    if not own:
        return []
    whole = sum(p.numel() for p in teacher().parameters())
    words = f"{own[0]:,} of {whole:,} parameters ({whole / own[0]:.1f} times smaller), 1 step for 50"
    claim = "the one-step flow has less than a tenth of the teacher's parameters"
    published, smaller = "15.7 M parameters (abstract)", 10 * own[0] < whole
    return [Verdict(claim, published, words, "holds" if smaller else "does not hold", paper=(18,))]


PLAIN, REFLOW, HALF, ANNEALED = "not reflowed", "reflow", "half flow, half reflow", "annealing reflow"
PAIRS_ONLY, GUIDED, OWN_STEP = "pairs only", "guided", "guided, own first step"
GUIDES: dict[str, Any] = {PAIRS_ONLY: "none", GUIDED: "guide", OWN_STEP: "student"}
UNET_PLAIN, UNET = "pruned UNet, not reflowed", "pruned UNet, annealed and guided"
TEACHERS = tuple(f"teacher, {n} steps" for n in (1, 2, 8, 50))
PIXELS = Value("pixel_frechet", 1.0, 3, "log ratio", 2, lower=True, log=True)
FEATURES = Value("frechet", 1.0, 1, "log ratio", 2, lower=True, log=True)
TENTH = -math.log(0.9)
ARMS = {
    **{name: Arm(once=True, flat=True) for name in TEACHERS},
    **{name: Arm() for name in (PLAIN, REFLOW, HALF, ANNEALED, *GUIDES, UNET_PLAIN, UNET)},
}
STUDY = Study(
    "slimflow",
    "SlimFlow: a small flow that makes images in one step",
    "Zhu et al. SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow. ECCV 2024",
    SlimFlowOptions,
    ARMS,
    cases,
    measure,
    papers=(18,),
    claims=[
        Claim(
            "reflow cuts the small flow's one-step Frechet distance 3 times, {level} pairs",
            BAR,
            REFLOW,
            PLAIN,
            math.log(3),
            value=FEATURES,
        ),
        Claim(
            "annealing is 10 % below plain reflow in pixel Frechet distance, {level} pairs",
            "annealing reflow above reflow from random weights (paper)",
            ANNEALED,
            REFLOW,
            TENTH,
        ),
        Claim(
            "annealing is below half the budget as a flow and half as reflow, {level} pairs",
            "above (paper)",
            ANNEALED,
            HALF,
        ),
        Claim(
            "guidance (two steps of the guide) is 10 % below pairs only, {level} pairs",
            "guided above pairs only (paper)",
            GUIDED,
            PAIRS_ONLY,
            TENTH,
        ),
        Claim(
            "the paper's guidance is below that of the authors' code, {level} pairs",
            "not stated",
            GUIDED,
            OWN_STEP,
        ),
        Claim(
            "the one-step flow is no worse than the teacher in 8 steps, {level} pairs",
            BAR,
            GUIDED,
            "teacher, 8 steps",
        ),
        Claim(
            "a pruned UNet as the student: one step 3 times better than not reflowed, {level} pairs",
            BAR,
            UNET,
            UNET_PLAIN,
            math.log(3),
            value=FEATURES,
        ),
    ],
    value=PIXELS,
    varies=("seeds",),
    data=lambda options, where: find(TEACHER).card.weights.sha256,
    facts=sizes,
    tables=[
        Grid("Pixel Frechet distance of one-step images, by pairs", value=PIXELS),
        Grid("Frechet distance of the classifier's features, by pairs", value=FEATURES),
    ],
    plots=[
        Curves(
            "pairs",
            "Small flows in one Euler step, by the pairs that they learn from",
            "pairs of noise and image",
            "pixel Frechet distance, log10",
            arms=(REFLOW, HALF, ANNEALED, *GUIDES),
            x=float,
            references=TEACHERS[2:],
            log10=True,
            log_x=True,
        )
    ],
    notes=lambda options: [
        "The teacher is the shipped perceptron flow of scikit-learn's 8x8 digits; the student is a sixteenth "
        f"of it. Every flow is trained for {options.reflow_steps} steps of 128 and every distillation, from "
        f"annealed reflow, for {options.distil_steps}, by one recipe; nothing was tuned. {IMAGES} images of "
        "one Euler step against 500 test images. Log ratios are natural: 0.11 is a tenth less, 1.10 is 3 "
        "times.",
        "Distances are squared errors, not LPIPS. The pruned UNet keeps half of each attention's heads and "
        f"loses a layer; either way it is trained for {2 * options.unet_steps} steps on batches of 32, which "
        "are too few for it to make images at all: its rows say nothing of the method.",
        "Why guidance loses: the guide, annealed reflow, makes images in one step that are farther from the "
        "data than those of distillation on pairs only (the table's rows): what it adds to the loss is the "
        "worse target. Tried: both forms of guidance, 300 and 3,000 pairs; more pairs help every arm, and "
        "none reaches the teacher's eight steps.",
    ],
)
