"""`zoo reproduce llm-pruning`: SparseGPT, Wanda, magnitude and random weights at equal sparsity."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
from zoo.llm.methods.sparsegpt import sparsegpt_pruner
from zoo.llm.methods.wanda import wanda_pruner
from zoo.llm.pruning import kept_of, nm_pattern, open_sparsity, prune_blocks
from zoo.shared.blocks import RunningBlock
from zoo.shared.masks import Mask
from zoo.shared.masks.patterns import Pattern, Unstructured, parse_pattern
from zoo.shared.masks.topk import rowwise_mask

ARMS = ("sparsegpt", "wanda", "magnitude", "random")


def control_pruner(
    kind: str, pattern: Pattern, sparsity: float, seed: int
) -> Callable[[RunningBlock], dict[str, Mask]]:
    """The controls: |w| within each layer, or chance within each row; the counts are Wanda's."""
    nm = nm_pattern(pattern)
    generator = torch.Generator().manual_seed(seed)

    def prune(block: RunningBlock) -> dict[str, Mask]:
        masks = {}
        for name, linear in block.linears().items():
            weight = linear.weight.detach()
            kept = kept_of(weight, sparsity)
            if kind == "random":
                score = torch.rand(weight.shape, generator=generator)
                keep = nm.keep(score, kept) if nm else rowwise_mask(score, kept)
            else:
                keep = (nm or Unstructured()).keep(weight.abs(), kept)
            masks[f"{name}.weight"] = Mask(keep, nm or Unstructured())
        return masks

    return prune


def arm(name: str, level: float | str) -> Apply:
    """An arm at a sparsity or an N:M pattern."""
    pattern = parse_pattern(level) if isinstance(level, str) else Unstructured()
    sparsity = level if isinstance(level, float) else 1 - float(pattern.fixed_density or 0)

    def apply(model: PreTrainedModel, batches: list[Tensor], seed: int) -> None:
        if name == "wanda":
            pruner = wanda_pruner(pattern, sparsity)
        elif name == "sparsegpt":
            pruner = sparsegpt_pruner(pattern, sparsity)
        else:
            pruner = control_pruner(name, pattern, sparsity, seed)
        prune_blocks(model, batches, pruner)

    return apply


@dataclass(frozen=True)
class OrderingConfig(Protocol):
    """Options.

    Args:
        sparsities: unstructured shares of zeros.
        patterns: N:M patterns.
    """

    sparsities: tuple[float, ...] = (0.5, 0.7)
    patterns: tuple[str, ...] = ("2:4",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for sparsity in self.sparsities:
            open_sparsity(sparsity)


class Ordering(Experiment):
    """Which weights to prune, at equal counts and on the same calibration text."""

    name: ClassVar[str] = "llm-pruning"
    title: ClassVar[str] = "Pruning language models in one shot: SparseGPT, Wanda, magnitude, random"
    paper: ClassVar[str] = (
        "Elias Frantar, Dan Alistarh: SparseGPT, ICML 2023; Mingjie Sun, Zhuang Liu, Anna Bair, J. Zico "
        "Kolter: A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024"
    )
    config_class: ClassVar[type] = OrderingConfig

    def run(
        self, config: OrderingConfig, cells: CellCache, progress: Callable[..., None] | None = None
    ) -> ExperimentResult:
        """Run what is missing and sum up."""
        levels: list[float | str] = [*config.sparsities, *config.patterns]
        bench = Bench(self.name, config, cells, progress)
        bench.grid({name: functools.partial(arm, name) for name in ARMS}, levels, unseeded=["magnitude"])
        tables, verdicts, plots = [], [], []
        for subject in config.subjects:
            tables.append(
                perplexity_table(
                    bench.rows,
                    subject,
                    "word perplexity on held-out text",
                    ARMS,
                    levels,
                    f"Mean ± sample standard deviation over {config.seeds} calibration seeds "
                    f"({config.windows} windows of {config.length} tokens); magnitude has no seed.",
                )
            )
            verdicts += _verdicts(bench, subject, [level for level in (0.5, "2:4") if level in levels])
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
        notes = [
            "Linear weights of all blocks are pruned, embeddings and the output layer are not; blocks in "
            "order, each on the outputs of the pruned blocks before it. Wanda and the random control rank "
            "within rows, magnitude within layers and SparseGPT within blocks of 128 columns, with the same "
            "count per layer.",
        ]
        return ExperimentResult(tables, verdicts, plots, bench.rows, notes)


def _verdicts(bench: Bench, subject: str, levels: list[float | str]) -> list[Verdict]:
    found = []
    for level in levels:
        where = f"{subject}, {level if isinstance(level, str) else f'{100 * level:.0f} %'}"
        for better, worse in zip(ARMS[:-1], ARMS[1:], strict=True):
            published = {
                "sparsegpt": "Wanda is on par with SparseGPT at 50 %, SparseGPT ahead at 2:4",
                "wanda": "Wanda is far ahead of magnitude",
                "magnitude": "not stated; this zoo's bar",
            }[better]
            claim = f"{where}: {better} is better than {worse}"
            found.append(lower(bench.rows, subject, level, better, worse, claim, published))
    return found
