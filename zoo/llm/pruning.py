"""What the methods that prune weights block by block share: masks from a block's visit, exact counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.harness.workers import workers
from zoo.llm.loss import language_forward
from zoo.shared.blocks import Forward, MeasuredMatrices, Opened, RunningBlock, measure_inputs, walk_blocks
from zoo.shared.blocks.statistics import Kind
from zoo.shared.errors import PatternError
from zoo.shared.masks import Mask, MaskSet, tighten
from zoo.shared.masks.patterns import NM, Pattern, Unstructured
from zoo.shared.pruning.budgets import kept_count

#: Chooses the masks of a block's weights, by their name in the block; may change the weights, too.
Prune = Callable[[RunningBlock], Mapping[str, Mask]]
#: Chooses what stays of a matrix [out, in], a view that it may change, from a statistic of its inputs, the
#: count to keep, the N:M pattern or None, and what is left of an earlier pruning or None.
PruneMatrix = Callable[[Tensor, Tensor, int, NM | None, Tensor | None], Tensor]


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
    forward: Forward = language_forward,
    opened: Opened | None = None,
    collect: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> MaskSet:
    """Prune the blocks of a model in order, in place, each on what the pruned blocks before it put out.

    See `walk_blocks` for the arguments. Several processes share the batches, and sum up what they measure, so
    that each prunes to the same masks. Masks that the model carries already never loosen: what they drop
    stays dropped, and they remain where nothing is pruned anew. The model carries the masks afterwards, if
    its weights are all in memory; `collect=False` forgets each block's masks, which take a byte per weight.

    Returns:
        All masks that the model carries; with `collect=False` none.
    """
    masks: dict[str, Mask] = {}

    def visit(block: RunningBlock) -> None:
        chosen = MaskSet(block.masks) & MaskSet(dict(prune(block)))
        chosen.apply_(block.module)
        if collect:
            masks.update({f"{block.name}.{name}": mask for name, mask in chosen.items()})

    own = workers().share(batches)
    walk_blocks(model, own, visit, forward=forward, opened=opened, progress=progress)
    return tighten(model, MaskSet(masks)) if opened is None and collect else MaskSet(masks)


def matrix_pruner(
    kind: Kind,
    prune_matrix: PruneMatrix,
    pattern: Pattern,
    sparsity: float,
    counts: Callable[[str], int] | None = None,
) -> Prune:
    """The visit of a block, for `prune_blocks`, from what is done to one matrix.

    Args:
        kind: the statistic of the inputs that `prune_matrix` takes.
        prune_matrix: see `PruneMatrix`.
        pattern: unstructured or N:M along the inputs.
        sparsity: share of each weight to drop, where the pattern does not fix it; exact over the weight.
        counts: entries to keep by full name of the weight; by default the sparsity says it.
    """
    nm = nm_pattern(pattern)

    def prune(block: RunningBlock) -> dict[str, Mask]:
        masks = {}
        for name, measured in measure_inputs(block, kind, workers().sum).items():
            weight = measured.matrices.parameter
            kept = counts(f"{block.name}.{name}") if counts else kept_of(weight, sparsity)
            try:
                masks[name] = _mask(measured, kept, nm, prune_matrix, block.masks.get(name))
            except PatternError as error:
                raise PatternError(f"{block.name}.{name}: {error}") from None
        return masks

    return prune


def _mask(
    measured: MeasuredMatrices, kept: int, nm: NM | None, prune_matrix: PruneMatrix, before: Mask | None
) -> Mask:
    """The mask of a weight, matrix by matrix of a stack, which share the count evenly."""
    matrices = measured.matrices
    views = matrices.views()
    earlier = matrices.views(before.keep) if before is not None else [None] * len(views)
    keep = []
    for index, (view, values, old) in enumerate(zip(views, measured.values, earlier, strict=True)):
        count = kept * (index + 1) // len(views) - kept * index // len(views)
        if old is not None:
            old = old.to(view.device)
            count = min(count, int(old.count_nonzero()))
        if not bool(values.any()):
            # No row came here, as to an expert that was never chosen: all inputs count alike.
            values = torch.ones_like(values) if values.dim() == 1 else torch.eye(len(values)).to(values)
        keep.append(prune_matrix(view, values, count, nm, old))
    along = -1 if matrices.axis == matrices.parameter.dim() - 1 else matrices.axis
    return Mask(matrices.joined(keep), Unstructured() if nm is None else NM(nm.n, nm.m, along))


def kept_of(weight: Tensor, sparsity: float) -> int:
    """Entries that a weight keeps: all but floor(sparsity * entries)."""
    return kept_count(weight.numel(), sparsity)


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
