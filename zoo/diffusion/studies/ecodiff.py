"""`zoo reproduce ecodiff`: units chosen by masks learned through the sampler, beside norms and chance."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from zoo.diffusion.domain import make_job
from zoo.diffusion.gates import gated
from zoo.diffusion.methods.ecodiff import EcoDiff, keep_masks, kept_units
from zoo.diffusion.models import TextToImage
from zoo.diffusion.plan import Plan
from zoo.diffusion.prompting import noisy_images
from zoo.diffusion.studies import common
from zoo.diffusion.units import unit_groups
from zoo.errors import ConfigError
from zoo.names import check_known
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves, Grid
from zoo.studies.study import BAR, Arm, Claim, Study, Tuned
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Value, View


@dataclass(frozen=True)
class EcoDiffOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        levels: shares of the heads and of the neurons that stay.
        images: per figure.
        updates: steps of learning of the arms that were not tuned.
        arms: which of the arms; by default all.
    """

    seeds: int = 3
    levels: tuple[float, ...] = (0.6, 0.4)
    images: int = 60
    updates: int = 30
    arms: tuple[str, ...] = ()
    may_be_none: ClassVar[tuple[str, ...]] = ("arms",)

    def __post_init__(self) -> None:
        check_known("arm", self.arms, ARMS)
        if self.seeds < 1 or not self.levels:
            raise ConfigError("give at least one seed and one level")


def measure(make: Any, options: EcoDiffOptions, case: Row, cells: CellCache) -> list[Row]:
    """Every level of an arm: the scores are those of one learning."""
    seed, dense = case["seed"], common.victim()
    groups = unit_groups(dense.unet)
    method = make() if ARMS[case["arm"]].tuned else replace(make(), updates=options.updates)
    job = make_job("digits", seed=seed, model=dense)
    scores = method.scores(dense, groups, job)
    rows = []
    for level in options.levels:
        plan = Plan({n: tuple(kept) for n, kept in kept_units(groups, scores, level, method.scope)})
        made = common.victim()
        made.cut(plan)
        masks = keep_masks(groups, plan)
        row = {"level": level, **common.figures(made, seed, options.images), "left": common.share_left(made)}
        rows.append(row | {"emptied": sum(not kept for kept in plan.units.values()), "gap": _gap(made, plan)})
        rows[-1] |= {f"kept {kind}": int(mask.sum()) for kind, mask in masks.items()}
    return rows


def _gap(made: TextToImage, plan: Plan) -> float:
    """Largest difference of the cut model's predicted noise from that of the dense one with closed gates."""
    dense = common.victim()
    factors = {
        group.name: torch.isin(torch.arange(group.count), torch.tensor(plan.units[group.name])).float()
        for group in unit_groups(dense.unet)
    }
    inputs = noisy_images(dense, make_job("digits", model=dense), 32)
    with torch.no_grad():
        cut = made(*inputs)
        with gated(dense.unet, factors):
            return float((dense(*inputs) - cut).abs().max() / cut.abs().max())


def cases(options: EcoDiffOptions) -> Iterator[Row]:
    """Each arm for every seed; a run gives all levels."""
    for arm in options.arms or ARMS:
        for seed in range(options.seeds):
            yield {"arm": arm, "seed": seed}


def exact(view: View) -> list[Verdict]:
    """What needs no seeds: the cut network is the gated one."""
    most = max(row["gap"] for row in view.rows)
    empty = max(row["emptied"] for row in view.rows)
    claim = f"the cut network predicts what the gated one does, up to {empty} emptied modules included"
    text = f"at most {most:.1e} of the largest value apart, over {len(view.rows)} networks; bar 1e-6"
    return [Verdict(claim, BAR, text, "holds" if most < 1e-6 else "does not hold", paper=(25,))]


LEFT = Value("left", 100.0, 1)
ARMS = {
    "learned": Arm(functools.partial(EcoDiff, recompute=False, start=3.0)),
    "learned, tuned": Arm(
        functools.partial(EcoDiff, recompute=False, updates=60),
        tuned=Tuned(
            "start; updates; beta",
            "noise of validation",
            ("3 and 1.5", "30, 45 and 60", "0.02 and 0.5"),
        ),
    ),
    "learned, one step": Arm(functools.partial(EcoDiff, recompute=False, start=3.0, sampling_steps=1)),
    "norm": Arm(functools.partial(EcoDiff, score="norm"), control="random"),
    "norm, per module": Arm(functools.partial(EcoDiff, score="norm", scope="local"), control="random"),
    "random": Arm(functools.partial(EcoDiff, score="random")),
}
STUDY = Study(
    "ecodiff",
    "EcoDiff: heads and neurons removed by masks that are learned through the whole sampler",
    "Zhang et al. Effortless Efficiency: Low-Cost Pruning of Diffusion Models. arXiv 2412.02852",
    EcoDiffOptions,
    ARMS,
    cases,
    measure,
    papers=(25,),
    claims=[
        Claim(
            "drift with {level} of the units kept is 5 times below that by the norm",
            BAR,
            "learned",
            "norm",
            1.609,
            (0.6,),
        ),
        Claim(
            "drift with {level} of the units kept is 5 times below that by the norm in each module",
            BAR,
            "learned",
            "norm, per module",
            1.609,
            (0.6,),
        ),
        Claim(
            "drift with {level} of the units kept is 20 times below that of random units",
            BAR,
            "learned",
            "random",
            2.996,
            (0.6,),
        ),
        *(
            Claim(
                f"tuned, drift with {{level}} of the units kept is {times} times below that {words}",
                BAR,
                "learned, tuned",
                other,
                bar,
                (0.6,),
            )
            for other, words, times, bar in (
                ("norm", "by the norm", 5, 1.609),
                ("random", "of random units", 20, 2.996),
            )
        ),
        Claim(
            "through eight steps drift is below that of masks learned on one, {level} kept",
            "single steps' errors accumulate (abstract)",
            "learned",
            "learned, one step",
            at=(0.6,),
        ),
        Claim(
            "prompt accuracy with {level} of the units kept is 2 points above that with random units",
            BAR,
            "learned",
            "random",
            2.0,
            (0.6,),
            value=common.ACCURACY,
        ),
    ],
    value=common.DRIFT,
    varies=("seeds", "arms"),
    data=common.data,
    facts=exact,
    tables=[
        Grid("Drift", "By the share of units kept."),
        Grid("Prompt accuracy (%)", value=common.ACCURACY),
        Grid("Frechet distance", value=common.FRECHET),
        Grid("Parameters of the denoiser that are left (%)", value=LEFT),
    ],
    plots=[
        Curves(
            "drift",
            "Drift from the dense model's images",
            "units kept (%)",
            "log10 of the drift",
            log10=True,
        )
    ],
    notes=lambda options: [
        common.NOTE,
        "Steps are not recomputed here, where memory is no matter; the gradients are equal (a test). Masks "
        "are learned with this zoo's settings (start at 3 as by the authors, rate 0.15, beta 0.02, eight "
        f"steps, 16 prompts per update, {options.updates} updates); nothing was tuned on these figures, and "
        "the norm has nothing to tune but its scope, of which both are shown.",
        "At a start of 3 the gates are saturated and pass hardly any gradient of the images, so that the "
        "first updates are the regulariser's. The method itself starts at 1.5, as the tuned arm does.",
    ],
)
