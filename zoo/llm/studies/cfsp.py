"""`zoo reproduce cfsp`: FFN channels cut by CFSP's scores, released and repaired, and by controls."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from zoo.errors import ConfigError
from zoo.llm.methods.cfsp import Coarse, FineScore, choose_channels, cut_channels, ffn_statistics
from zoo.llm.studies import common
from zoo.studies.study import BAR, Arm, Claim, Study, shown
from zoo.studies.view import Row, View


def cut(
    score: FineScore, coarse: Coarse, model: PreTrainedModel, batches: list[Tensor], case: Row, options: Any
) -> Row:
    """Cut the model; tells its parameters before and after, and the widths."""
    statistics = ffn_statistics(model, batches)
    keep = choose_channels(model, statistics, case["level"], score=score, coarse=coarse, seed=case["seed"])
    before, after = cut_channels(model, keep)
    return {"parameters": [before, after], "widths": [int(kept.sum()) for kept in keep.values()]}


@dataclass(frozen=True)
class CfspOptions(common.Protocol):
    """Options.

    Args:
        ratios: shares of the FFN channels to cut.
    """

    ratios: tuple[float, ...] = (0.2, 0.4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < ratio < 1 for ratio in self.ratios):
            raise ConfigError(f"ratios lie between 0 and 1; received {self.ratios}")


def _note(view: View) -> str:
    sizes = []
    for ratio in view.options.ratios:
        before, after = view.required(OURS, ratio)[0]["parameters"]
        sizes.append(f"{shown(ratio)}: {after:,} of {before:,}")
    return (
        f"Columns: share of FFN channels cut; magnitude has no seed. Parameters of the whole model left "
        f"(CFSP, repaired), {'; '.join(sizes)}."
    )


OURS, CHANCE = "CFSP, repaired", "random, uniform budget"
ARMS = {
    common.DENSE: Arm(once=True, flat=True),
    OURS: Arm(functools.partial(cut, "repaired", "angular")),
    "CFSP, released": Arm(functools.partial(cut, "released", "angular")),
    "repaired, uniform budget": Arm(functools.partial(cut, "repaired", "uniform")),
    "Wanda-sp, uniform budget": Arm(functools.partial(cut, "wanda", "uniform"), control=CHANCE),
    "magnitude-sp, uniform budget": Arm(
        functools.partial(cut, "magnitude", "uniform"), control=CHANCE, once=True
    ),
    CHANCE: Arm(functools.partial(cut, "random", "uniform")),
}
_PUBLISHED = "better than the compared methods at every budget"
STUDY = Study(
    "cfsp",
    "CFSP: FFN channels cut from coarse to fine",
    "Yuxin Wang et al.: CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine "
    "Activation Information, COLING 2025",
    CfspOptions,
    ARMS,
    lambda options: common.cases(ARMS, options, options.ratios),
    common.measure,
    papers=(35,),
    claims=[
        Claim("{where}, {level}: CFSP (repaired) " + text, published, OURS, second)
        for second, text, published in (
            ("random, uniform budget", "is better than random channels", _PUBLISHED),
            ("magnitude-sp, uniform budget", "is better than magnitude", _PUBLISHED),
            ("Wanda-sp, uniform budget", "is better than Wanda-sp with equal widths", _PUBLISHED),
            ("CFSP, released", "is better than the released score", BAR),
            ("repaired, uniform budget", "gains from the angular budget", BAR),
        )
    ],
    value=common.PERPLEXITY,
    varies=(*common.VARIES, "ratios"),
    data=common.data,
    by=("subject",),
    tables=[
        common.table("word perplexity without recovery training", _note, lambda view: view.options.ratios)
    ],
    plots=[common.plot("FFN channels cut [%]", lambda view: view.options.ratios)],
    notes=lambda options: [
        "The released fine score equals the norm of each channel's activation: its weights cancel (see "
        "zoo/llm/methods/cfsp.py).",
        "The paper's tables could not be had; its claim is that CFSP is better than the compared methods "
        "across models and budgets. No recovery training is done here.",
        "Magnitude looks at the down projections alone. On llm/dense-shakespeare it is worse than random "
        "channels and so no control; the comparisons with random channels and with Wanda-sp count.",
    ],
)
