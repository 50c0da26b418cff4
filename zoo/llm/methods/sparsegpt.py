"""SparseGPT (Frantar and Alistarh, ICML 2023): columns are pruned from left to right, and the columns not yet
passed make up for each error.

With H = 2/n X^T X + damping and the upper Cholesky factor U of H^-1 (U^T U = H^-1), zeroing w_j of a row and
updating the rest optimally (optimal brain surgeon, columns before j frozen) is

    w_k -= w_j / U_jj * U_jk   for k >= j,   at a cost of w_j^2 / U_jj^2,

which is what weights are chosen by. Updates reach the columns of a block of `block` at once and the others
when the block is done.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.llm.data.calibration import Calibrated, extras_of
from zoo.llm.pruning import Prune, matrix_pruner, prune_blocks, resolve_sparsity
from zoo.methods.contract import Sparsified
from zoo.shared.masks.patterns import NM, Pattern, parse_pattern, topk_mask
from zoo.shared.measure.modes import float32
from zoo.shared.pruning.hessians import inverse_factor
from zoo.shared.train import Job


def sparsegpt_prune_(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    kept: int,
    nm: NM | None = None,
    before: Bool[Tensor, "out in"] | None = None,
    *,
    keep: Bool[Tensor, "out in"] | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> Bool[Tensor, "out in"]:
    """Prune a weight in place and adjust what stays.

    Args:
        weight: of a linear layer, any floating dtype; the work is done in float32.
        hessian: 2/n X^T X of its inputs.
        kept: entries that stay, shared out evenly over the blocks of columns; an N:M pattern decides it
            itself.
        nm: the N:M pattern, if there is one.
        before: what an earlier mask kept; the rest stays zero, and the count is of what it kept.
        keep: a mask that is given; then nothing is chosen and only the updates are made.
        block: columns per block, where weights are chosen together.
        damping: share of the mean diagonal added to H.

    Returns:
        The mask, with exactly `kept` entries.

    Raises:
        BudgetError: damping, see `inverse_factor`.
        ConfigError: a block that is no multiple of m.
        PatternError: an N:M pattern that does not fit.
    """
    rows, columns = weight.shape
    if nm is not None:
        nm.check_shape(weight.shape)
        if block % nm.m:
            raise ConfigError(f"block must be a multiple of {nm.m} for {nm}; received {block}")
    factor, dead = inverse_factor(hessian, damping)
    work = weight.detach().float().clone()
    work[:, dead] = 0
    left = torch.arange(columns + 1) * rows if before is None else _kept_up_to(before)
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part, local = work[:, start:end], factor[start:end, start:end]
        if keep is not None:
            chosen: Tensor | None = keep[:, start:end]
        elif nm is None:
            # Shares by cumulative rounding, so that the blocks' counts add up to `kept`.
            most = max(1, int(left[-1]))
            count = kept * int(left[end]) // most - kept * int(left[start]) // most
            cost = (part / local.diagonal()).square()
            if before is not None:
                cost = cost.masked_fill(~before[:, start:end], -1.0)
            chosen = topk_mask(cost, count)
        else:
            chosen = None  # chosen group by group below, on the updated weights
        errors, block_mask = _prune_columns_(
            part, local, chosen, nm, None if before is None else before[:, start:end]
        )
        mask[:, start:end] = block_mask
        work[:, end:] -= errors @ factor[start:end, end:]
    with torch.no_grad():
        weight.copy_(work.to(weight.dtype))
    return mask


def _kept_up_to(before: Tensor) -> Tensor:
    """Entries that a mask keeps left of each column, and of the end."""
    return torch.cat([torch.zeros(1, dtype=torch.long), before.sum(0).cumsum(0).cpu()])


def _prune_columns_(
    part: Tensor, factor: Tensor, chosen: Tensor | None, nm: NM | None, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Passes the columns of a block from left to right; errors divided by U_jj, and the mask."""
    mask = torch.ones_like(part, dtype=torch.bool) if chosen is None else chosen
    errors = torch.zeros_like(part)
    for j in range(part.shape[1]):
        if chosen is None and nm is not None and j % nm.m == 0:
            group = slice(j, j + nm.m)
            cost = (part[:, group] / factor.diagonal()[group]).square()
            if before is not None:
                cost = cost.masked_fill(~before[:, group], -1.0)
            mask[:, group] = nm.keep(cost, cost.numel() // nm.m * nm.n)
            if before is not None:
                mask[:, group] &= before[:, group]
        error = torch.where(mask[:, j], 0.0, part[:, j]) / factor[j, j]
        part[:, j + 1 :] -= error.unsqueeze(1) * factor[j, j + 1 :]
        part[:, j] *= mask[:, j]
        errors[:, j] = error
    return errors, mask


def sparsegpt_pruner(
    pattern: Pattern,
    sparsity: float,
    counts: Callable[[str], int] | None = None,
    *,
    block: int = 128,
    damping: float = 0.01,
) -> Prune:
    """The visit of a block, for `prune_blocks`; see `matrix_pruner` and `sparsegpt_prune_`."""
    prune_matrix = functools.partial(sparsegpt_prune_, block=block, damping=damping)
    return matrix_pruner("hessians", prune_matrix, pattern, sparsity, counts)


@dataclasses.dataclass
class SparseGPT(Calibrated):
    """Prune the linear weights of all blocks and adjust the others to make up for it, without training."""

    sparsity: float | None = None
    """Share of each layer's weights to drop, between 0 and 1; N:M patterns fix it themselves."""

    pattern: str = "unstructured"
    """Where zeros may lie: unstructured, or N:M along the inputs, such as 2:4."""

    block: int = 128
    """Columns that are chosen together."""

    damping: float = 0.01
    """Share of the mean diagonal added to the Hessian."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Prune `model` in place.

        Raises:
            ConfigError: a sparsity, pattern or damping that is not possible, or a model without blocks or
                tokenizer.
            DataError: too little text, or activations that are not finite.
        """
        pattern = parse_pattern(self.pattern)
        pruner = sparsegpt_pruner(
            pattern, resolve_sparsity(pattern, self.sparsity), block=self.block, damping=self.damping
        )
        with float32(model):
            data = self.sample(model, job)
            masks = prune_blocks(model, data.batches, pruner, forward=data.forward)
        return Sparsified(model, masks, extras_of(model), dataclasses.asdict(self))
