"""ECoFLaP (Sung, Yoon and Bansal, ICLR 2024): how sparse each block becomes is decided from the whole model's
loss, which weights go is decided layer by layer.

Coarse: for every weight matrix W_l, alone, and noise z ~ N(0, 1) of its shape,

    score_l = mean over batches of |L(W_l + eps z) - L(W_l - eps z)| / (2 eps),

two forward passes and no gradient; its expectation is sqrt(2 / pi) ||dL/dW_l||_2 for small eps. The scores of
a block's matrices are added; every block keeps at least 1 - p_max of its weights and the rest of the budget
is shared in proportion to the scores. Fine: Wanda or SparseGPT prune each layer to its count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import nn

from zoo.errors import ConfigError, DataError
from zoo.harness.workers import workers
from zoo.llm.data.calibration import Calibrated, extras_of
from zoo.llm.loss import language_forward, language_loss
from zoo.llm.methods.sparsegpt import sparsegpt_pruner
from zoo.llm.methods.wanda import wanda_pruner
from zoo.llm.pruning import open_sparsity, prune_blocks
from zoo.methods.contract import Sparsified
from zoo.shared.blocks import Forward, block_name, chain_matrices, find_chains
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.masks.patterns import Unstructured
from zoo.shared.measure.calibration import LossFn, collect_gradients
from zoo.shared.measure.modes import eval_mode, float32
from zoo.shared.pruning.allocation import Slot, proportional
from zoo.shared.pruning.budgets import kept_count
from zoo.shared.train import Job


def block_weights(
    model: nn.Module, batches: Sequence[Any], forward: Forward = language_forward
) -> dict[str, nn.Parameter]:
    """The matrices inside the blocks, by their name in the model, as the first batch meets them.

    Raises:
        DataError: no batch.
        StructureError: no blocks, or weights that cannot be reached.
    """
    if not batches:
        raise DataError("No calibration batches; pass at least one.")
    known = dict(model.named_parameters())
    return {name: known[name] for name in chain_matrices(model, batches[0], forward)}


def zeroth_order_scores(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    loss_fn: LossFn = language_loss,
    forward: Forward = language_forward,
    eps: float = 1e-3,
    probes: int = 1,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float]:
    """The coarse score of every matrix inside the blocks, by name (see `block_weights`).

    The weights come back bit for bit (the perturbed ones are other tensors), and the model is in eval mode
    meanwhile, so that dropout does not drown the difference. Several processes share the tensors.

    Args:
        model: a transformer in float32.
        batches: one noise is drawn for each.
        loss_fn: scalar loss of a batch.
        forward: runs the model on a batch, to find its matrices.
        eps: size of the step.
        probes: noises per batch; the mean is taken.
        seed: of the noise.
        progress: called with (done, total, name) after each tensor.

    Raises:
        ConfigError: a step that is not positive, or weights in half precision, whose spacing eps falls below.
        DataError: no batch, or a loss that is not finite.
    """
    weights = block_weights(model, batches, forward)
    if not eps > 0 or probes < 1:
        raise ConfigError(f"eps must be positive and probes at least 1; received {eps} and {probes}")
    if any(weight.element_size() < 4 for weight in weights.values()):
        raise ConfigError("probing with a small eps needs weights in float32; load the model with that dtype")
    team, scores = workers(), {}
    with eval_mode(model), torch.no_grad():
        for index, (name, weight) in enumerate(weights.items()):
            if not team.owns(index):
                continue
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            original, total = weight.data, 0.0
            try:
                for batch in batches:
                    for _ in range(probes):
                        noise = eps * torch.randn(weight.shape, generator=generator).to(weight)
                        weight.data = original + noise
                        above = float(loss_fn(model, batch))
                        weight.data = original - noise
                        total += abs(above - float(loss_fn(model, batch))) / (2 * eps)
            finally:
                weight.data = original
            if not math.isfinite(total):
                raise DataError(
                    f"the loss is not finite when {name} is probed; check the checkpoint and the text"
                )
            scores[name] = total / (len(batches) * probes)
            if progress is not None:
                progress(index + 1, len(weights), name)
    gathered = dict(team.gather(list(scores.items())))
    return {name: gathered[name] for name in weights}


def first_order_scores(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    loss_fn: LossFn = language_loss,
    forward: Forward = language_forward,
) -> dict[str, float]:
    """sqrt(2 / pi) times the mean over batches of ||dL/dW_l||_2: what `zeroth_order_scores` estimates, by
    backpropagation."""
    names = list(block_weights(model, batches, forward))
    totals = dict.fromkeys(names, 0.0)
    with eval_mode(model):
        for batch in batches:
            gradients = collect_gradients(model, loss_fn, [batch])
            for name in names:
                totals[name] += float(gradients[name].norm())
    return {name: math.sqrt(2 / math.pi) * total / len(batches) for name, total in totals.items()}


def group_counts(
    sizes: Mapping[str, int],
    scores: Mapping[str, float],
    sparsity: float,
    max_sparsity: float,
    left: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Weights kept of each group; together exactly N - floor(sparsity * N).

    Every group keeps ceil(n (1 - max_sparsity)); the rest is shared in proportion to the scores, and what a
    full group cannot take goes to the others.

    Args:
        sizes: weights of each group.
        scores: of each group, not negative.
        sparsity: p, over all groups.
        max_sparsity: p_max, the most that one group may lose.
        left: weights of each group that an earlier pruning left; by default all.

    Raises:
        ConfigError: sparsity outside (0, 1), or above max_sparsity.
        DataError: scores that are negative, not finite, or all zero.
    """
    open_sparsity(sparsity)
    if not sparsity <= max_sparsity <= 1:
        raise ConfigError(
            f"max_sparsity must lie between the sparsity {sparsity} and 1; received {max_sparsity} "
            "(the paper adds 0.1)"
        )
    values = [scores[name] for name in sizes]
    if not all(math.isfinite(value) and value >= 0 for value in values) or not max(values, default=0.0) > 0:
        raise DataError(
            f"scores must be finite and not negative, one of them positive; received {values[:8]}"
        )
    least = 1 - Fraction(repr(float(max_sparsity)))
    most = sizes if left is None else left
    floors = {name: min(math.ceil(size * least), most[name]) for name, size in sizes.items()}
    room = kept_count(sum(sizes.values()), sparsity) - sum(floors.values())
    room = min(room, sum(most[name] - floors[name] for name in sizes))
    if room < 0:
        raise ConfigError(
            f"rounding the floors of max_sparsity {max_sparsity} up leaves no weight to share at sparsity "
            f"{sparsity}; raise max_sparsity a little"
        )
    slots = {name: _slot(most[name] - floors[name]) for name in sizes}
    # A group without any score still takes what the others, being full, cannot.
    tiny = max(values) * 1e-12
    shares = proportional(slots, room, {name: max(scores[name], tiny) for name in sizes})
    return {name: floors[name] + share for name, share in shares.items()}


def tensor_counts(
    model: nn.Module,
    scores: Mapping[str, float],
    sparsity: float,
    max_sparsity: float | None = None,
    group_score: Literal["sum", "mean"] = "sum",
) -> dict[str, int]:
    """Weights kept of each linear weight inside the blocks: `group_counts` over blocks, then the same share
    of every weight of a block.

    Args:
        model: the transformer.
        scores: by weight.
        sparsity: over all these weights.
        max_sparsity: most that one block may lose; by default sparsity + 0.1, at most 1.
        group_score: add a block's scores, or divide the sum by its number of weights.

    Raises:
        ConfigError, DataError: see `group_counts`.
    """
    open_sparsity(sparsity)
    sizes = {name: model.get_parameter(name).numel() for name in scores}
    masks = masks_of(model) or MaskSet({})
    left = {name: masks[name].kept if name in masks else size for name, size in sizes.items()}
    blocks: dict[str, list[str]] = {}
    for name in sizes:
        blocks.setdefault(_block_of(model, name), []).append(name)
    totals = {block: sum(sizes[name] for name in names) for block, names in blocks.items()}
    grouped = {block: sum(scores[name] for name in names) for block, names in blocks.items()}
    if group_score == "mean":
        grouped = {block: value / totals[block] for block, value in grouped.items()}
    ceiling = min(1.0, sparsity + 0.1) if max_sparsity is None else max_sparsity
    together = {block: sum(left[name] for name in names) for block, names in blocks.items()}
    counts = group_counts(totals, grouped, sparsity, ceiling, together)
    result: dict[str, int] = {}
    for block, names in blocks.items():
        slots = {name: _slot(left[name]) for name in names}
        result |= proportional(slots, counts[block], {name: float(sizes[name]) for name in names})
    return result


def _slot(size: int) -> Slot:
    return Slot((size,), Unstructured(), None, 0, size)


def _block_of(model: nn.Module, name: str) -> str:
    chains = find_chains(model).items()
    blocks = (block_name(path, index) for path, chain in chains for index in range(len(chain)))
    return next(block for block in blocks if name.startswith(f"{block}."))


@dataclasses.dataclass
class ECoFLaP(Calibrated):
    """Decide each block's sparsity from the model's loss, then prune layer by layer, without training."""

    sparsity: float = 0.5
    """Share of the blocks' linear weights to drop, between 0 and 1, exact over the model."""

    max_sparsity: float | None = None
    """Most that one block may lose; by default the sparsity plus 0.1."""

    coarse: Literal["zeroth", "first"] = "zeroth"
    """Block scores by forward passes alone, or by gradients."""

    local: Literal["wanda", "sparsegpt"] = "wanda"
    """How each layer is pruned to its count."""

    group_score: Literal["sum", "mean"] = "sum"
    """A block's score: the sum over its matrices, or that sum by its number of weights."""

    eps: float = 1e-3
    """Size of the probing step."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Prune `model` in place.

        Raises:
            ConfigError: options that are not possible, or a model without blocks or tokenizer.
            DataError: too little text, or a loss or activations that are not finite.
        """
        with float32(model):
            data = self.sample(model, job)
            run: dict[str, Any] = {"loss_fn": data.loss, "forward": data.forward}
            if self.coarse == "zeroth":
                scores = zeroth_order_scores(model, data.batches, eps=self.eps, seed=self.seed, **run)
            else:
                scores = first_order_scores(model, data.batches, **run)
            counts = tensor_counts(model, scores, self.sparsity, self.max_sparsity, self.group_score)
            pruner = wanda_pruner if self.local == "wanda" else sparsegpt_pruner
            prune = pruner(Unstructured(), self.sparsity, counts.__getitem__)
            masks = prune_blocks(model, data.batches, prune, forward=data.forward)
        return Sparsified(model, masks, extras_of(model), dataclasses.asdict(self))
