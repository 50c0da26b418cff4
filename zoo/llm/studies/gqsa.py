"""`zoo reproduce gqsa`: four-bit groups at 50 % sparsity, stage by stage, against 2:4 and two bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
from zoo.llm.studies import common
from zoo.shared.blocks import RunningBlock, measure_inputs
from zoo.shared.masks import Mask
from zoo.shared.masks.patterns import NM
from zoo.studies.figures import Columns, Curves, mean_of
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.verdict import mean_cell
from zoo.studies.view import Row, Rows, Value, View

GROUP = 16


def choose_nm(weight: Tensor, hessian: Tensor) -> Tensor:
    """2 of every 4 inputs by the saliency of GQSA's groups, for single weights."""
    matrix = hessian.double().clone()
    mean = float(matrix.diagonal().mean())
    matrix.diagonal().add_(0.01 * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix)).diagonal()
    return NM(2, 4).keep(weight.detach().double().square() / inverse.square(), 0)


@dataclass(frozen=True)
class Way:
    """One way to compress: which weights stay, in how many bits, how it is tuned.

    Attributes:
        choose: "half" or "whole" groups, or 2 of every 4 ("2:4").
        bits: per weight; 0 leaves them in float32.
        block, whole: whether blocks and then the whole model are tuned.
        stored: bits per weight of the dense layer, by the layout; None where the sparse op's is measured.
        head: whether the output layer is stored in four bits, too.
    """

    choose: str
    bits: int
    block: bool = False
    whole: bool = False
    stored: float | None = None
    head: bool = False

    def mask(self) -> ChooseMask:
        """Which weights of a layer stay."""
        return choose_nm if self.choose == "2:4" else choose_groups(GROUP, 0.5 * (self.choose == "half"))

    def __call__(
        self, model: PreTrainedModel, batches: list[Tensor], case: Row, options: GqsaOptions
    ) -> tuple[PreTrainedModel, Row]:
        """Compress the model; tells the bits stored per weight of the dense layers."""
        wider: Any = pad_ffn(model, GROUP)
        if self.bits == 0:
            prune_blocks(wider, batches, _pruner(self.mask()))
            return wider, {"bits": self.stored}
        tuning = Tuning(options.block_epochs, model_epochs=self.whole * options.model_epochs)
        kept = tuning if self.block else None
        quantisers = quantise_blocks(wider, batches, self.mask(), group=GROUP, bits=self.bits, tuning=kept)
        codes = tune_model(wider, quantisers, batches, tuning) if self.block else None
        bits = self.stored
        if bits is None:
            pack_model(wider, quantisers, codes)
            sizes = list(stored_bits(wider))
            bits = sum(size for _, size, _ in sizes) / sum(count for *_, count in sizes)
        if self.head:
            quantise_head(wider, GROUP)
        return wider, {"bits": bits}


def _pruner(choose: ChooseMask) -> Callable[[RunningBlock], dict[str, Mask]]:
    def prune(block: RunningBlock) -> dict[str, Mask]:
        hessians = {name: one.values[0] for name, one in measure_inputs(block, "hessians").items()}
        return {
            f"{name}.weight": Mask(choose(linear.weight, hessians.pop(f"{name}.weight")))
            for name, linear in block.linears().items()
        }

    return prune


@dataclass(frozen=True)
class GqsaOptions(common.Protocol):
    """Options.

    Args:
        block_epochs: passes over the text per block in BQPO.
        model_epochs: passes over the text in E2E-OQP.
    """

    length: int = 128
    block_epochs: int = 6
    model_epochs: int = 4


def cases(options: GqsaOptions) -> Iterator[Row]:
    """All ways of each subject; the level says how long they were tuned."""
    for case in common.cases(ARMS, options, ["0 and 0 epochs"]):
        if case["arm"] != common.DENSE and ARMS[case["arm"]].make.block:
            case["level"] = f"{options.block_epochs} and {options.model_epochs} epochs"
        yield case


def _nats(view: View, arm: str) -> list[float]:
    """By how much the logarithm of perplexity is above the dense model's."""
    dense = view.mean(common.DENSE)
    return [math.log(value / dense) for value in view.values(arm)]


def with_undone(rows: Rows, options: GqsaOptions) -> Rows:
    """The rows, with the share of the loss of one shot that BQPO undoes, by seed."""
    view, more = View(STUDY, rows, options, {}), []
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = view.part(subject=subject)
        if not {common.DENSE, ONCE, BLOCKS} <= set(own.arms()):
            continue
        for seed, (once, tuned) in enumerate(zip(_nats(own, ONCE), _nats(own, BLOCKS), strict=True)):
            arm = {"subject": subject, "arm": UNDONE, "level": "", "seed": seed}
            more.append({**arm, "undone": 1 - tuned / once})
    return [*rows, *more]


# A group of 16 has an fp16 scale and a zero point of b bits; 2:4 costs two bits for the place of each kept
# weight.
_W24, _W2 = 0.5 * (4 + 2) + (16 + 4) / 16, 2 + (16 + 2) / 16
ONCE, BLOCKS, TUNED, UNDONE = "W4S50, one shot", "W4S50, BQPO", "W4S50, BQPO + E2E-OQP", "undone by BQPO"
ARMS = {
    common.DENSE: Arm(once=True, flat=True),
    ONCE: Arm(Way("half", 4)),
    BLOCKS: Arm(Way("half", 4, block=True)),
    TUNED: Arm(Way("half", 4, block=True, whole=True)),
    f"{TUNED}, W4 head": Arm(Way("half", 4, block=True, whole=True, head=True)),
    "2:4 + W4, one shot": Arm(Way("2:4", 4, stored=_W24)),
    "2:4 + W4, BQPO + E2E-OQP": Arm(Way("2:4", 4, block=True, whole=True, stored=_W24)),
    "W2, one shot": Arm(Way("whole", 2, stored=_W2)),
    "W2, BQPO + E2E-OQP": Arm(Way("whole", 2, block=True, whole=True, stored=_W2)),
    "S50, not quantised": Arm(Way("half", 0, stored=0.5 * 32 + 1 / GROUP)),
}
STUDY = Study(
    "gqsa",
    "GQSA: four-bit groups with group sparsity",
    "Chao Zeng et al.: GQSA: Group Quantization and Sparsity for Accelerating Large Language Model "
    "Inference, arXiv 2412.17560",
    GqsaOptions,
    ARMS,
    cases,
    common.measure,
    papers=(22,),
    claims=[
        Claim(
            "{where}: BQPO undoes more than half of what W4S50 costs in one shot (nats per word)",
            BAR,
            UNDONE,
            bar=50.0,
            value=Value("undone", 100.0, 1, "% undone", 1),
        ),
        *(
            Claim("{where}: " + text, published, TUNED, second, at=(None,))
            for second, text, published in (
                (BLOCKS, "E2E-OQP does not hurt after BQPO", "helps"),
                ("W2, one shot", "W4S50 tuned is better than W2 in one shot", "better than W2"),
                ("W2, BQPO + E2E-OQP", "W4S50 is better than W2, both tuned", "better than W2"),
                (
                    "2:4 + W4, one shot",
                    "W4S50 tuned is better than 2:4 + W4 in one shot",
                    "better than 2:4 pruning",
                ),
                (
                    "2:4 + W4, BQPO + E2E-OQP",
                    "W4S50 is better than 2:4 + W4, both tuned",
                    "better than 2:4 pruning (at more bits there)",
                ),
            )
        ),
    ],
    value=common.PERPLEXITY,
    varies=common.VARIES,
    data=common.data,
    by=("subject",),
    prepare=with_undone,
    tables=[
        Columns(
            "{where}: word perplexity on held-out text",
            {
                "bits per weight": mean_of("bits", "{:.2f}"),
                "word perplexity": common.PERPLEXITY,
                "ln(perplexity / dense)": lambda view, arm, _: mean_cell(_nats(view, arm), 3),
            },
            common.with_dense(f"Groups of {GROUP}."),
            common.others,
        )
    ],
    plots=[
        Curves(
            "bits-{slug}",
            "{where}: perplexity against stored bits",
            "bits per weight of the blocks",
            "log10 of word perplexity",
            common.others,
            Value("bits", 1.0),
            lambda view: view.levels(),
            (common.DENSE,),
            log10=True,
            points=True,
        )
    ],
    notes=lambda options: [
        "No released code could be found. Stages, saliency and recipe follow the paper's description; "
        "learning rates and epochs are this zoo's.",
        "With a W4 head the output layer has four-bit groups, too, none of them dropped; the column of bits "
        "leaves it out.",
        "Tuning minimises its own loss on the calibration text; the tables show held-out text. Bits count "
        "codes, scales, zero points and places in the blocks; W4S50 as the sparse op stores it (16-bit group "
        "numbers, a row pointer), W2 and 2:4 + W4 by arithmetic.",
        "stories260k has 172 FFN channels; four zero channels are added to make whole groups, which changes "
        "nothing.",
    ],
)
