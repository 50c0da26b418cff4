"""Wanda (Sun, Liu, Bair and Kolter, ICLR 2024): weights pruned by |W_ij| ||x_j||_2, ranked in each output.

Nothing is trained and no weight is updated. Blocks are pruned in order, each on the outputs of the pruned
blocks before it; within a block all layers are scored on the block as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.llm.data.calibration import Calibrated, extras_of
from zoo.llm.pruning import Prune, matrix_pruner, prune_blocks, resolve_sparsity
from zoo.methods.contract import Sparsified
from zoo.shared.masks.patterns import NM, Pattern, parse_pattern
from zoo.shared.masks.topk import rowwise_mask
from zoo.shared.measure.modes import float32
from zoo.shared.train import Job


def wanda_score(weight: Float[Tensor, "out in"], norms: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """S_ij = |W_ij| ||x_j||_2, equation 1; float32."""
    return weight.detach().float().abs() * norms.float()


def wanda_mask(
    weight: Float[Tensor, "out in"],
    norms: Float[Tensor, " in"],
    kept: int,
    nm: NM | None = None,
    before: Bool[Tensor, "out in"] | None = None,
) -> Bool[Tensor, "out in"]:
    """Which weights stay: the best of each row, or n of every m inputs.

    Args:
        weight: of a linear layer.
        norms: of its input features.
        kept: entries in all (see `rowwise_mask`); an N:M pattern decides it itself.
        nm: the N:M pattern, if there is one.
        before: what an earlier mask kept; nothing else stays.

    Raises:
        PatternError: a count or an N:M pattern that does not fit.
    """
    score = wanda_score(weight, norms)
    if nm is None:
        return rowwise_mask(score, kept, before)
    if before is None:
        return nm.keep(score, kept)
    return nm.keep(score.masked_fill(~before, -1.0), kept) & before


def wanda_pruner(pattern: Pattern, sparsity: float, counts: Callable[[str], int] | None = None) -> Prune:
    """The visit of a block, for `prune_blocks`; see `matrix_pruner`."""
    return matrix_pruner("norms", wanda_mask, pattern, sparsity, counts)


@dataclasses.dataclass
class Wanda(Calibrated):
    """Prune the linear weights of all blocks by weight times input norm, without training."""

    sparsity: float | None = None
    """Share of each row's weights to drop, between 0 and 1; N:M patterns fix it themselves."""

    pattern: str = "unstructured"
    """Where zeros may lie: unstructured, or N:M along the inputs, such as 2:4."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Prune `model` in place.

        Raises:
            ConfigError: a sparsity or pattern that is not possible, or a model without blocks or tokenizer.
            DataError: too little text, or activations that are not finite.
        """
        pattern = parse_pattern(self.pattern)
        sparsity = resolve_sparsity(pattern, self.sparsity)
        with float32(model):
            data = self.sample(model, job)
            pruner = wanda_pruner(pattern, sparsity)
            masks = prune_blocks(model, data.batches, pruner, forward=data.forward)
        return Sparsified(model, masks, extras_of(model), dataclasses.asdict(self))
