"""`zoo reproduce ecoflap`: block budgets from the model's loss against equal ones."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from zoo.harness.experiments import CellCache, Experiment, ExperimentResult
from zoo.harness.judging import mean_cell
from zoo.harness.tables import Table, Verdict
from zoo.llm.experiments import vision_language
from zoo.llm.experiments.common import (
    Apply,
    Bench,
    Protocol,
    lower,
    perplexity_plot,
    perplexity_table,
)
from zoo.llm.experiments.ordering import arm as uniform_arm
from zoo.llm.methods.ecoflap import first_order_scores, tensor_counts, zeroth_order_scores
from zoo.llm.methods.wanda import wanda_pruner
from zoo.llm.pruning import open_sparsity, prune_blocks
from zoo.shared.masks.patterns import Unstructured

Coarse = Literal["zeroth", "first"]
ARMS = ("ECoFLaP, zeroth order", "ECoFLaP, first order", "Wanda, uniform", "magnitude, uniform")
PROBES = 32  # of each tensor, where the probes are compared with exact gradients


def arm(coarse: Coarse, sparsity: float) -> Apply:
    """ECoFLaP with Wanda; tells the share kept by each block and whether the total is exact."""

    def apply(model: PreTrainedModel, batches: list[Tensor], seed: int) -> dict[str, Any]:
        # One noise per window, as in the paper, on short windows: what counts is the number of noises.
        probes = [window[None, :64] for batch in batches for window in batch]
        if coarse == "zeroth":
            scores = zeroth_order_scores(model, probes, seed=seed)
        else:
            scores = first_order_scores(model, probes)
        counts = tensor_counts(model, scores, sparsity)
        masks = prune_blocks(model, batches, wanda_pruner(Unstructured(), sparsity, counts.__getitem__))
        total = sum(mask.numel for mask in masks.values())
        kept = sum(mask.kept for mask in masks.values())
        return {"kept": kept, "total": total, "shares": _block_shares(masks)}

    return apply


def _block_shares(masks: Any) -> list[float]:
    kept: dict[str, list[int]] = {}
    for name, mask in masks.items():
        block = name.split(".self_attn")[0].split(".mlp")[0]
        entry = kept.setdefault(block, [0, 0])
        entry[0] += mask.kept
        entry[1] += mask.numel
    return [round(k / n, 4) for k, n in kept.values()]


def agreement(model: PreTrainedModel, batches: list[Tensor], seed: int) -> dict[str, Any]:
    """Rank correlation over tensors of the probes with the exact gradient norms, on the same windows."""
    windows = [window[None, :64] for batch in batches for window in batch][: PROBES // 4]
    exact = first_order_scores(model, windows)
    probed = zeroth_order_scores(model, windows, probes=4, seed=seed)
    names = list(exact)
    rank = spearmanr([exact[name] for name in names], [probed[name] for name in names]).statistic
    return {"spearman": float(rank), "tensors": len(names)}


@dataclass(frozen=True)
class EcoflapConfig(Protocol):
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


class EcoflapExperiment(Experiment):
    """ECoFLaP against Wanda with equal budgets, on language models and on a vision-language model."""

    name: ClassVar[str] = "ecoflap"
    title: ClassVar[str] = "ECoFLaP: layer-wise sparsity from coarse to fine"
    paper: ClassVar[str] = (
        "Yi-Lin Sung, Jaehong Yoon, Mohit Bansal: ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for "
        "Vision-Language Models, ICLR 2024"
    )
    config_class: ClassVar[type] = EcoflapConfig

    def run(
        self, config: EcoflapConfig, cells: CellCache, progress: Callable[..., None] | None = None
    ) -> ExperimentResult:
        """Run what is missing and sum up."""
        bench = Bench(self.name, config, cells, progress, len(config.subjects) * config.seeds)
        makers: list[Callable[[float], Apply]] = [
            functools.partial(arm, "zeroth"),
            functools.partial(arm, "first"),
            functools.partial(uniform_arm, "wanda"),
            functools.partial(uniform_arm, "magnitude"),
        ]
        bench.grid(dict(zip(ARMS, makers, strict=True)), config.sparsities, unseeded=ARMS[3:])
        for subject in config.subjects:
            for seed in range(config.seeds):
                bench.arm(subject, "agreement", 0.0, seed, agreement)
        tables, verdicts, plots = [], [], []
        for subject in config.subjects:
            tables.append(
                perplexity_table(
                    bench.rows,
                    subject,
                    "word perplexity on held-out text",
                    ARMS,
                    config.sparsities,
                    f"Mean ± sample standard deviation over {config.seeds} calibration seeds. "
                    + _shares_note(bench, subject, config.sparsities),
                )
            )
            verdicts += _verdicts(bench, subject, config.sparsities)
            plots.append(
                perplexity_plot(
                    bench.rows,
                    subject,
                    "perplexity",
                    "zeros in the blocks' linear weights [%]",
                    ARMS,
                    config.sparsities,
                )
            )
        if config.vision:
            rows = vision_language.rows(config.seeds, config.sparsities, cells, progress)
            tables.append(_vision_table(rows, config))
            verdicts += vision_language.verdicts(rows, config.sparsities)
            bench.rows += rows
        notes = [
            "Published (BLIP, 50 %, no fine-tuning): VQA 77.4 dense, 71.9 Wanda, 73.6 ECoFLaP; NLVR2 test "
            "83.6, 78.1, 79.2; COCO CIDEr 133.3, 97.1, 111.0; Flickr TR@1 96.8, 85.3, 90.2.",
            "With few blocks of similar sensitivity there is little to gain from unequal budgets.",
        ]
        return ExperimentResult(tables, verdicts, plots, bench.rows, notes)


def _shares_note(bench: Bench, subject: str, sparsities: tuple[float, ...]) -> str:
    parts = []
    for sparsity in sparsities:
        rows = [r for r in bench.rows if (r["subject"], r["arm"], r["level"]) == (subject, ARMS[0], sparsity)]
        shares = [statistics.fmean(each) for each in zip(*(row["shares"] for row in rows), strict=True)]
        parts.append(f"{100 * sparsity:.0f} %: " + ", ".join(f"{100 * share:.0f}" for share in shares))
    return "Percent kept by each block under ECoFLaP (zeroth), " + "; ".join(parts) + "."


def _verdicts(bench: Bench, subject: str, sparsities: tuple[float, ...]) -> list[Verdict]:
    found = []
    ranks = [row["spearman"] for row in bench.rows if row["subject"] == subject and row["arm"] == "agreement"]
    found.append(
        Verdict(
            f"{subject}: {PROBES} probes rank the tensors as exact gradient norms do (Spearman above 0.8)",
            "an estimate of the gradient, without backpropagation",
            mean_cell(ranks, 2),
            "holds" if min(ranks) > 0.8 else "does not hold",
        )
    )
    rows = [row for row in bench.rows if row["subject"] == subject and "shares" in row]
    exact = all(row["kept"] == row["total"] - int(round(row["level"] * row["total"], 6)) for row in rows)
    found.append(
        Verdict(
            f"{subject}: the total is exact to one weight",
            "average exactly p (a sign slip in the released code)",
            f"{len(rows)} runs",
            "holds" if exact else "does not hold",
        )
    )
    for sparsity in sparsities:
        where = f"{subject}, {100 * sparsity:.0f} %"
        for other in ARMS[2:]:
            claim = f"{where}: ECoFLaP (zeroth order) is better than {other}"
            published = "better than uniform Wanda on BLIP at 50 %" if "Wanda" in other else "not stated"
            found.append(lower(bench.rows, subject, sparsity, ARMS[0], other, claim, published))
        claim = f"{where}: forward passes alone are not worse than gradients by more than 0.01"
        found.append(lower(bench.rows, subject, sparsity, ARMS[0], ARMS[1], claim, "on par", at_least=-0.01))
    return found


def _vision_table(rows: list[dict[str, Any]], config: EcoflapConfig) -> Table:
    arms = list(dict.fromkeys(row["arm"] for row in rows if row["arm"] != "dense"))
    body = []
    for name in arms:
        cells = [
            [100 * r["accuracy"] for r in rows if r["arm"] == name and r["level"] == sparsity]
            for sparsity in config.sparsities
        ]
        body.append([name, *(mean_cell(values, 1) for values in cells)])
    dense = mean_cell([100 * row["accuracy"] for row in rows if row["arm"] == "dense"], 1)
    return Table(
        "Vision-language model: captions of digits, words right in %",
        ["arm", *(f"{100 * sparsity:.0f} %" for sparsity in config.sparsities)],
        body,
        f"Dense: {dense}. {vision_language.DESCRIPTION} Mean ± sample standard deviation over {config.seeds} "
        "seeds of training and calibration.",
    )
