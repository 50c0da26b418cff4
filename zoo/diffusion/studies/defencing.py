"""`zoo reproduce defencing`: fences found and removed on squares of Set5 and Set14, beside simple fills."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zoo.diffusion.classifier import frechet_distance
from zoo.diffusion.networks.defencing import Defencing, fenced_tiles, harmonic, hole_psnr, iou
from zoo.diffusion.studies.iter import details
from zoo.diffusion.studies.quarters import ByQuarter, quarters
from zoo.names import check_known
from zoo.studies.cells import CellCache
from zoo.studies.figures import Grid
from zoo.studies.study import BAR, Arm, Claim, Study, Tuned
from zoo.studies.view import Row, Value

GAN, PLAIN, HARMONIC, MEAN = "with discriminators", "without discriminators", "harmonic fill", "mean fill"
FINDER, EVERYTHING = "whole image, longer", "everything called fence"
TRUE, FOUND = "true mask", "found mask"
PSNR = Value("psnr", 1.0, 2, "dB", 2)
IOU = Value("iou", 1.0, 3, "of IoU", 3)
FRECHET = Value("frechet", 1.0, 4, "in logarithms", 3, lower=True, log=True)


@dataclass(frozen=True)
class DefencingOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        steps: of each stage's training.
        count: squares of Set5 and Set14.
        arms: of `whole image, longer` and `everything called fence`, without the completions; by default all.
        device: where to train.
    """

    seeds: int = 3
    steps: int = 400
    count: int = 200
    arms: tuple[str, ...] = ()
    may_be_none: ClassVar[tuple[str, ...]] = ("arms",)
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_known("arm", self.arms, (FINDER, EVERYTHING))


def cases(options: DefencingOptions) -> Iterator[Row]:
    """The completions of a seed at once, as both have one segmentation; and the other segmentation."""
    for seed in range(options.seeds):
        if not options.arms:
            yield {"seed": seed}
        for arm in options.arms or (FINDER, EVERYTHING):
            yield {"arm": arm, "seed": seed}


@torch.no_grad()
def figures(made: Tensor, masks: Tensor, true: Tensor) -> Row:
    """PSNR in the holes, of all squares and of quarters of them by the share that is hidden; texture."""
    psnr = hole_psnr(made, true, masks)
    by_share = quarters(psnr, masks.flatten(1).mean(1))
    return {"psnr": float(psnr.mean()), "frechet": texture(made, true), "quarters": by_share}


def measure(make: None, options: DefencingOptions, case: Row, cells: CellCache) -> list[Row]:
    """IoU of the found fences, and PSNR in the holes by true and by found masks."""
    seed = case["seed"]
    if "arm" in case:
        return [found(case["arm"], seed, options)]
    first = Defencing.fresh(seed)
    recipe = dataclasses.replace(first.usual, steps=options.steps)
    job = first.make_job("photos", recipe=recipe, seed=seed, device=options.device)
    first.learn_to_find(job)
    images, masks, true = fenced_tiles(first.side, options.count)
    mean = (images * (1 - masks)).sum((2, 3), keepdim=True) / (1 - masks).sum((2, 3), keepdim=True)
    made = {(HARMONIC, TRUE): harmonic(images, masks), (MEAN, TRUE): masks * mean + (1 - masks) * images}
    for arm, adversarial in ((GAN, True), (PLAIN, False)):
        model = copy.deepcopy(first)
        model.adversarial = adversarial
        model.learn_to_complete(job)
        with torch.no_grad():
            model.cpu()
            made[arm, TRUE], made[arm, FOUND] = model.complete(images, masks), model(images)
            seen = float(iou(model.find(images), masks).mean())
    rows: list[Row] = [
        {"arm": arm, "level": level, **figures(completed, masks, true)}
        for (arm, level), completed in made.items()
    ]
    return [{**row, "iou": seen} if row["arm"] == GAN else row for row in rows]


def found(arm: str, seed: int, options: DefencingOptions) -> Row:
    """IoU by calling everything a fence, or by a segmentation that is told of the whole image and learns
    three times as long at twice the rate."""
    model = Defencing.fresh(seed, whole=True)
    images, masks, _ = fenced_tiles(model.side, options.count)
    if arm == EVERYTHING:
        return {"level": TRUE, "iou": float(iou(torch.ones_like(masks), masks).mean())}
    usual = model.usual
    recipe = dataclasses.replace(usual, steps=3 * options.steps, lr=2 * usual.lr)
    model.learn_to_find(model.make_job("photos", recipe=recipe, seed=seed, device=options.device))
    with torch.no_grad():
        return {"level": TRUE, "iou": float(iou(model.cpu().find(images), masks).mean())}


def texture(made: Tensor, true: Tensor) -> float:
    """Frechet distance of squares of 4x4 pixels without their means; values are 0 to 1."""
    return frechet_distance(details(made.clamp(0, 1)), details(true))


COMPLETED = (GAN, PLAIN, HARMONIC, MEAN)
ARMS = {name: Arm() for name in (*COMPLETED, EVERYTHING)} | {
    FINDER: Arm(
        tuned=Tuned(
            "whole image seen; rate; steps",
            "training photographs, other angles",
            ("no and yes", "0.002 and 0.004", "up to 2000"),
        )
    )
}
STUDY = Study(
    "defencing",
    "De-fencing GAN: fences found in one photograph and removed",
    "Jonna, Medhi and Sahay. Deep Generative Adversarial Network for Occlusion Removal from a Single Image. "
    "arXiv 2409.13242",
    DefencingOptions,
    ARMS,
    cases,
    measure,
    papers=(13,),
    claims=[
        *(
            Claim(
                f"{words}fences of patterns that were not trained on are found with {how}",
                BAR,
                arm,
                other,
                bar,
                (TRUE,),
                value=IOU,
            )
            for arm, words in ((GAN, ""), (FINDER, "whole image, longer: "))
            for how, other, bar in (
                ("an IoU of 0.7", "", 0.7),
                ("a higher IoU than by calling everything a fence", EVERYTHING, 0.0),
            )
        ),
        Claim(
            "in the hole the completion is 1 dB above harmonic fill, with the {level}",
            BAR,
            GAN,
            HARMONIC,
            1.0,
            at=(TRUE,),
        ),
        Claim("in the hole the completion is above mean fill, with the {level}", BAR, GAN, MEAN, at=(TRUE,)),
        Claim(
            "discriminators bring the texture nearer to that of true images, with the {level}",
            "synthesises realistic texture and structure",
            GAN,
            PLAIN,
            at=(TRUE,),
            value=FRECHET,
        ),
    ],
    value=PSNR,
    varies=("seeds", "device", "arms"),
    tables=[
        Grid("PSNR in the hole (dB)", arms=COMPLETED),
        Grid(
            "IoU of the found fences",
            value=IOU,
            arms=(GAN, FINDER, EVERYTHING),
            levels=(TRUE,),
            columns=lambda v, level: "IoU",
        ),
        Grid(
            "Frechet distance of 4x4 squares to the true images",
            value=Value("frechet", 1.0, 4),
            arms=COMPLETED,
        ),
    ],
    plots=[
        ByQuarter(
            "hidden",
            "Holes of true masks, by how much is hidden",
            "share of the square that is hidden (%)",
            "PSNR in the hole (dB)",
            lambda options: fenced_tiles(32, options.count)[1].flatten(1).mean(1),
            TRUE,
            (100.0, 1.0),
            COMPLETED,
        )
    ],
    notes=lambda options: [
        f"{options.steps} steps of 8 grey crops of T91 for each stage and seed; {options.count} squares of "
        "32x32 of Set5 and Set14. Training shows lattices of slanted wires, the test grids, of other "
        "brightness each. Nothing was tuned on the test images.",
        "A quarter to more than a half of a square is hidden, and both stages are probably short of "
        "training: the completion adds little to the harmonic fill that it starts from.",
        "By the found mask the image outside the true fence is not the input either, so that its figures are "
        "of the whole chain, in the true hole.",
    ],
)
