"""`zoo reproduce text-to-image-pruning`: how much of a text encoder and of a denoiser may be zero, by which
score."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from zoo.diffusion.domain import make_job
from zoo.diffusion.methods.stable_diffusion import PruneParts, mixed_sparsity
from zoo.diffusion.studies import common
from zoo.errors import ConfigError
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves, Grid
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.tables import Table, Verdict
from zoo.studies.view import Row, Rows, Value, View

TEXT, BOTH, KNEE, TOLERANCE = "text encoder alone", "both parts", "knee", "tolerance"
SCORED = ("magnitude", "magnitude, row", "magnitude, global", "wanda", "random")
TENFOLD = math.log(10)


@dataclass(frozen=True)
class PartsOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        levels: shares of zeros of the denoiser.
        text_levels: shares of zeros of the text encoder.
        images: per figure.
    """

    seeds: int = 3
    levels: tuple[float, ...] = (0.2, 0.35, 0.5)
    text_levels: tuple[float, ...] = (0.2, 0.35, 0.475, 0.7, 0.9)
    images: int = 60

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.levels or not self.text_levels:
            raise ConfigError("give at least one seed and one level of each part")


def measure(make: Any, options: PartsOptions, case: Row, cells: CellCache) -> Row:
    """Figures of the model with both parts pruned."""
    model = common.victim()
    job = make_job("digits", seed=case["seed"], model=model)
    made = make(text_sparsity=case["text"], sparsity=case["denoiser"]).sparsify(model, job)
    parameters = sum(p.numel() for p in model.parameters())
    zeros = sum(int((~mask.keep).sum()) for mask in made.masks.values())
    return {**common.figures(model, case["seed"], options.images), "zeros": zeros / parameters}


def cases(options: PartsOptions) -> Iterator[Row]:
    """Each score on the denoiser alone, magnitude on the text encoder alone, and magnitude on both."""
    for seed in range(options.seeds):
        for level in options.levels:
            for arm in SCORED:
                yield {"arm": arm, "level": level, "text": 0.0, "denoiser": level, "seed": seed}
        for level in options.text_levels:
            yield {"arm": TEXT, "level": level, "text": level, "denoiser": 0.0, "seed": seed}
        for text in (0.475, 0.7):
            for level in options.levels:
                where = {"arm": BOTH, "level": f"{100 * text:g} % / {100 * level:g} %"}
                yield {**where, "text": text, "denoiser": level, "seed": seed}


def ratios(rows: Rows, options: PartsOptions) -> Rows:
    """The rows, and for each seed the logarithms of two ratios of drifts."""
    found = {(row["arm"], row["level"], row["seed"]): row["drift"] for row in rows}
    made = list(rows)
    pairs = {
        KNEE: (("magnitude", 0.5), ("magnitude", 0.2)),
        TOLERANCE: (("magnitude", 0.35), (TEXT, 0.7)),
    }
    for arm, (above, below) in pairs.items():
        for seed in range(options.seeds):
            pair = [found.get((*one, seed)) for one in (above, below)]
            if pair[0] is not None and pair[1] is not None:
                made.append({"arm": arm, "level": "", "seed": seed, "ratio": math.log(pair[0] / pair[1])})
    return made


@functools.cache
def split() -> tuple[int, int]:
    """Parameters of Stable Diffusion 2's text encoder and UNet, from networks without memory."""
    with torch.device("meta"):
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
            )
        )
        unet = UNet2DConditionModel(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
    return sum(p.numel() for p in text.parameters()), sum(p.numel() for p in unet.parameters())


def total(view: View) -> list[Verdict]:
    """The paper's own total, from the shapes of the real network."""
    text, unet = split()
    mixed = 100 * mixed_sparsity({"text": (text, 0.475), "unet": (unet, 0.35)})
    words = f"{mixed:.1f} % of {text / 1e6:.1f} M + {unet / 1e6:.1f} M parameters"
    claim = "47.5 % of the text encoder and 35 % of the denoiser of Stable Diffusion 2 are 38.5 % of both"
    same = round(mixed, 1) == 38.5
    return [Verdict(claim, "38.5 % (abstract)", words, "holds" if same else "does not hold", paper=(5,))]


def _levels(view: View) -> list[Any]:
    """Levels of one part alone, in order."""
    return sorted(level for level in view.levels() if isinstance(level, float))


def both(view: View) -> Table | None:
    """Magnitude on both parts."""
    levels = view.part(arm=BOTH).levels()
    if not levels:
        return None
    values: Sequence[Value] = (common.DRIFT, common.ACCURACY, Value("zeros", 100.0, 1))
    body = [[level, *(view.cell(BOTH, level, value) for value in values)] for level in levels]
    heads = ["text / denoiser", "drift", "accuracy (%)", "zeros of all parameters (%)"]
    return Table("Magnitude on both parts", heads, body)


RATIO = Value("ratio", 1.0, 2, "log ratio", 2)
ARMS = {
    "magnitude": Arm(PruneParts, control="random"),
    "magnitude, row": Arm(functools.partial(PruneParts, scope="row"), control="random"),
    "magnitude, global": Arm(functools.partial(PruneParts, scope="global"), control="random"),
    "wanda": Arm(functools.partial(PruneParts, score="wanda", scope="row"), control="random"),
    "random": Arm(functools.partial(PruneParts, score="random")),
    TEXT: Arm(PruneParts),
    BOTH: Arm(PruneParts),
    KNEE: Arm(),
    TOLERANCE: Arm(),
}
STUDY = Study(
    "text-to-image-pruning",
    "Zeros in the text encoder and in the denoiser of a text-to-image model",
    "Ramesh and Zhao. Efficient Pruning of Text-to-Image Models. arXiv 2411.15113",
    PartsOptions,
    ARMS,
    cases,
    measure,
    papers=(5,),
    claims=[
        Claim(
            "with 20 % of the denoiser's weights zero drift by magnitude is 5 times below that by chance",
            BAR,
            "magnitude",
            "random",
            math.log(5),
            (0.2,),
        ),
        Claim(
            "drift grows more than tenfold from 20 % to 50 % of the denoiser's weights",
            "sudden collapse beyond a threshold (abstract)",
            KNEE,
            bar=TENFOLD,
            value=RATIO,
        ),
        Claim(
            "70 % of the text encoder's weights cost less than half the drift of 35 % of the denoiser's",
            "47.5 % against 35 % (abstract)",
            TOLERANCE,
            bar=math.log(2),
            value=RATIO,
        ),
        Claim(
            "drift by magnitude is below that by Wanda with {level} of the denoiser's weights zero",
            "magnitude better than the advanced criterion (abstract)",
            "magnitude",
            "wanda",
        ),
    ],
    value=common.DRIFT,
    varies=("seeds", "levels", "text_levels"),
    data=common.data,
    facts=total,
    prepare=ratios,
    tables=[
        Grid("Drift, one part pruned", value=common.DRIFT, arms=(*SCORED, TEXT), levels=_levels),
        Grid("Prompt accuracy (%)", value=common.ACCURACY, arms=(*SCORED, TEXT), levels=_levels),
        both,
    ],
    plots=[
        Curves(
            "drift",
            "Drift from the dense model's images",
            "zeros of the part's weights (%)",
            "log10 of the drift",
            (*SCORED, TEXT),
            log10=True,
        )
    ],
    notes=lambda options: [
        common.NOTE,
        "Scores and scopes have nothing to tune; Wanda's norms are taken over the whole trajectory of 64 "
        "guided prompts. The text encoder was trained here together with the denoiser: it is small and more "
        "redundant than that of Stable Diffusion 2.",
    ],
)
