"""`zoo reproduce pqdiff`: digits outpainted from a part of them at three multiples by one network."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from zoo.diffusion.networks.pqdiff import PQDiff, View
from zoo.studies.cells import CellCache
from zoo.studies.figures import Grid
from zoo.studies.study import BAR, Arm, Claim, Study, grid
from zoo.studies.view import Row, Value

QUERY, SHUFFLED = "positional query", "shuffled positions"
MEAN, EDGE, TRUTH = "mean fill", "edge replication", "true digits"
PLACES = {"anchor at the top left": 0.0, "anchor in the middle": 0.5}
ACCURACY = Value("accuracy", 100.0, 1, "points", 1)
PSNR = Value("psnr", 1.0, 2, "dB", 2)


@dataclass(frozen=True)
class PQDiffOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        steps: of each training.
        images: test digits.
        levels: multiples, per side.
        device: where to train.
    """

    seeds: int = 3
    steps: int = 700
    images: int = 100
    levels: tuple[float, ...] = (1.5, 1.8, 2.25)
    device: str = "cpu"


def cases(options: PQDiffOptions) -> Iterator[Row]:
    """Each network once; its rows are the multiples with all arms."""
    yield from grid(ARMS, ["all"], options.seeds, [QUERY])


def measure(make: Any, options: PQDiffOptions, case: Row, cells: CellCache) -> list[Row]:
    """Accuracy of whole digits and PSNR of the centre, by multiple and arm."""
    seed = case["seed"]
    model = PQDiff.fresh(seed)
    recipe = dataclasses.replace(model.usual, steps=options.steps)
    model.learn("digits", recipe=recipe, seed=seed, device=options.device)
    model.cpu()
    found = []
    for place, multiple in itertools.product(PLACES, options.levels):
        view = View(multiple, model.side, options.images, PLACES[place])
        made = {TRUTH: view.whole, MEAN: view.filled(True), EDGE: view.filled(False)}
        for arm, shuffled in ((QUERY, False), (SHUFFLED, True)):
            draws = torch.Generator().manual_seed(seed)
            made[arm] = model.outpaint(view.anchor, view.extension, generator=draws, shuffled=shuffled)
        for arm, images in made.items():
            row = {"accuracy": float(view.right(images).mean()), "psnr": float(view.psnr(images).mean())}
            found.append({"anchor": place, "arm": arm, "level": f"{multiple:g}x", **row})
    return found


ARMS = {name: Arm() for name in (QUERY, SHUFFLED, MEAN, EDGE, TRUTH)}
STUDY = Study(
    "pqdiff",
    "PQDiff: outpainting by any multiple with a positional query",
    "Zhang et al. Continuous-Multiple Image Outpainting in One-Step via Positional Query and A "
    "Diffusion-based Approach. ICLR 2024",
    PQDiffOptions,
    ARMS,
    cases,
    measure,
    papers=(61,),
    claims=[
        *(
            Claim(
                f"{{where}}: at {{level}} digits are recognised 20 points more often than with {fill}",
                BAR,
                QUERY,
                fill,
                20.0,
                value=ACCURACY,
            )
            for fill in (MEAN, EDGE)
        ),
        Claim(
            "{where}: at {level} the anchor's part agrees 5 dB better than with shuffled positions",
            BAR,
            QUERY,
            SHUFFLED,
            5.0,
            value=PSNR,
        ),
    ],
    value=ACCURACY,
    varies=("seeds", "device"),
    by=("anchor",),
    tables=[
        Grid("Digits that are recognised (%), {where}", value=ACCURACY),
        Grid("PSNR of the anchor's part (dB), {where}", value=PSNR),
    ],
    notes=lambda options: [
        f"One network per seed, {options.steps} steps of 32 pairs of crops of scikit-learn's 8x8 digits, "
        f"shown at 16x16; {options.images} digits that were not trained on, ten DDIM steps. A multiple is of "
        "each side: at 2.25x the anchor is a fifth of the area. 1.8x is no multiple of a token.",
        "The shuffled arm is the same network with the target's positions in random order. Nothing was tuned "
        "on the test digits. The fills show the true anchor: their PSNR there is that of resampling alone.",
        "From the middle the fills leave little to win: repeating its border is recognised nearly as often "
        "as the true digits at 1.5x.",
        "Why the bar of 20 points is missed: even the part that the network was shown comes back at 15 to 18 "
        "dB, where resampling alone gives 32 dB and more, and the digits that it draws around it are as "
        "coarse. Positions do tell it what to draw where: shuffled, they cost 6 to 7 dB and bring "
        "recognition down to chance. Tried: the anchor at the top left and in the middle, three multiples.",
    ],
)
