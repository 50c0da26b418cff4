"""`zoo reproduce gqsa`: four-bit groups at 50 % sparsity, stage by stage, against 2:4 and two bits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zoo.harness.experiments import CellCache, Experiment, ExperimentResult
from zoo.harness.judging import judge, mean_cell
from zoo.harness.stats import seed_difference
from zoo.harness.tables import Plot, Series, Table, Verdict
from zoo.llm.experiments.common import Apply, Bench, Protocol, lower, values
from zoo.llm.methods.gqsa import (
    ChooseMask,
    Tuning,
    choose_groups,
    pack_model,
    pad_ffn,
    quantise_blocks,
    stored_bits,
    tune_model,
)
from zoo.llm.models.quantised import quantise_head
from zoo.llm.pruning import prune_blocks
from zoo.shared.blocks import RunningBlock, measure_inputs
from zoo.shared.masks import Mask
from zoo.shared.masks.patterns import NM

GROUP = 16
STAGES = ("W4S50, one shot", "W4S50, BQPO", "W4S50, BQPO + E2E-OQP")
HEAD = "W4S50, BQPO + E2E-OQP, W4 head"


def choose_nm(weight: Tensor, hessian: Tensor) -> Tensor:
    """2 of every 4 inputs by the saliency of GQSA's groups, for single weights."""
    matrix = hessian.double().clone()
    mean = float(matrix.diagonal().mean())
    matrix.diagonal().add_(0.01 * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix)).diagonal()
    return NM(2, 4).keep(weight.detach().double().square() / inverse.square(), 0)


@dataclass(frozen=True)
class Arm:
    """One way to compress: which weights stay, in how many bits, how it is tuned.

    Attributes:
        choose: which weights of a layer stay.
        bits: per weight; 0 leaves them in float32.
        tuning: None for one shot.
        stored: bits per weight of the dense layer, by the layout; None where the sparse op's is measured.
        head: whether the output layer is stored in four bits, too.
    """

    choose: ChooseMask
    bits: int
    tuning: Tuning | None
    stored: float | None
    head: bool = False


def arms(block_epochs: int, model_epochs: int) -> dict[str, Arm]:
    """All arms by name. Stored bits: a group of 16 has an fp16 scale and a zero point of b bits; 2:4 costs
    two bits for the place of each kept weight."""
    half = choose_groups(GROUP, 0.5)
    whole = choose_groups(GROUP, 0.0)
    blockwise, both = Tuning(block_epochs, model_epochs=0), Tuning(block_epochs, model_epochs=model_epochs)
    w24, w2 = 0.5 * (4 + 2) + (16 + 4) / 16, 2 + (16 + 2) / 16
    return {
        STAGES[0]: Arm(half, 4, None, None),
        STAGES[1]: Arm(half, 4, blockwise, None),
        STAGES[2]: Arm(half, 4, both, None),
        HEAD: Arm(half, 4, both, None, head=True),
        "2:4 + W4, one shot": Arm(choose_nm, 4, None, w24),
        "2:4 + W4, BQPO + E2E-OQP": Arm(choose_nm, 4, both, w24),
        "W2, one shot": Arm(whole, 2, None, w2),
        "W2, BQPO + E2E-OQP": Arm(whole, 2, both, w2),
        "S50, not quantised": Arm(half, 0, None, 0.5 * 32 + 1 / GROUP),
    }


def apply_arm(arm: Arm) -> Apply:
    """Compress the model; tells the bits stored per weight of the dense layers."""

    def apply(
        model: PreTrainedModel, batches: list[Tensor], seed: int
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        wider: Any = pad_ffn(model, GROUP)
        if arm.bits == 0:
            prune_blocks(wider, batches, _pruner(arm.choose))
            return wider, {"bits": arm.stored}
        quantisers = quantise_blocks(
            wider, batches, arm.choose, group=GROUP, bits=arm.bits, tuning=arm.tuning
        )
        codes = None
        if arm.tuning is not None:
            codes = tune_model(wider, quantisers, batches, arm.tuning)
        bits = arm.stored
        if bits is None:
            pack_model(wider, quantisers, codes)
            sizes = list(stored_bits(wider))
            bits = sum(size for _, size, _ in sizes) / sum(count for *_, count in sizes)
        if arm.head:
            quantise_head(wider, GROUP)
        return wider, {"bits": bits}

    return apply


def _pruner(choose: ChooseMask) -> Callable[[RunningBlock], dict[str, Mask]]:
    def prune(block: RunningBlock) -> dict[str, Mask]:
        hessians = {name: one.values[0] for name, one in measure_inputs(block, "hessians").items()}
        return {
            f"{name}.weight": Mask(choose(linear.weight, hessians.pop(f"{name}.weight")))
            for name, linear in block.linears().items()
        }

    return prune


@dataclass(frozen=True)
class GqsaConfig(Protocol):
    """Options.

    Args:
        block_epochs: passes over the text per block in BQPO.
        model_epochs: passes over the text in E2E-OQP.
    """

    length: int = 128
    block_epochs: int = 6
    model_epochs: int = 4


class GqsaExperiment(Experiment):
    """GQSA's stages, and other ways to about three bits per weight."""

    name: ClassVar[str] = "gqsa"
    title: ClassVar[str] = "GQSA: four-bit groups with group sparsity"
    paper: ClassVar[str] = (
        "Chao Zeng et al.: GQSA: Group Quantization and Sparsity for Accelerating Large Language Model "
        "Inference, arXiv 2412.17560"
    )
    config_class: ClassVar[type] = GqsaConfig

    def run(
        self, config: GqsaConfig, cells: CellCache, progress: Callable[..., None] | None = None
    ) -> ExperimentResult:
        """Run what is missing and sum up."""
        ways = arms(config.block_epochs, config.model_epochs)
        bench = Bench(
            self.name, config, cells, progress, len(config.subjects) * (1 + len(ways) * config.seeds)
        )
        for subject in config.subjects:
            bench.dense(subject)
            for name, way in ways.items():
                for seed in range(config.seeds):
                    epochs = (config.block_epochs, config.model_epochs) if way.tuning else (0, 0)
                    level = "{} and {} epochs".format(*epochs)
                    bench.arm(subject, name, level, seed, apply_arm(way))
        tables, verdicts, plots = [], [], []
        for subject in config.subjects:
            tables.append(_table(bench, subject, list(ways), config))
            verdicts += _verdicts(bench, subject)
            plots.append(_plot(bench, subject, list(ways)))
        notes = [
            "No released code could be found. Stages, saliency and recipe follow the paper's description; "
            "learning rates and epochs are this zoo's.",
            "With a W4 head the output layer has four-bit groups, too, none of them dropped; the column of "
            "bits leaves it out.",
            "Tuning minimises its own loss on the calibration text; the tables show held-out text. Bits "
            "count codes, scales, zero points and places in the blocks; W4S50 as the sparse op stores "
            "it (16-bit group numbers, a row pointer), W2 and 2:4 + W4 by arithmetic.",
            "stories260k has 172 FFN channels; four zero channels are added to make whole groups, which "
            "changes nothing.",
        ]
        return ExperimentResult(tables, verdicts, plots, bench.rows, notes)


def _bits(bench: Bench, subject: str, arm: str) -> float:
    return next(row["bits"] for row in bench.rows if row["subject"] == subject and row["arm"] == arm)


def _table(bench: Bench, subject: str, names: list[str], config: GqsaConfig) -> Table:
    dense = values(bench.rows, subject, "dense")[0]
    body = []
    for name in names:
        found = list(values(bench.rows, subject, name).values())
        nats = [math.log(value / dense) for value in found]
        body.append([name, f"{_bits(bench, subject, name):.2f}", mean_cell(found, 2), mean_cell(nats, 3)])
    return Table(
        f"{subject}: word perplexity on held-out text",
        ["arm", "bits per weight", "word perplexity", "ln(perplexity / dense)"],
        body,
        f"Dense: {dense:.2f}. Mean ± sample standard deviation over {config.seeds} calibration seeds of "
        f"{config.windows} windows of {config.length} tokens; groups of {GROUP}.",
    )


def _verdicts(bench: Bench, subject: str) -> list[Verdict]:
    dense = values(bench.rows, subject, "dense")[0]
    nats = {
        name: [math.log(value / dense) for value in values(bench.rows, subject, name).values()]
        for name in STAGES
    }
    undone = [1 - tuned / once for once, tuned in zip(nats[STAGES[0]], nats[STAGES[1]], strict=True)]
    half = seed_difference([100 * share for share in undone], [0.0] * len(undone))
    found = [
        judge(
            f"{subject}: BQPO undoes more than half of what W4S50 costs in one shot (nats per word)",
            "not stated; this zoo's bar",
            half,
            at_least=50.0,
            unit="% undone",
        )
    ]
    pairs = [
        (STAGES[2], STAGES[1], "E2E-OQP does not hurt after BQPO", "helps", 0.0),
        (STAGES[2], "W2, one shot", "W4S50 tuned is better than W2 in one shot", "better than W2", None),
        (STAGES[2], "W2, BQPO + E2E-OQP", "W4S50 is better than W2, both tuned", "better than W2", None),
        (
            STAGES[2],
            "2:4 + W4, one shot",
            "W4S50 tuned is better than 2:4 + W4 in one shot",
            "better than 2:4 pruning",
            None,
        ),
        (
            STAGES[2],
            "2:4 + W4, BQPO + E2E-OQP",
            "W4S50 is better than 2:4 + W4, both tuned",
            "better than 2:4 pruning (at more bits there)",
            None,
        ),
    ]
    for better, worse, claim, published, bar in pairs:
        found.append(lower(bench.rows, subject, None, better, worse, f"{subject}: {claim}", published, bar))
    return found


def _plot(bench: Bench, subject: str, names: list[str]) -> Plot:
    series = []
    for name in names:
        found = [math.log10(value) for value in values(bench.rows, subject, name).values()]
        series.append(
            Series(name, [_bits(bench, subject, name)], [statistics.fmean(found)], [0.0], kind="points")
        )
    dense = math.log10(values(bench.rows, subject, "dense")[0])
    series.append(Series("dense, 32 bits", [], [dense], kind="reference"))
    alt = f"Word perplexity against stored bits per weight on {subject}; the table has the numbers."
    slug = subject.rpartition("/")[2]
    return Plot(
        f"bits-{slug}",
        f"{subject}: perplexity against stored bits",
        "bits per weight of the blocks",
        "log10 of word perplexity",
        series,
        alt,
    )
