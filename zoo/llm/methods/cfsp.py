"""CFSP (Wang et al., COLING 2025): FFN channels are cut from a pretrained decoder after one calibration pass.

Coarse, how many channels each block keeps: the mean angle arccos(cos(h_in, h_out)) / pi that a block turns
the residual stream by decides its share through a sigmoid. Fine, which channels: with x_c the inputs of
down_proj over S windows, n_c = sqrt(1/S sum ||x_c||^2) and A = |W_down| n_c,

    score_c = n_c * mean over r of [N(A)_rc + N(|W_up^T|)_rc + N(|W_gate^T|)_rc]

where N divides by sums. `released` takes them over r, the axis that the mean is then taken over, so that
every term is 1/d and the score is 3/d n_c: no weight enters. `repaired` takes them over the channels c, as
RIA does.
All blocks are scored on the dense model and cut at the end: gate and up lose rows, down loses columns.

Recovery, if asked for: low-rank updates of all projections are trained and merged. Their ranks follow the
coarse score, as the abstract says; the rule, shares as for the channels, is this zoo's, since no code of it
was released.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.bundles.card import share_dropped
from zoo.bundles.store import PART_MASK
from zoo.errors import ConfigError, DataError
from zoo.harness.workers import workers
from zoo.llm.data.calibration import Calibrated, extras_of
from zoo.llm.lora import attach_lora, detach_lora
from zoo.llm.loss import language_forward
from zoo.llm.models import architecture_of
from zoo.llm.models.blocks import Block, find_blocks
from zoo.methods.contract import Sparsified
from zoo.shared.blocks import Forward, RunningBlock, measure_inputs, walk_blocks
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.masks.topk import topk_mask
from zoo.shared.measure.modes import float32
from zoo.shared.pruning.allocation import make_slot, proportional
from zoo.shared.structure.groups import GroupMap
from zoo.shared.structure.surgery import cut
from zoo.shared.train import Job

FineScore = Literal["repaired", "released", "wanda", "magnitude", "random"]
Coarse = Literal["angular", "uniform"]
# The released code divides sums of angles over 128 windows of 1024 tokens by 10^4.
_ANGLE_SCALE = 128 * 1024 / 1e4


@dataclass(frozen=True)
class FFNStatistics:
    """What one calibration pass measures of a block.

    Attributes:
        angle: mean angle between the block's input and output, in half turns, from 0 to 1.
        norms: n_c of every FFN channel.
    """

    angle: float
    norms: Float[Tensor, " channels"]


def ffn_statistics(
    model: nn.Module, batches: Sequence[Any], *, forward: Forward = language_forward
) -> list[FFNStatistics]:
    """Angle and channel norms of every block of a dense decoder, which is left as it is; several processes
    share the batches.

    Raises:
        ConfigError: an FFN that is not gated.
        DataError: no batches, or activations that are not finite.
    """
    blocks, team = {block.name: block for block in find_blocks(model)}, workers()
    found = []

    def visit(running: RunningBlock) -> None:
        block = blocks[running.name]
        windows = float(team.sum(torch.tensor(float(sum(hidden.shape[0] for hidden in running.inputs)))))
        down = f"{block.mlp_name.removeprefix(f'{block.name}.')}.down_proj.weight"
        norms = measure_inputs(running, "norms", team.sum)[down].values[0] / math.sqrt(windows)
        angles = torch.cat([_angles(hidden, running.run(i)) for i, hidden in enumerate(running.inputs)])
        total, tokens = team.sum(torch.stack([angles.sum(), angles.new_tensor(float(len(angles)))]))
        found.append(FFNStatistics(float(total / tokens), norms))

    walk_blocks(model, team.share(batches), visit, forward=forward)
    return found


def _angles(before: Tensor, after: Tensor) -> Float[Tensor, " tokens"]:
    cosine = torch.cosine_similarity(before.double().flatten(0, -2), after.double().flatten(0, -2), dim=-1)
    return cosine.nan_to_num(0.5).clamp(-1, 1).arccos() / math.pi


def keep_shares(angles: Sequence[float], ratio: float, steepness: float = 1.0) -> list[float]:
    """The share of channels that each block keeps; their mean is 1 - ratio.

    w_i = sigmoid(a z_i) with z_i = 13.1072 (angle_i - mean), and keep_i = w_i / mean(w) (1 - ratio). If the
    largest is not below 1, all deviations of w from its mean are shrunk until it is, with 5 % to spare.

    Args:
        angles: mean angle of each block.
        ratio: p, share of channels to cut, in [0, 1).
        steepness: a.

    Raises:
        ConfigError: a ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio is the share of FFN channels to cut, from 0 up to 1; received {ratio}")
    weights = _weights(angles, steepness)
    mean, most = float(weights.mean()), float(weights.max())
    if most / mean * (1 - ratio) >= 1 and most > mean:
        weights = mean + (weights - mean) * (mean * (1 / (1 - ratio) - 1) / (most - mean) / 1.05)
    return [float(value) for value in weights / mean * (1 - ratio)]


def _weights(angles: Sequence[float], steepness: float) -> Tensor:
    values = torch.tensor(angles, dtype=torch.float64)
    return torch.sigmoid(steepness * _ANGLE_SCALE * (values - values.mean()))


def recovery_ranks(angles: Sequence[float], rank: int, steepness: float = 1.0) -> list[int]:
    """The rank of each block's low-rank updates, more where the block turns the residual stream more.

    r_i is one and w_i / sum(w) of what the others leave of `rank` times the number of blocks, in whole units.

    Args:
        angles: mean angle of each block.
        rank: mean over the blocks, at least 1.
        steepness: a.

    Raises:
        ConfigError: a rank below 1.
    """
    if rank < 1:
        raise ConfigError(f"low-rank updates have a rank of at least 1; received {rank}")
    left = len(angles) * (rank - 1)
    names = [str(index) for index in range(len(angles))]
    weights = dict(zip(names, _weights(angles, steepness).tolist(), strict=True))
    more = proportional({name: make_slot(name, (left,), None) for name in names}, left, weights)
    return [1 + more[name] for name in names]


def recover(model: nn.Module, job: Job, ranks: Sequence[int]) -> None:
    """Train low-rank updates of all projections with one rank for each block, and merge them, in place."""
    blocks = [block.name for block in find_blocks(model)]
    attach_lora(model, dict(zip(blocks, ranks, strict=True)), seed=job.seed)
    job.fit(model).run()
    detach_lora(model, merge=True)
    model.requires_grad_(True).eval()


def kept_width(width: int, share: float, multiple: int = 1) -> int:
    """Channels kept of `width`: int(width * share), or for a `multiple` above 1 the nearest multiple.

    Raises:
        ConfigError: no channel would be left, or a multiple larger than the width.
    """
    if not 1 <= multiple <= width:
        raise ConfigError(
            f"multiple must lie between 1 and the {width} channels of the FFN; received {multiple}"
        )
    # A share such as 0.6 that arithmetic left a little below itself must not cost a channel.
    exact = width * share + 1e-9
    kept = int(exact) if multiple == 1 else int((exact + multiple / 2) / multiple) * multiple
    if kept < 1:
        raise ConfigError(
            f"keeping {share:.3f} of {width} channels in multiples of {multiple} leaves none; "
            "lower the ratio or the multiple"
        )
    return min(kept, width)


def channel_scores(
    block: Block, norms: Float[Tensor, " channels"], score: FineScore, generator: torch.Generator
) -> Float[Tensor, " channels"]:
    """Fine score of every channel of a block, float32.

    Args:
        block: the decoder layer.
        norms: n_c.
        score: `repaired` or `released` (see the module); `wanda`, the mean over rows of |W_down| n_c;
            `magnitude`, the norm of the column of W_down; `random`.
        generator: of the random score.

    Raises:
        ConfigError: an unknown score.
    """
    down, up, gate = (part.weight.detach().float() for part in (block.down, block.up, block.gate))
    if score in ("repaired", "released"):
        axis = 1 if score == "repaired" else 0
        terms = (down.abs() * norms, up.T.abs(), gate.T.abs())
        total = torch.stack([(term / term.sum(axis, keepdim=True)).nan_to_num(0.0) for term in terms])
        return total.sum(0).mean(0) * norms
    if score == "wanda":
        return (down.abs() * norms).mean(0)
    if score == "magnitude":
        return down.norm(dim=0)
    if score == "random":
        return torch.rand(down.shape[1], generator=generator).to(down.device)
    raise ConfigError(f"unknown score {score!r}: repaired, released, wanda, magnitude or random")


def choose_channels(
    model: nn.Module,
    statistics: Sequence[FFNStatistics],
    ratio: float,
    *,
    score: FineScore = "repaired",
    coarse: Coarse = "angular",
    multiple: int = 1,
    seed: int = 0,
) -> dict[str, Bool[Tensor, " channels"]]:
    """Which FFN channels stay, by the name of the FFN.

    Raises:
        ConfigError: a ratio or multiple out of range, or statistics of another model.
    """
    blocks = find_blocks(model)
    if len(statistics) != len(blocks):
        raise ConfigError(f"statistics of {len(statistics)} blocks do not fit a model of {len(blocks)}")
    angles = [one.angle for one in statistics] if coarse == "angular" else [0.5] * len(blocks)
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for block, one, share in zip(blocks, statistics, keep_shares(angles, ratio), strict=True):
        scores = channel_scores(block, one.norms, score, generator)
        if not bool(torch.isfinite(scores).all()):
            raise DataError(f"scores of {block.mlp_name} are not finite; check the checkpoint")
        keep[block.mlp_name] = topk_mask(scores, kept_width(len(scores), share, multiple))
    return keep


def ffn_groups(model: nn.Module) -> GroupMap:
    """The FFN channels of every block: rows of gate and up with their biases, columns of down."""
    families: dict[str, list[Any]] = {}
    attributes: dict[str, dict[str, int]] = {}
    for block in find_blocks(model):
        name = block.mlp_name
        members: list[Any] = [
            (f"{name}.gate_proj.weight", 0, "out"),
            (f"{name}.up_proj.weight", 0, "out"),
            (f"{name}.down_proj.weight", 1, "in"),
        ]
        for part, linear in (("gate_proj", block.gate), ("up_proj", block.up)):
            if linear.bias is not None:
                members.append((f"{name}.{part}.bias", 0, "out"))
        families[name] = members
        if getattr(block.mlp, "intermediate_size", None) == block.up.out_features:
            attributes[name] = {f"{name}.intermediate_size": 1}
    return GroupMap.declare(model, families, attributes=attributes)


def cut_channels(model: nn.Module, keep: Mapping[str, Bool[Tensor, " channels"]]) -> tuple[int, int]:
    """Remove the other FFN channels, in place: the model is physically smaller and equals the masked one.

    Returns:
        Parameters before and after.
    """
    done = cut(model, ffn_groups(model), keep)
    widths = [block.up.out_features for block in find_blocks(model)]
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.intermediate_size = max(widths)
    return done.parameters


@dataclasses.dataclass
class CFSP(Calibrated):
    """Cut FFN channels, so that the model is physically smaller; trains only if a rank is given."""

    ratio: float = 0.2
    """Share of the FFN channels to cut, from 0 up to 1; attention stays whole."""

    score: FineScore = "repaired"
    """Which channels go: by the repaired or the released score, or by those it is compared with."""

    coarse: Coarse = "angular"
    """Channels per block by the angle that it turns the residual stream by, or the same for all."""

    multiple: int = 1
    """Round each width to a multiple of this (the released code: 128)."""

    rank: int = 0
    """Mean rank of low-rank updates that are trained on the job's data after the cut and merged, more where a
    block turns the residual stream more; 0 trains nothing."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Cut `model` in place.

        Raises:
            ConfigError: options that are not possible, an FFN that is not gated, unequal widths in an
                architecture that has but one, or a rank without a job.
            DataError: too little text, or activations that are not finite.
        """
        if self.rank and job is None:
            raise ConfigError(
                f"rank {self.rank} is of updates that are trained: pass job=zoo.Job(loader, loss) from "
                "Python, or cut without a rank and train on by `zoo finetune llm MODEL --lora-rank`"
            )
        before = [block.up.out_features for block in find_blocks(model)]
        with float32(model):
            statistics = ffn_statistics(model, self.tokens(model, job, size=8))
            keep = choose_channels(
                model,
                statistics,
                self.ratio,
                score=self.score,
                coarse=self.coarse,
                multiple=self.multiple,
                seed=self.seed,
            )
        widths = [int(kept.sum()) for kept in keep.values()]
        architecture = architecture_of(model)
        if architecture["name"] != "llm/llama" and len(set(widths)) > 1:
            raise ConfigError(
                f"{type(model).__name__} has one FFN width for all layers, CFSP found {widths}; "
                "use the option coarse=uniform"
            )
        cut_channels(model, keep)
        if self.rank and job is not None:
            recover(model, job, recovery_ranks([one.angle for one in statistics], self.rank))
        part = {"kept": sum(widths), "total": sum(before), "pattern": "channel0"}
        part["sparsity"] = share_dropped(sum(widths), sum(before))
        mask = {f"ffn channels{PART_MASK}": torch.cat([kept.cpu() for kept in keep.values()])}
        return Sparsified(
            model,
            masks_of(model) or MaskSet({}),
            extras_of(model) | mask,
            dataclasses.asdict(self) | {"widths": widths},
            {"ffn channels": part},
            architecture_of(model)["args"],
        )
