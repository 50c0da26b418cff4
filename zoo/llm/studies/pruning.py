"""`zoo reproduce llm-pruning`: SparseGPT, Wanda, magnitude and random weights at equal sparsity."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zoo.llm.methods.sparsegpt import sparsegpt_pruner
from zoo.llm.methods.wanda import wanda_pruner
from zoo.llm.pruning import kept_of, nm_pattern, open_sparsity, prune_blocks
from zoo.llm.studies import common
from zoo.shared.blocks import RunningBlock
from zoo.shared.masks import Mask
from zoo.shared.masks.patterns import Pattern, Unstructured, parse_pattern
from zoo.shared.masks.topk import rowwise_mask
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.view import Row


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


def prune(
    maker: Callable[..., Any], model: PreTrainedModel, batches: list[Tensor], case: Row, options: Any
) -> None:
    """Prune with `maker(pattern, sparsity)` at a sparsity or an N:M pattern."""
    level = case["level"]
    pattern = parse_pattern(level) if isinstance(level, str) else Unstructured()
    prune_blocks(model, batches, maker(pattern, _share(level)))


def control(kind: str, model: PreTrainedModel, batches: list[Tensor], case: Row, options: Any) -> None:
    """Prune by magnitude or chance."""
    prune(lambda p, s: control_pruner(kind, p, s, case["seed"]), model, batches, case, options)


def _share(level: float | str) -> float:
    return 1 - float(parse_pattern(level).fixed_density or 0) if isinstance(level, str) else level


@dataclass(frozen=True)
class PruningOptions(common.Protocol):
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


ARMS = {
    common.DENSE: Arm(once=True, flat=True),
    "sparsegpt": Arm(functools.partial(prune, sparsegpt_pruner)),
    "wanda": Arm(functools.partial(prune, wanda_pruner)),
    "magnitude": Arm(functools.partial(control, "magnitude"), control="random", once=True),
    "random": Arm(functools.partial(control, "random")),
}
_BETTER = "{where}, {level}: %s is better than %s"
STUDY = Study(
    "llm-pruning",
    "Pruning language models in one shot: SparseGPT, Wanda, magnitude, random",
    "Elias Frantar, Dan Alistarh: SparseGPT, ICML 2023; Mingjie Sun, Zhuang Liu, Anna Bair, J. Zico Kolter: "
    "A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024",
    PruningOptions,
    ARMS,
    lambda options: common.cases(ARMS, options, (*options.sparsities, *options.patterns)),
    common.measure,
    claims=[
        Claim(_BETTER % (first, second), published, first, second, at=(0.5, "2:4"))
        for first, second, published in (
            ("sparsegpt", "wanda", "Wanda is on par with SparseGPT at 50 %, SparseGPT ahead at 2:4"),
            ("wanda", "magnitude", "Wanda is far ahead of magnitude"),
            ("magnitude", "random", BAR),
        )
    ],
    value=common.PERPLEXITY,
    varies=(*common.VARIES, "sparsities", "patterns"),
    data=common.data,
    by=("subject",),
    tables=[
        common.table(
            "word perplexity on held-out text",
            "Magnitude has no seed.",
            lambda view: (*view.options.sparsities, *view.options.patterns),
        )
    ],
    plots=[
        common.plot("zeros in the blocks' linear weights [%]", lambda view: view.options.sparsities),
    ],
    notes=lambda options: [
        "Linear weights of all blocks are pruned, embeddings and the output layer are not; blocks in order, "
        "each on the outputs of the pruned blocks before it. Wanda and the random control rank within rows, "
        "magnitude within layers and SparseGPT within blocks of 128 columns, with the same count per layer.",
    ],
)
