"""GQSA (Zeng et al. 2024): 1 x G groups of weights dropped, the others in four bits, tuned in two stages.

A group's saliency is the mean of w_j^2 / [H^-1]_jj^2 over its G weights; the lowest go, in each row the same
number. A kept group is rounded to q = clamp(round(w / s) + z, 0, 2^b - 1) and stands for w^ = s (q - z).

- BQPO: block after block, weights, scales and zero points are tuned so that the block, fed with what the
  compressed blocks before it put out, gives what the dense block gives on the dense stream.
- E2E-OQP: the codes q are frozen and scales and zero points are tuned on the language-model loss.

Rounding passes gradients straight through. The source could not be compared with released code.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from zoo.bundles.card import share_dropped
from zoo.bundles.store import PART_MASK
from zoo.errors import ConfigError
from zoo.llm.data.calibration import Calibrated, extras_of
from zoo.llm.loss import language_forward, language_loss
from zoo.llm.models import architecture_of
from zoo.llm.models.blocks import find_blocks
from zoo.llm.models.quantised import GroupQuantLinear, check_group, quantise_head, replace_module
from zoo.llm.models.quantiser import Quantiser
from zoo.llm.pruning import open_sparsity
from zoo.methods.contract import Sparsified
from zoo.shared.blocks import Forward, RunningBlock, measure_inputs, walk_blocks
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.masks.patterns import NM, topk_mask
from zoo.shared.measure.calibration import LossFn, LossModule
from zoo.shared.measure.modes import float32
from zoo.shared.pruning.budgets import kept_count
from zoo.shared.pruning.hessians import inverse_diagonal
from zoo.shared.train import Fit, Job, Recipe

Spread = Literal["row", "layer"]
#: Chooses which weights of a layer stay, [out, in], from the weight and H = 2/n X^T X.
ChooseMask = Callable[[Tensor, Tensor], Tensor]


def group_saliency(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], group: int, damping: float = 0.01
) -> Float[Tensor, "out groups"]:
    """Mean of w^2 / [H^-1]_jj^2 over each group, with H damped by a share of its mean diagonal.

    Raises:
        ConfigError: a group that does not divide the inputs.
    """
    check_group(weight.shape[1], group)
    saliency = weight.detach().double().square() / inverse_diagonal(hessian, damping).square()
    return saliency.unflatten(1, (-1, group)).mean(-1).float()


def group_mask(
    saliency: Float[Tensor, "out groups"], sparsity: float, spread: Spread = "row"
) -> Bool[Tensor, "out groups"]:
    """Which groups stay: all but floor(sparsity * groups) of each row, or as many over the whole layer.

    Raises:
        ConfigError: no whole group of a row would be dropped, although the sparsity is above 0.
    """
    rows, columns = saliency.shape
    kept = kept_count(columns, sparsity)
    if sparsity > 0 and kept == columns:
        raise ConfigError(
            f"sparsity {sparsity} of {columns} groups per row drops none; raise it to at least "
            f"{1 / columns:.3f} or use smaller groups"
        )
    if spread == "row":
        return NM(kept, columns).keep(saliency, rows * kept)
    return topk_mask(saliency.flatten(), rows * kept).view_as(saliency)


_DESCENT = Recipe(
    lr=1.0,  # each parameter has its own
    optimizer="adam",
    options={"betas": (0.9, 0.95)},
    weight_decay=0.0,
    warmup=0.0,
    decay="cosine",
    select="best",
)


@dataclass(frozen=True)
class Tuning:
    """How the two stages are run; 0 epochs leave a stage out.

    Args:
        block_epochs: BQPO, passes over the calibration batches per block.
        block_lr: Adam's rate for the weights, relative to each layer's mean |w|; scales and zero points
            move at a tenth of it.
        model_epochs: E2E-OQP, passes over the calibration batches.
        model_lr: Adam's rate for scales (relative to their mean); zero points move at it in units of a code.
    """

    block_epochs: int = 8
    block_lr: float = 0.02
    model_epochs: int = 4
    model_lr: float = 0.005


def quantise_blocks(
    model: nn.Module,
    batches: Sequence[Any],
    choose: ChooseMask,
    *,
    group: int = 16,
    bits: int = 4,
    tuning: Tuning | None = None,
    forward: Forward = language_forward,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Quantiser]:
    """Drop and quantise the linear weights of all blocks, in order and in place, with BQPO.

    The model's weights become the dequantised ones.

    Args:
        model: a transformer in float32.
        batches: calibration batches.
        choose: which weights of a layer stay.
        group: inputs per group.
        bits: per weight.
        tuning: None tunes nothing.
        forward: runs the model on a batch.
        progress: called with (done, total, name) after each block.

    Returns:
        The quantiser of each weight, by name in the model.

    Raises:
        ConfigError: a group that does not divide the inputs of a layer.
        DataError: activations that are not finite.
    """
    dense: list[Tensor] = []  # the stream of the dense model
    found: dict[str, Quantiser] = {}

    def visit(block: RunningBlock) -> None:
        if block.index == 0:
            dense[:] = block.inputs
        dense[:] = [block.run(i, hidden) for i, hidden in enumerate(dense)]
        hessians = {name: one.values[0] for name, one in measure_inputs(block, "hessians").items()}
        own = {}
        if missed := set(hessians) - {f"{name}.weight" for name in block.linears()}:
            raise ConfigError(
                f"GQSA codes plain linear layers; {block.name}.{sorted(missed)[0]} is none (Conv1D or fused "
                "experts)"
            )
        for name, linear in block.linears().items():
            key = f"{name}.weight"
            own[key] = Quantiser.of(linear.weight, choose(linear.weight, hessians.pop(key)), group, bits)
        if tuning is not None and tuning.block_epochs:
            _tune_block(block, own, dense, tuning)
        for name, linear in block.linears().items():
            linear.weight.copy_(own[f"{name}.weight"].dequantised())
        found.update({f"{block.name}.{key}": quantiser for key, quantiser in own.items()})

    walk_blocks(model, batches, visit, forward=forward, progress=progress)
    return found


@torch.enable_grad()
def _tune_block(
    block: RunningBlock, quantisers: dict[str, Quantiser], targets: list[Tensor], tuning: Tuning
) -> None:
    """BQPO of one block: the best parameters met, which are never worse than those at the start."""
    rates: list[tuple[nn.Parameter, float]] = []
    for quantiser in quantisers.values():
        size = float(quantiser.weight.abs().sum() / quantiser.keep.sum().clamp(min=1))
        slow = 0.1 * tuning.block_lr
        rates += [
            (quantiser.weight, tuning.block_lr * size),
            (quantiser.scale, slow * float(quantiser.scale.mean())),
            (quantiser.zero, slow * 2**quantiser.bits),
        ]

    def batch_loss(i: int) -> Tensor:
        weights = {name: quantiser.dequantised() for name, quantiser in quantisers.items()}
        return (block.run(i, weights=weights) - targets[i]).square().mean()

    _descend(quantisers, rates, batch_loss, len(targets), tuning.block_epochs)


@torch.enable_grad()
def tune_model(
    model: nn.Module,
    quantisers: dict[str, Quantiser],
    batches: Sequence[Any],
    tuning: Tuning,
    *,
    loss_fn: LossFn = language_loss,
) -> dict[str, Float[Tensor, "out groups size"]]:
    """E2E-OQP: scales and zero points on the loss of the whole model, codes frozen; the model's weights
    follow, in place.

    The best parameters met on the batches are kept; those at the start are among them.

    Returns:
        The frozen codes, for `Quantiser.pack`.
    """
    codes = {name: quantiser.codes().detach() for name, quantiser in quantisers.items()}
    rates: list[tuple[nn.Parameter, float]] = []
    for quantiser in quantisers.values():
        rates.append((quantiser.scale, tuning.model_lr * float(quantiser.scale.mean())))
        rates.append((quantiser.zero, tuning.model_lr * 2**quantiser.bits))
    wrapped = LossModule(model, loss_fn)

    def batch_loss(i: int) -> Tensor:
        weights = {f"model.{name}": q.dequantised(codes[name]) for name, q in quantisers.items()}
        loss: Tensor = functional_call(wrapped, weights, (batches[i],))
        return loss

    if tuning.model_epochs:
        _descend(quantisers, rates, batch_loss, len(batches), tuning.model_epochs)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, quantiser in quantisers.items():
            parameters[name].copy_(quantiser.dequantised(codes[name]))
    return codes


@dataclass
class _Places:
    """Numbers of the calibration batches as data: each epoch in another order, drawn by one generator."""

    count: int

    def __post_init__(self) -> None:
        self.order = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return self.count

    def draw(self, generator: torch.Generator) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=self.order).tolist())

    def example(self) -> tuple[int]:
        return (0,)


def _descend(
    quantisers: dict[str, Quantiser],
    rates: list[tuple[nn.Parameter, float]],
    batch_loss: Callable[[int], Tensor],
    batches: int,
    epochs: int,
) -> None:
    """Adam with a cosine to zero over `epochs` passes; ends at the parameters with the least mean loss after
    any pass, the start included."""
    for parameter, _ in rates:
        parameter.requires_grad_()
    fit = Fit(
        nn.ModuleList(quantisers.values()),
        _Places(batches),
        dataclasses.replace(_DESCENT, epochs=epochs),
        loss=lambda _, place: batch_loss(place),
        score=lambda _: -sum(float(batch_loss(i)) for i in range(batches)) / batches,
        parameters=[{"params": [parameter], "lr": rate} for parameter, rate in rates],
        macs=lambda: 0.0,
    )
    start = [parameter.detach().clone() for parameter, _ in rates]
    with torch.no_grad():
        least = fit.score(fit.model) if fit.score else math.nan
    fit.run()
    for (parameter, _), before in zip(rates, start, strict=True):
        parameter.requires_grad_(False)
        if fit.best is None or not fit.best.score > least:
            parameter.copy_(before)


def pack_model(
    model: nn.Module,
    quantisers: dict[str, Quantiser],
    codes: dict[str, Float[Tensor, "out groups size"]] | None = None,
) -> None:
    """Replace the quantised linear layers of a model by `GroupQuantLinear`, in place; outputs stay the same.

    Raises:
        ConfigError: see `Quantiser.pack`.
    """
    for name, quantiser in quantisers.items():
        owner = name.removesuffix(".weight")
        linear: Any = model.get_submodule(owner)
        groups = quantiser.pack(None if codes is None else codes[name])
        replace_module(model, owner, GroupQuantLinear(groups, linear.bias).train(linear.training))


def pad_ffn(model: nn.Module, multiple: int = 16) -> nn.Module:
    """A copy whose FFN widths are multiples of `multiple`, by channels that are zero: the same function.

    Groups of 16 inputs need it where an FFN has 172 channels, say.
    """
    model = copy.deepcopy(model)
    widths = []
    for block in find_blocks(model):
        extra = -block.up.out_features % multiple
        for part, linear in (("gate_proj", block.gate), ("up_proj", block.up), ("down_proj", block.down)):
            rows, columns = linear.weight.shape
            shape = (rows, columns + extra) if part == "down_proj" else (rows + extra, columns)
            wider = nn.Linear(shape[1], shape[0], bias=linear.bias is not None, dtype=linear.weight.dtype)
            with torch.no_grad():
                wider.weight.zero_()[:rows, :columns] = linear.weight
                if linear.bias is not None:
                    wider.bias.zero_()[:rows] = linear.bias
            replace_module(model, f"{block.mlp_name}.{part}", wider.train(linear.training))
        widths.append(block.up.out_features + extra)
        if hasattr(block.mlp, "intermediate_size"):
            setattr(block.mlp, "intermediate_size", widths[-1])  # noqa: B010
    config: Any = model.config
    config.intermediate_size = max(widths)
    return model


def choose_groups(group: int, sparsity: float, spread: Spread = "row") -> ChooseMask:
    """GQSA's choice of weights, for `quantise_blocks`: whole groups by saliency."""

    def choose(weight: Tensor, hessian: Tensor) -> Tensor:
        if sparsity == 0:
            return torch.ones_like(weight, dtype=torch.bool)
        kept = group_mask(group_saliency(weight, hessian, group), sparsity, spread)
        return kept.repeat_interleave(group, dim=1)

    return choose


def stored_bits(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(name, bits stored, weights of the dense layer) of each quantised layer."""
    for name, module in model.named_modules():
        if isinstance(module, GroupQuantLinear):
            yield name, 8 * module.groups.nbytes, module.out_features * module.in_features


@dataclass
class GQSA(Calibrated):
    """Drop groups of weights and store the others in four bits, tuned block by block and end to end."""

    sparsity: float = 0.5
    """Share of each row's groups to drop, between 0 and 1."""

    group: int = 16
    """Consecutive inputs per group, a multiple of 16."""

    block_epochs: int = Tuning.block_epochs
    """BQPO: passes over the text per block; 0 leaves it out."""

    model_epochs: int = Tuning.model_epochs
    """E2E-OQP: passes over the text; 0 leaves it out."""

    head: bool = False
    """Store the output layer in four bits, too, all of it; the embedding stays as it is."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Compress `model` in place: its blocks' linear layers become `GroupQuantLinear`.

        Raises:
            ConfigError: options that are not possible, a model that carries masks, or one without blocks or
                tokenizer.
            DataError: too little text, or activations that are not finite.
        """
        open_sparsity(self.sparsity)
        if masks_of(model):
            raise ConfigError("GQSA chooses its own zeros; start from a dense model")
        tuning = Tuning(block_epochs=self.block_epochs, model_epochs=self.model_epochs)
        with float32(model):
            batches = self.tokens(model, job, size=8)
            choose = choose_groups(self.group, self.sparsity)
            quantisers = quantise_blocks(model, batches, choose, group=self.group, tuning=tuning)
            codes = tune_model(model, quantisers, batches, tuning)
            pack_model(model, quantisers, codes)
            if self.head:
                quantise_head(model, self.group)
        set_masks(model, None)
        keep = torch.cat([quantiser.keep.any(-1).flatten() for quantiser in quantisers.values()]).cpu()
        kept, total = int(keep.sum()), keep.numel()
        part = {"kept": kept, "total": total, "sparsity": share_dropped(kept, total)}
        return Sparsified(
            model,
            MaskSet({}),
            extras_of(model) | {f"groups{PART_MASK}": keep},
            dataclasses.asdict(self) | {"bits": 4},
            {"groups": {**part, "pattern": f"block1x{self.group}"}},
            architecture_of(model)["args"],
        )
