"""`zoo reproduce ecoflap`: block budgets from the model's loss against equal ones."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from zoo.llm.methods.ecoflap import first_order_scores, tensor_counts, zeroth_order_scores
from zoo.llm.methods.wanda import wanda_pruner
from zoo.llm.pruning import open_sparsity, prune_blocks
from zoo.llm.studies import common, vision_language
from zoo.llm.studies.pruning import control, prune
from zoo.shared.masks.patterns import Unstructured
from zoo.studies.cells import CellCache
from zoo.studies.figures import Grid, when
from zoo.studies.study import Arm, Claim, Study, grid
from zoo.studies.tables import Verdict
from zoo.studies.verdict import mean_cell
from zoo.studies.view import Row, Value, View

PROBES = 32  # of each tensor, where the probes are compared with exact gradients
VISION = "vision-language"
ACCURACY = Value()


def budgeted(
    order: Literal["zeroth", "first"], model: PreTrainedModel, batches: list[Tensor], case: Row, options: Any
) -> Row:
    """ECoFLaP with Wanda; tells the share kept by each block and whether the total is exact."""
    # One noise per window, as in the paper, on short windows: what counts is the number of noises.
    probes = [window[None, :64] for batch in batches for window in batch]
    if order == "zeroth":
        scores = zeroth_order_scores(model, probes, seed=case["seed"])
    else:
        scores = first_order_scores(model, probes)
    counts = tensor_counts(model, scores, case["level"])
    masks = prune_blocks(model, batches, wanda_pruner(Unstructured(), case["level"], counts.__getitem__))
    kept: dict[str, list[int]] = {}
    for name, mask in masks.items():
        entry = kept.setdefault(name.split(".self_attn")[0].split(".mlp")[0], [0, 0])
        entry[0], entry[1] = entry[0] + mask.kept, entry[1] + mask.numel
    return {
        "kept": sum(k for k, _ in kept.values()),
        "total": sum(n for _, n in kept.values()),
        "shares": [round(k / n, 4) for k, n in kept.values()],
    }


def agreement(model: PreTrainedModel, batches: list[Tensor], case: Row, options: Any) -> Row:
    """Rank correlation over tensors of the probes with the exact gradient norms, on the same windows."""
    windows = [window[None, :64] for batch in batches for window in batch][: PROBES // 4]
    exact = first_order_scores(model, windows)
    probed = zeroth_order_scores(model, windows, probes=4, seed=case["seed"])
    names = list(exact)
    rank = spearmanr([exact[name] for name in names], [probed[name] for name in names]).statistic
    return {"spearman": float(rank), "tensors": len(names)}


@dataclass(frozen=True)
class EcoflapOptions(common.Protocol):
    """Options.

    Args:
        sparsities: shares of zeros.
        vision: also prune a small vision-language model, trained here for each seed.
    """

    sparsities: tuple[float, ...] = (0.5, 0.6)
    vision: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for sparsity in self.sparsities:
            open_sparsity(sparsity)


def measure(make: Any, options: EcoflapOptions, case: Row, cells: CellCache) -> Row | list[Row]:
    """A language model's perplexity, or all arms of one vision-language model."""
    if case["subject"] == VISION:
        return vision_language.measure(case["seed"], options.sparsities)
    return common.measure(make, options, case, cells)


def cases(options: EcoflapOptions) -> Iterator[Row]:
    """The language models, and the vision-language model of each seed."""
    yield from common.cases({k: a for k, a in ARMS.items() if k != RANKS}, options, options.sparsities)
    for subject in options.subjects:
        yield from grid(ARMS, [0.0], options.seeds, [RANKS], subject=subject)
    for seed in range(options.seeds if options.vision else 0):
        yield {"subject": VISION, "arm": "all", "level": 0.0, "seed": seed}


def data(options: EcoflapOptions, where: Row) -> Any:
    """Digits are made of the package's own data."""
    return "digits" if where["subject"] == VISION else common.data(options, where)


def facts(view: View) -> list[Verdict]:
    """How the probes rank the tensors, and whether the totals are exact."""
    ranks = [row["spearman"] for row in view.rows if row["arm"] == RANKS]
    if not ranks:
        return []
    rows = [row for row in view.rows if "shares" in row]
    exact = all(row["kept"] == row["total"] - int(round(row["level"] * row["total"], 6)) for row in rows)
    ranked = f"{{where}}: {PROBES} probes rank the tensors as exact gradient norms do (Spearman above 0.8)"
    estimate = "an estimate of the gradient, without backpropagation"
    average = "average exactly p (a sign slip in the released code)"
    return [
        view.fact(ranked, estimate, mean_cell(ranks, 2), min(ranks) > 0.8),
        view.fact("{where}: the total is exact to one weight", average, f"{len(rows)} runs", exact),
    ]


def _note(view: View) -> str:
    parts = []
    for sparsity in view.options.sparsities:
        rows = view.chosen(ZEROTH, sparsity)
        shares = [statistics.fmean(each) for each in zip(*(row["shares"] for row in rows), strict=True)]
        parts.append(f"{100 * sparsity:.0f} %: " + ", ".join(f"{100 * share:.0f}" for share in shares))
    return f"Percent kept by each block under ECoFLaP (zeroth), {'; '.join(parts)}."


def _language(view: View) -> bool:
    return view.where["subject"] != VISION


def _levels(view: View) -> tuple[float, ...]:
    return view.options.sparsities


PICTURES = Grid(
    "Vision-language model: captions of digits, words right in %",
    lambda view: f"Dense: {view.cell('dense', 0.0, ACCURACY)}. {vision_language.DESCRIPTION}",
    ACCURACY,
    common.others,
    _levels,
)
ZEROTH, FIRST, RANKS = "ECoFLaP, zeroth order", "ECoFLaP, first order", "agreement"
WANDA, MAGNITUDE = "Wanda, uniform", "magnitude, uniform"
ARMS = {
    common.DENSE: Arm(once=True, flat=True),
    ZEROTH: Arm(functools.partial(budgeted, "zeroth")),
    FIRST: Arm(functools.partial(budgeted, "first")),
    WANDA: Arm(functools.partial(prune, wanda_pruner)),
    MAGNITUDE: Arm(functools.partial(control, "magnitude"), once=True),
    RANKS: Arm(agreement),
}
_UNIFORM = "{where}, {level}: ECoFLaP (zeroth order) is better than %s"
STUDY = Study(
    "ecoflap",
    "ECoFLaP: layer-wise sparsity from coarse to fine",
    "Yi-Lin Sung, Jaehong Yoon, Mohit Bansal: ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for "
    "Vision-Language Models, ICLR 2024",
    EcoflapOptions,
    ARMS,
    cases,
    measure,
    papers=(26,),
    claims=[
        *(
            Claim(_UNIFORM % second, published, ZEROTH, second)
            for second, published in (
                (WANDA, "better than uniform Wanda on BLIP at 50 %"),
                (MAGNITUDE, "not stated"),
            )
        ),
        Claim(
            "{where}, {level}: forward passes alone are not worse than gradients by more than 0.01",
            "on par",
            ZEROTH,
            FIRST,
            -0.01,
        ),
        *(
            Claim(_UNIFORM % second, published, ZEROTH, second, value=ACCURACY, only={"subject": VISION})
            for second, published in vision_language.CONTROLS.items()
        ),
    ],
    value=common.PERPLEXITY,
    varies=(*common.VARIES, "vision"),
    data=data,
    by=("subject",),
    titles={VISION: "vision-language model"},
    facts=facts,
    tables=[
        when(_language, common.table("word perplexity on held-out text", _note, _levels)),
        when(lambda view: not _language(view), PICTURES),
    ],
    plots=[when(_language, common.plot("zeros in the blocks' linear weights [%]", _levels))],
    notes=lambda options: [
        "Published (BLIP, 50 %, no fine-tuning): VQA 77.4 dense, 71.9 Wanda, 73.6 ECoFLaP; NLVR2 test 83.6, "
        "78.1, 79.2; COCO CIDEr 133.3, 97.1, 111.0; Flickr TR@1 96.8, 85.3, 90.2.",
        "With few blocks of similar sensitivity there is little to gain from unequal budgets.",
    ],
)
