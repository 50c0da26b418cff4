"""`zoo reproduce cfsp`: FFN channels cut by CFSP's scores, released and repaired, and by controls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from zoo.errors import ConfigError
from zoo.harness.experiments import CellCache, Experiment, ExperimentResult
from zoo.harness.tables import Verdict
from zoo.llm.experiments.common import (
    Apply,
    Bench,
    Protocol,
    lower,
    perplexity_plot,
    perplexity_table,
)
from zoo.llm.methods.cfsp import Coarse, FineScore, choose_channels, cut_channels, ffn_statistics

#: Arm -> fine score and coarse rule.
ARMS: dict[str, tuple[FineScore, Coarse]] = {
    "CFSP, repaired": ("repaired", "angular"),
    "CFSP, released": ("released", "angular"),
    "repaired, uniform budget": ("repaired", "uniform"),
    "Wanda-sp, uniform budget": ("wanda", "uniform"),
    "magnitude-sp, uniform budget": ("magnitude", "uniform"),
    "random, uniform budget": ("random", "uniform"),
}


def arm(score: FineScore, coarse: Coarse, ratio: float) -> Apply:
    """Cut the model; tells its parameters before and after, and the widths."""

    def apply(model: PreTrainedModel, batches: list[Tensor], seed: int) -> dict[str, Any]:
        statistics = ffn_statistics(model, batches)
        keep = choose_channels(model, statistics, ratio, score=score, coarse=coarse, seed=seed)
        before, after = cut_channels(model, keep)
        return {"parameters": [before, after], "widths": [int(kept.sum()) for kept in keep.values()]}

    return apply


@dataclass(frozen=True)
class CfspConfig(Protocol):
    """Options.

    Args:
        ratios: shares of the FFN channels to cut.
    """

    ratios: tuple[float, ...] = (0.2, 0.4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < ratio < 1 for ratio in self.ratios):
            raise ConfigError(f"ratios lie between 0 and 1; received {self.ratios}")


class CfspExperiment(Experiment):
    """CFSP's two scores against Wanda, magnitude and random channels."""

    name: ClassVar[str] = "cfsp"
    title: ClassVar[str] = "CFSP: FFN channels cut from coarse to fine"
    paper: ClassVar[str] = (
        "Yuxin Wang et al.: CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine "
        "Activation Information, COLING 2025"
    )
    config_class: ClassVar[type] = CfspConfig

    def run(
        self, config: CfspConfig, cells: CellCache, progress: Callable[..., None] | None = None
    ) -> ExperimentResult:
        """Run what is missing and sum up."""
        bench = Bench(self.name, config, cells, progress)
        arms = {name: functools.partial(arm, score, coarse) for name, (score, coarse) in ARMS.items()}
        bench.grid(arms, config.ratios, unseeded=[name for name in ARMS if ARMS[name][0] == "magnitude"])
        tables, verdicts, plots = [], [], []
        for subject in config.subjects:
            sizes = "; ".join(f"{100 * r:.0f} %: {_size(bench, subject, r)}" for r in config.ratios)
            tables.append(
                perplexity_table(
                    bench.rows,
                    subject,
                    "word perplexity without recovery training",
                    tuple(ARMS),
                    config.ratios,
                    f"Mean ± sample standard deviation over {config.seeds} calibration seeds. Columns: share "
                    "of FFN channels cut; magnitude has no seed. Parameters of the whole model left (CFSP, "
                    f"repaired), {sizes}.",
                )
            )
            for ratio in config.ratios:
                verdicts += _verdicts(bench, subject, ratio)
            plots.append(
                perplexity_plot(
                    bench.rows, subject, "perplexity", "FFN channels cut [%]", tuple(ARMS), config.ratios
                )
            )
        notes = [
            "The released fine score equals the norm of each channel's activation: its weights cancel (see "
            "zoo/llm/methods/cfsp.py).",
            "The paper's tables could not be had; its claim is that CFSP is better than the compared methods "
            "across models and budgets. No recovery training is done here.",
        ]
        return ExperimentResult(tables, verdicts, plots, bench.rows, notes)


def _size(bench: Bench, subject: str, ratio: float) -> str:
    rows = [
        row
        for row in bench.rows
        if (row["subject"], row["arm"], row["level"]) == (subject, "CFSP, repaired", ratio)
    ]
    before, after = rows[0]["parameters"]
    return f"{after:,} of {before:,}"


def _verdicts(bench: Bench, subject: str, ratio: float) -> list[Verdict]:
    where = f"{subject}, {100 * ratio:.0f} %"
    ours, published = "CFSP, repaired", "better than the compared methods at every budget"
    pairs = [
        ("random, uniform budget", "is better than random channels"),
        ("magnitude-sp, uniform budget", "is better than magnitude"),
        ("Wanda-sp, uniform budget", "is better than Wanda-sp with equal widths"),
        ("CFSP, released", "is better than the released score"),
        ("repaired, uniform budget", "gains from the angular budget"),
    ]
    own_bar = "not stated; this zoo's bar"
    return [
        lower(
            bench.rows,
            subject,
            ratio,
            ours,
            other,
            f"{where}: CFSP (repaired) {what}",
            own_bar if "released" in other or "repaired" in other else published,
        )
        for other, what in pairs
    ]
