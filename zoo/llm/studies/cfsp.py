"""`zoo reproduce cfsp`: FFN channels cut by CFSP's scores, released and repaired, and by controls."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from zoo.errors import ConfigError
from zoo.llm.methods.cfsp import (
    Coarse,
    FineScore,
    choose_channels,
    cut_channels,
    ffn_statistics,
    recover,
    recovery_ranks,
)
from zoo.llm.studies import common
from zoo.llm.train import Windows, llm_recipe, window_loss
from zoo.shared.train import Job
from zoo.studies.study import BAR, Arm, Claim, Study, shown
from zoo.studies.view import Row, View


def cut(
    score: FineScore,
    coarse: Coarse,
    model: PreTrainedModel,
    batches: list[Tensor],
    case: Row,
    options: CfspOptions,
    ranks: Coarse | None = None,
) -> Row:
    """Cut the model, and train it on with ranks by angle or equal ones, if wanted; tells its parameters
    before and after, the widths, and the ranks."""
    seed, statistics = case["seed"], ffn_statistics(model, batches)
    keep = choose_channels(model, statistics, case["level"], score=score, coarse=coarse, seed=seed)
    before, after = cut_channels(model, keep)
    row: Row = {"parameters": [before, after], "widths": [int(kept.sum()) for kept in keep.values()]}
    if ranks is None:
        return row
    angles = [one.angle if ranks == "angular" else 0.5 for one in statistics]
    row["ranks"] = recovery_ranks(angles, options.rank)
    windows = Windows(common.tokens(case["subject"]), options.length, _BATCH)
    recipe = llm_recipe(options.steps, batch=_BATCH, weight_decay=0.0)
    recover(model, Job(windows, window_loss, None, recipe, seed, "cpu"), row["ranks"])
    return row


@dataclass(frozen=True)
class CfspOptions(common.Protocol):
    """Options.

    Args:
        ratios: shares of the FFN channels to cut.
        steps: of the training after the cut, of the arms that recover.
        rank: mean over the blocks of the ranks of what is trained.
    """

    ratios: tuple[float, ...] = (0.2, 0.4)
    steps: int = 60
    rank: int = 4

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
        f"Columns: share of FFN channels cut; magnitude has no seed; recovered: {view.options.steps} steps "
        f"of low-rank updates of mean rank {view.options.rank}. Parameters of the whole model left "
        f"(CFSP, repaired), {'; '.join(sizes)}."
    )


OURS, CHANCE = "CFSP, repaired", "random, uniform budget"
MENDED, EQUAL, LUCK = f"{OURS}, recovered", f"{OURS}, recovered by equal ranks", f"{CHANCE}, recovered"
_BATCH = 8
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
    MENDED: Arm(functools.partial(cut, "repaired", "angular", ranks="angular")),
    EQUAL: Arm(functools.partial(cut, "repaired", "angular", ranks="uniform")),
    LUCK: Arm(functools.partial(cut, "random", "uniform", ranks="uniform")),
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
        Claim("{where}, {level}: CFSP (repaired) " + text, published, first, second)
        for first, second, text, published in (
            (OURS, "random, uniform budget", "is better than random channels", _PUBLISHED),
            (OURS, "magnitude-sp, uniform budget", "is better than magnitude", _PUBLISHED),
            (OURS, "Wanda-sp, uniform budget", "is better than Wanda-sp with equal widths", _PUBLISHED),
            (OURS, "CFSP, released", "is better than the released score", BAR),
            (OURS, "repaired, uniform budget", "gains from the angular budget", BAR),
            (MENDED, OURS, "gains from recovery", "recovers (abstract)"),
            (MENDED, EQUAL, "recovered gains from ranks by angle", "adaptive allocation (abstract)"),
            (MENDED, LUCK, "recovered is better than random channels recovered", BAR),
        )
    ],
    value=common.PERPLEXITY,
    varies=(*common.VARIES, "ratios"),
    data=common.data,
    by=("subject",),
    tables=[common.table("word perplexity", _note, lambda view: view.options.ratios)],
    plots=[common.plot("FFN channels cut [%]", lambda view: view.options.ratios)],
    notes=lambda options: [
        "The released fine score equals the norm of each channel's activation: its weights cancel (see "
        "zoo/llm/methods/cfsp.py).",
        "The paper's tables could not be had; its claim is that CFSP is better than the compared methods "
        "across models and budgets. Nothing was tuned.",
        "Recovery was not released: ranks are shared out by the coarse score as the channels are, which is "
        "this zoo's reading of the abstract. It trains on the text that calibration windows are drawn from.",
        "Magnitude looks at the down projections alone. On llm/dense-shakespeare it is worse than random "
        "channels and so no control, and norms of whole groups and products of norms are no better; the "
        "comparisons with random channels and with Wanda-sp count.",
    ],
)
