"""What the methods that prune weights block by block share: masks from a block's visit, exact row counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.harness.workers import workers
from zoo.llm.blockwise import Forward, Opened, RunningBlock, block_chains, default_forward, walk_blocks
from zoo.shared.errors import PatternError
from zoo.shared.masks import Mask, MaskSet, set_masks
from zoo.shared.masks.patterns import NM, Pattern, Unstructured
from zoo.shared.masks.topk import topk_mask
from zoo.shared.measure.calibration import collect_activations, collect_hessians
from zoo.shared.pruning.budgets import kept_count

#: Chooses the masks of a block's linear weights, by their name in the block; may change the weights, too.
Prune = Callable[[RunningBlock], Mapping[str, Mask]]


def open_sparsity(sparsity: float) -> float:
    """Refuse a share of zeros outside (0, 1).

    Raises:
        ConfigError: 0 or less, 1 or more, or NaN.
    """
    if not 0.0 < sparsity < 1.0:
        raise ConfigError(f"sparsity is the share of weights to drop, between 0 and 1; received {sparsity}")
    return float(sparsity)


def prune_blocks(
    model: nn.Module,
    batches: Sequence[Any],
    prune: Prune,
    *,
    forward: Forward = default_forward,
    opened: Opened | None = None,
    collect: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> MaskSet:
    """Prune the blocks of a model in order, in place, each on what the pruned blocks before it put out.

    See `walk_blocks` for the arguments. Several processes share the batches, and sum up what they measure, so
    that each prunes to the same masks. The model carries the masks afterwards, if its weights are all in
    memory; `collect=False` forgets each block's masks, which take a byte per weight, and returns none.
    """
    masks: dict[str, Mask] = {}

    def visit(block: RunningBlock) -> None:
        chosen = MaskSet(dict(prune(block)))
        chosen.apply_(block.module)
        if collect:
            masks.update({f"{block.name}.{name}": mask for name, mask in chosen.items()})

    own = workers().share(batches)
    walk_blocks(model, own, visit, forward=forward, opened=opened, progress=progress)
    found = MaskSet(masks)
    if opened is None and collect:
        set_masks(model, found)
    return found


def block_weights(model: nn.Module) -> dict[str, Tensor]:
    """The linear weights inside the blocks, by their name in the model: what these methods prune."""
    return {
        f"{path}.{name}.weight": module.weight
        for path, chain in block_chains(model).items()
        for name, module in chain.named_modules()
        if isinstance(module, nn.Linear)
    }


def input_norms(block: RunningBlock) -> dict[str, Float[Tensor, " features"]]:
    """The L2 norm of each input feature of every linear layer of a block, by weight, over the batches of all
    processes.

    Raises:
        DataError: a norm that is not finite.
    """
    team, norms = workers(), collect_activations(block.module, range(len(block.inputs)), _run(block))
    return _finite(block, {name: team.sum(norm.square()).sqrt() for name, norm in norms.items()})


def input_hessians(block: RunningBlock) -> dict[str, Float[Tensor, "features features"]]:
    """2/n sum x x^T over the inputs of every linear layer of a block, by weight, over the batches of all
    processes.

    Raises:
        DataError: an entry that is not finite.
    """
    team, found = workers(), collect_hessians(block.module, range(len(block.inputs)), _run(block))
    tokens = torch.tensor(float(sum(hidden[..., 0].numel() for hidden in block.inputs)))
    share = float(tokens / team.sum(tokens))
    return _finite(block, {name: team.sum(share * hessian) for name, hessian in found.items()})


def _run(block: RunningBlock) -> Forward:
    return lambda module, batch: block.run(batch)


def _finite(block: RunningBlock, found: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise DataError(
                f"the inputs of {block.name}.{name.removesuffix('.weight')} are not finite on the "
                "calibration text; check the checkpoint, or load it in a wider dtype"
            )
    return found


def kept_of(weight: Tensor, sparsity: float) -> int:
    """Weights kept of a matrix each of whose rows loses floor(sparsity * columns)."""
    rows, columns = weight.shape
    return rows * kept_count(columns, sparsity)


def rowwise_mask(score: Float[Tensor, "out in"], kept: int) -> Bool[Tensor, "out in"]:
    """Keep the best of each row, `kept` entries in all: every row the same number, but for a remainder, whose
    entries go to the rows with the best next score. Ties go to the lower index.

    Raises:
        PatternError: a count that the matrix cannot keep, or scores that are NaN.
    """
    rows, columns = score.shape
    if not 0 <= kept <= score.numel():
        raise PatternError(f"a matrix {rows}x{columns} keeps 0 to {score.numel()} entries; received {kept}")
    base, extra = divmod(kept, max(1, rows))
    mask = NM(base, columns).keep(score, kept) if base else torch.zeros_like(score, dtype=torch.bool)
    if extra:
        best, place = score.masked_fill(mask, -torch.inf).max(dim=1)
        chosen = topk_mask(best, extra)
        mask[chosen.nonzero().flatten(), place[chosen]] = True
    return mask


def nm_pattern(pattern: Pattern) -> NM | None:
    """The N:M pattern, or None for an unstructured one.

    Raises:
        ConfigError: another pattern.
    """
    if isinstance(pattern, NM) and pattern.dim == -1:
        return pattern
    if isinstance(pattern, Unstructured):
        return None
    raise ConfigError(
        f"the pattern must be unstructured or N:M along the inputs, such as 2:4; received {pattern}"
    )


def resolve_sparsity(pattern: Pattern, sparsity: float | None) -> float:
    """The share of weights to drop: what an N:M pattern says, else the sparsity.

    Raises:
        ConfigError: no sparsity for an unstructured pattern, one outside (0, 1), or one that an N:M pattern
            contradicts.
    """
    fixed = pattern.fixed_density
    if fixed is None:
        if sparsity is None:
            raise ConfigError("an unstructured pattern needs a sparsity between 0 and 1")
        return open_sparsity(sparsity)
    if sparsity is not None and abs(1 - float(fixed) - sparsity) > 1e-9:
        raise ConfigError(
            f"{pattern} drops {1 - float(fixed):.4g} of the weights; received sparsity {sparsity}"
        )
    return 1 - float(fixed)
