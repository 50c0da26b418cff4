"""`zoo reproduce defencing`: fences found and removed on squares of Set5 and Set14, beside simple fills."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.diffusion.classifier import frechet_distance
from zoo.diffusion.networks.defencing import Defencing, fenced_tiles, harmonic, hole_psnr, iou
from zoo.diffusion.studies.iter import details
from zoo.studies.cells import CellCache
from zoo.studies.figures import Grid
from zoo.studies.study import BAR, Arm, Claim, Study, grid
from zoo.studies.view import Row, Value

GAN, PLAIN, HARMONIC, MEAN = "with discriminators", "without discriminators", "harmonic fill", "mean fill"
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
        device: where to train.
    """

    seeds: int = 3
    steps: int = 300
    count: int = 200
    device: str = "cpu"


def cases(options: DefencingOptions) -> Iterator[Row]:
    """Both networks of every seed; the fills come with the first."""
    return grid(ARMS, ["all"], options.seeds, [GAN, PLAIN])


def measure(make: bool, options: DefencingOptions, case: Row, cells: CellCache) -> list[Row]:
    """IoU of the found fences, and PSNR in the holes by true and by found masks."""
    model = Defencing.fresh(case["seed"], adversarial=make)
    recipe = dataclasses.replace(model.usual, steps=options.steps)
    model.learn("photos", recipe=recipe, seed=case["seed"], device=options.device)
    model.cpu()
    images, masks, true = fenced_tiles(model.side, options.count)
    found = []
    with torch.no_grad():
        seen = model.find(images)
        made = {(case["arm"], TRUE): model.complete(images, masks), (case["arm"], FOUND): model(images)}
        if make:
            mean = (images * (1 - masks)).sum((2, 3), keepdim=True) / (1 - masks).sum((2, 3), keepdim=True)
            made[HARMONIC, TRUE] = harmonic(images, masks)
            made[MEAN, TRUE] = masks * mean + (1 - masks) * images
    for (arm, level), completed in made.items():
        row = {"arm": arm, "level": level, "psnr": float(hole_psnr(completed, true, masks).mean())}
        row["frechet"] = texture(completed, true)
        if arm == case["arm"]:
            row["iou"] = float(iou(seen, masks).mean())
        found.append(row)
    return found


def texture(made: Tensor, true: Tensor) -> float:
    """Frechet distance of squares of 4x4 pixels without their means; values are 0 to 1."""
    return frechet_distance(details(made.clamp(0, 1)), details(true))


ARMS = {GAN: Arm(True), PLAIN: Arm(False), HARMONIC: Arm(), MEAN: Arm()}
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
        Claim(
            "fences of patterns that were not trained on are found with an IoU of 0.7",
            BAR,
            GAN,
            bar=0.7,
            at=(TRUE,),
            value=IOU,
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
    varies=("seeds", "device"),
    tables=[
        Grid("PSNR in the hole (dB)"),
        Grid(
            "IoU of the found fences",
            value=IOU,
            arms=(GAN, PLAIN),
            levels=(TRUE,),
            columns=lambda v, level: "IoU",
        ),
        Grid("Frechet distance of 4x4 squares to the true images", value=Value("frechet", 1.0, 4)),
    ],
    notes=lambda options: [
        f"{options.steps} steps of 16 grey crops of T91 for each stage and seed; {options.count} squares of "
        "32x32 of Set5 and Set14. Training shows lattices of slanted wires, the test grids, of other "
        "brightness each. Nothing was tuned on the test images.",
        "By the found mask the image outside the true fence is not the input either, so that its figures are "
        "of the whole chain, in the true hole.",
    ],
)
