"""`zoo reproduce lomoe`: two of three digits on a canvas edited in one pass, the third left alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.bundles.catalog import find
from zoo.diffusion.classifier import load_judge
from zoo.diffusion.data import WORDS, captions, load_pictures
from zoo.diffusion.domain import make_job
from zoo.diffusion.editing import Edit, invert, schedule, step
from zoo.diffusion.methods.stable_diffusion import PruneParts
from zoo.diffusion.models import TextToImage
from zoo.diffusion.sampling import sample
from zoo.diffusion.studies import common
from zoo.errors import ConfigError
from zoo.shared.masks import masks_of
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.digests import code_digest
from zoo.studies.figures import Grid
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Rows, Value, View

SIDE = 8


@dataclass(frozen=True)
class LomoeOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        canvases: edited per seed, two digits on each.
        steps: of inversion and of sampling.
        guidance: scale of classifier-free guidance.
        training: steps in which the shipped model learns canvases of three digits.
    """

    seeds: int = 3
    canvases: int = 6
    steps: int = 10
    guidance: float = 7.5
    training: int = 300

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.canvases < 1:
            raise ConfigError("give at least one seed and one canvas")


def canvas_model(options: LomoeOptions, cells: CellCache, name: str = common.DENSE) -> TextToImage:
    """A shipped model of single digits after it was trained on canvases of three: cut as it is, its zeros
    held."""
    model = common.shipped(name)
    key = {"study": "lomoe", "part": "canvas model", "training": options.training}
    key |= {"code": code_digest(make_job), "data": find(name).card.weights.sha256}

    def compute() -> tuple[Row, dict[str, Tensor]]:
        recipe = Recipe(
            steps=options.training, batch=32, lr=1e-3, optimizer="adam", weight_decay=0.0, ema=0.98
        )
        job = make_job("digit-triples", recipe=recipe, model=model)
        fit = job.fit_masked(model) if masks_of(model) else job.fit(model).run()
        return {"loss": fit.last_loss}, model.state_dict()

    model.load_state_dict(cells.tensors(key, compute)[1])
    return model.eval()


def tiles(canvases: Tensor) -> Tensor:
    """The three digits of each canvas, [n, 3, 1, 8, 8]."""
    return torch.stack(canvases.split(SIDE, dim=-1), dim=1)


def seen(canvases: Tensor) -> Tensor:
    """What the classifier sees in each tile, [n, 3]."""
    found = tiles(canvases)
    return load_judge("digits")(found.flatten(0, 1)).argmax(1).view(found.shape[:2])


def measure(make: Any, options: LomoeOptions, case: Row, cells: CellCache) -> Row:
    """Share of the edits that show the prompt's digit, and the error of what was to stay."""
    seed, model = case["seed"], canvas_model(options, cells, BUNDLES.get(case["arm"], common.DENSE))
    generator = torch.Generator().manual_seed(seed)
    data = load_pictures("digits")
    chosen = torch.randint(len(data.test), (options.canvases, 3), generator=generator)
    images, labels = torch.cat(data.test[chosen].unbind(1), dim=-1), data.test_labels[chosen]
    targets = (labels + 1 + torch.randint(9, labels.shape, generator=generator)) % 10
    edit = Edit(steps=options.steps, guidance=options.guidance)
    if case["arm"] == LATE:
        PruneParts(sparsity=0.2).sparsify(model)
    if make is not None:
        made = torch.stack(
            [
                make(edit, model, *one)
                for one in zip(images, labels.tolist(), targets.tolist(), range(len(images)), strict=True)
            ]
        )
    else:
        made = unmasked(model, targets[:, 0], edit, seed)
    with torch.no_grad():
        found = seen(made)
    if make is None:
        return {"inside": float((found == targets[:, :1]).any(1).double().mean())}
    inside = (found == targets)[:, [0, 2]].double().mean()
    stays = (tiles(made) - tiles(images))[:, 1].square().mean()
    row: Row = {"inside": float(inside), "outside": float(stays)}
    if case["arm"] == LOMOE:
        row["inversion"] = inversion_error(model, images[0], labels[0].tolist(), edit)
    return row


def prompt(digit: int) -> str:
    """What a digit is called."""
    return captions(torch.tensor([digit]))[0]


def masked(edit: Edit, model: TextToImage, image: Tensor, own: list[int], to: list[int], seed: int) -> Tensor:
    """The left and the right digit edited by their masks."""
    masks = torch.zeros(2, SIDE, 3 * SIDE, dtype=torch.bool)
    masks[0, :, :SIDE] = masks[1, :, 2 * SIDE :] = True
    return edit(model, image, masks, [prompt(to[0]), prompt(to[2])], prompt(own[1]), seed)


def without_losses(edit: Edit, *given: Any) -> Tensor:
    """The same without losses and plain backgrounds: multi-diffusion from the inverted image."""
    return masked(replace(edit, attention=0.0, background=0.0, bootstrap=0.0), *given)


@torch.no_grad()
def regenerated(
    edit: Edit, model: TextToImage, image: Tensor, own: list[int], to: list[int], seed: int
) -> Tensor:
    """A canvas from the inverted noise by a prompt that names both digits, without any mask."""
    levels = schedule(model.scheduler, edit.steps)
    condition = model.encode(model.tokenise([prompt(own[1])]))
    both = model.encode(model.tokenise([f"{WORDS[to[0]]} {WORDS[to[2]]}"]))
    x = invert(model, image[None], condition, levels)[-1]
    empty = model.encode(model.tokenise([""]))
    for now, after in zip(reversed(levels[1:]), reversed(levels[:-1]), strict=True):
        x = step(edit.guided(model, x, both, empty, now), x, now, after)
    return x[0]


@torch.no_grad()
def pasted(edit: Edit, model: TextToImage, image: Tensor, own: list[int], to: list[int], seed: int) -> Tensor:
    """Digits that the shipped model of single digits makes, pasted over."""
    single = common.victim()
    condition = single.encode(single.tokenise([prompt(to[0]), prompt(to[2])]))
    noise = torch.randn((2, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    left, right = sample(single, noise, condition, steps=common.STEPS)
    return torch.cat([left, image[..., SIDE : 2 * SIDE], right], dim=-1)


@torch.no_grad()
def unmasked(model: TextToImage, targets: Tensor, edit: Edit, seed: int) -> Tensor:
    """Whole canvases from noise, one prompt each."""
    noise = torch.randn(
        (len(targets), 1, SIDE, 3 * SIDE), generator=torch.Generator().manual_seed(1000 + seed)
    )
    condition = model.encode(model.tokenise(captions(targets)))
    empty = model.encode(model.tokenise([""] * len(targets)))
    return sample(model, noise, condition, steps=edit.steps, guidance=edit.guidance, unconditional=empty)


def inversion_error(model: TextToImage, image: Tensor, own: list[int], edit: Edit) -> float:
    """Largest difference of an image from what comes back without any edit: the prompt that it has."""
    masks = torch.zeros(1, SIDE, 3 * SIDE, dtype=torch.bool)
    masks[0, :, :SIDE] = True
    same = replace(edit, bootstrap=0.0)(model, image, masks, [prompt(own[1])], prompt(own[1]))
    return float((same - image).abs().max())


def cases(options: LomoeOptions) -> Iterator[Row]:
    """Every arm for every seed."""
    for seed in range(options.seeds):
        for arm in (*EDITS, UNMASKED):
            yield {"arm": arm, "level": "", "seed": seed}


def shares(rows: Rows, options: LomoeOptions) -> Rows:
    """The rows, and for each seed each arm's rate over the unmasked one."""
    free = {row["seed"]: row["inside"] for row in rows if row["arm"] == UNMASKED}
    return [
        row | ({"share": row["inside"] / free[row["seed"]]} if free.get(row["seed"]) else {}) for row in rows
    ]


def inverted(view: View) -> list[Verdict]:
    """What needs no seeds: an edit to what is there gives the image back."""
    most = max((row["inversion"] for row in view.rows if "inversion" in row), default=None)
    if most is None:
        return []
    words = f"at most {most:.1e} apart, of a range of 2; bar 1e-3"
    claim = "inversion reproduces the image: an edit to the prompt that it has changes nothing"
    return [Verdict(claim, BAR, words, "holds" if most < 1e-3 else "does not hold", paper=(57,))]


LOMOE, LATE, UNMASKED = "LoMOE", "LoMOE, pruned last", "unmasked"
BUNDLES = {
    "LoMOE, 60 % of the units": "diffusion/ecodiff-t2i-digits-k60",
    "LoMOE, 20 % zeros": "diffusion/magnitude-t2i-digits-s20",
}
INSIDE = Value("inside", 100.0, 1)
SHARE = Value("share", 100.0, 1)
OUTSIDE = Value("outside", 1.0, 4, "log ratio", 2, lower=True, log=True)
EDITS: dict[str, Any] = {
    LOMOE: masked,
    **dict.fromkeys(BUNDLES, masked),
    LATE: masked,
    "without losses": without_losses,
    "regeneration": regenerated,
    "copy and paste": pasted,
}
ARMS = {**{name: Arm(made) for name, made in EDITS.items()}, UNMASKED: Arm()}
STUDY = Study(
    "lomoe",
    "LoMOE: several masked objects edited in one pass",
    "Chakrabarty et al. LoMOE: Localized Multi-Object Editing via Multi-Diffusion. arXiv 2403.00437",
    LomoeOptions,
    ARMS,
    cases,
    measure,
    papers=(57,),
    claims=[
        Claim(
            "inside the masks the prompt's digit is seen in 80 % of the unmasked rate",
            BAR,
            LOMOE,
            bar=80.0,
            value=SHARE,
        ),
        Claim(
            "outside the masks the error is 5 times below that of regeneration",
            BAR,
            LOMOE,
            "regeneration",
            math.log(5),
        ),
        Claim(
            "outside the masks the error is below that without the losses",
            "the losses keep the background (paper)",
            LOMOE,
            "without losses",
        ),
        *(
            Claim(
                f"{name}: the prompt's digit is seen at most 10 points less often than by the dense model",
                "not the paper's",
                name,
                LOMOE,
                -10.0,
                value=INSIDE,
            )
            for name in (*BUNDLES, LATE)
        ),
        *(
            Claim(
                f"{name}: outside the masks the error is 5 times below that of dense regeneration",
                "not the paper's",
                name,
                "regeneration",
                math.log(5),
            )
            for name in BUNDLES
        ),
    ],
    value=OUTSIDE,
    varies=("seeds",),
    data=lambda options, where: [
        find(name).card.weights.sha256 for name in (common.DENSE, *BUNDLES.values())
    ],
    facts=inverted,
    prepare=shares,
    tables=[
        Grid("Prompt's digit seen inside the masks (%)", value=INSIDE, columns=lambda view, level: "inside"),
        Grid(
            "Mean squared error of the digit that stays",
            value=OUTSIDE,
            arms=tuple(EDITS),
            columns=lambda view, level: "outside",
        ),
    ],
    notes=lambda options: [
        "Canvases of three 8x8 test digits; the outer two are to become other digits, the middle one is to "
        f"stay. The model is the shipped one of single digits, trained for {options.training} steps on "
        f"canvases whose caption names one of their digits; {options.canvases} canvases a seed, "
        f"{options.steps} steps, guidance {options.guidance:g} as in the authors' code. Unmasked is whole "
        "canvases made from noise, right if any of the three tiles shows the prompt's digit. Pasted digits "
        "keep the rest exactly and bound what is possible.",
        "60 % of the units is the shipped model that EcoDiff cut, 20 % zeros the one that lost 20 % of its "
        "denoiser's and 47.5 % of its text encoder's weights by magnitude. Both were trained on canvases "
        "like the dense one, cut as they are and with their zeros held. Pruned last is the dense one that "
        "lost as many weights after that training.",
    ],
)
