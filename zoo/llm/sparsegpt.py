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
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.llm.blockwise import RunningBlock
from zoo.llm.calibration import Calibrated, extras_of
from zoo.llm.models import float32
from zoo.llm.pruning import input_hessians, kept_of, nm_pattern, prune_blocks, resolve_sparsity
from zoo.methods.contract import Sparsified
from zoo.shared.masks import Mask
from zoo.shared.masks.patterns import NM, Pattern, Unstructured, parse_pattern, topk_mask


def inverse_factor(
    hessian: Float[Tensor, "in in"], damping: float
) -> tuple[Float[Tensor, "in in"], Bool[Tensor, " in"]]:
    """U, upper triangular, with U^T U = (H + damping * mean(diag H) * I)^-1, and which inputs never fired.

    An input that never fired gets 1 on the diagonal; its weights are worth nothing.

    Raises:
        ConfigError: a damping that is not positive, or too small for this matrix.
    """
    if not damping > 0:
        raise ConfigError(f"damping is a positive share of the mean diagonal of H; received {damping}")
    matrix = hessian.float().clone()
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    diagonal += damping * diagonal.mean()
    diagonal[dead] = 1.0
    try:
        lower = torch.linalg.cholesky(matrix)
        inverse = torch.cholesky_inverse(lower)
        return torch.linalg.cholesky(inverse, upper=True), dead
    except torch.linalg.LinAlgError as error:
        raise ConfigError(
            f"H of {len(matrix)} inputs cannot be inverted with damping {damping}; raise the damping or "
            "calibrate on more text"
        ) from error


def sparsegpt_prune_(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    kept: int,
    nm: NM | None = None,
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
        keep: a mask that is given; then nothing is chosen and only the updates are made.
        block: columns per block, where weights are chosen together.
        damping: share of the mean diagonal added to H.

    Returns:
        The mask, with exactly `kept` entries.

    Raises:
        ConfigError: damping (see `inverse_factor`), or a block that is no multiple of m.
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
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part, local = work[:, start:end], factor[start:end, start:end]
        if keep is not None:
            chosen: Tensor | None = keep[:, start:end]
        elif nm is None:
            # Shares by cumulative rounding, so that the blocks' counts add up to `kept`.
            count = kept * end // columns - kept * start // columns
            chosen = topk_mask((part / local.diagonal()).square().flatten(), count).view_as(part)
        else:
            chosen = None  # chosen group by group below, on the updated weights
        errors, block_mask = _prune_columns_(part, local, chosen, nm)
        mask[:, start:end] = block_mask
        work[:, end:] -= errors @ factor[start:end, end:]
    with torch.no_grad():
        weight.copy_(work.to(weight.dtype))
    return mask


def _prune_columns_(
    part: Tensor, factor: Tensor, chosen: Tensor | None, nm: NM | None
) -> tuple[Tensor, Tensor]:
    """Passes the columns of a block from left to right; errors divided by U_jj, and the mask."""
    mask = torch.ones_like(part, dtype=torch.bool) if chosen is None else chosen
    errors = torch.zeros_like(part)
    for j in range(part.shape[1]):
        if chosen is None and nm is not None and j % nm.m == 0:
            group = slice(j, j + nm.m)
            cost = (part[:, group] / factor.diagonal()[group]).square()
            mask[:, group] = nm.keep(cost, cost.numel() // nm.m * nm.n)
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
) -> Callable[[RunningBlock], dict[str, Mask]]:
    """The visit of a block, for `prune_blocks`; see `wanda_pruner` and `sparsegpt_prune_`."""
    nm = nm_pattern(pattern)

    def prune(running: RunningBlock) -> dict[str, Mask]:
        hessians = input_hessians(running)
        masks = {}
        for name, linear in running.linears().items():
            key = f"{name}.weight"
            kept = counts(f"{running.name}.{key}") if counts else kept_of(linear.weight, sparsity)
            keep = sparsegpt_prune_(linear.weight, hessians.pop(key), kept, nm, block=block, damping=damping)
            masks[key] = Mask(keep, nm or Unstructured())
        return masks

    return prune


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

    def sparsify(self, model: nn.Module) -> Sparsified:
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
            masks = prune_blocks(model, self.batches(model), pruner)
        return Sparsified(model, masks, extras_of(model), dataclasses.asdict(self))
