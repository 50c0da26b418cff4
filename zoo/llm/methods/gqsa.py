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
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from zoo.errors import ConfigError
from zoo.llm.loss import language_forward, language_loss
from zoo.llm.models.blocks import find_blocks
from zoo.llm.models.quantised import GroupQuantLinear, check_group, replace_module
from zoo.shared.blocks import Forward, RunningBlock, measure_inputs, walk_blocks
from zoo.shared.learned.constraints.straight_through import pass_through, round_through
from zoo.shared.masks.patterns import NM, topk_mask
from zoo.shared.measure.calibration import LossFn, LossModule
from zoo.shared.ops.quant_sparse_linear import QuantGroups
from zoo.shared.pruning.budgets import kept_count
from zoo.shared.pruning.hessians import inverse_diagonal

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


@dataclass
class Quantiser:
    """The tunable quantiser of one weight.

    Attributes:
        weight: [out, groups, G], zero where dropped.
        scale, zero: [out, groups, 1]; zero is rounded when used.
        keep: [out, groups, G].
        bits: per weight.
    """

    weight: Float[Tensor, "out groups size"]
    scale: Float[Tensor, "out groups 1"]
    zero: Float[Tensor, "out groups 1"]
    keep: Bool[Tensor, "out groups size"]
    bits: int

    @classmethod
    def of(
        cls, weight: Float[Tensor, "out in"], keep: Bool[Tensor, "out in"], group: int, bits: int
    ) -> Quantiser:
        """Scale = (max - min) / (2^b - 1) over each group and zero, zero = round(-min / scale); a group of
        zeros has scale 1 (as `zoo.shared.ops.quantise_groups`)."""
        check_group(weight.shape[1], group)
        shape = (weight.shape[0], weight.shape[1] // group, group)
        kept = keep.reshape(shape)
        values = torch.where(kept, weight.detach().float().reshape(shape), 0.0)
        low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
        levels = 2**bits - 1
        scale = ((high - low) / levels).half().float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return cls(values, scale, (-low / scale).round().clamp(0, levels), kept, bits)

    def parameters(self) -> list[Tensor]:
        """Weight, scale and zero point."""
        return [self.weight, self.scale, self.zero]

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        positive = self.scale.clamp(min=2.0**-24)  # the smallest number that fp16 tells from zero
        scale = pass_through(positive, positive.half().float())
        return scale, round_through(self.zero).clamp(0, 2**self.bits - 1)

    def codes(self) -> Float[Tensor, "out groups size"]:
        """q of every weight, also of those dropped; differentiable through rounding."""
        scale, zero = self._scale_and_zero()
        return (round_through(self.weight / scale) + zero).clamp(0, 2**self.bits - 1)

    def dequantised(self, codes: Float[Tensor, "out groups size"] | None = None) -> Float[Tensor, "out in"]:
        """s (q - z) where kept, 0 elsewhere; with other codes, if they are frozen."""
        scale, zero = self._scale_and_zero()
        q = self.codes() if codes is None else codes
        return ((q - zero) * scale * self.keep).flatten(1)

    def pack(self, codes: Float[Tensor, "out groups size"] | None = None) -> QuantGroups:
        """The layout of the sparse op, exactly what `dequantised` gives.

        Raises:
            ConfigError: not four bits, or a group of which only a part is kept.
        """
        whole = self.keep.all(-1)
        if self.bits != 4 or not torch.equal(whole, self.keep.any(-1)):
            raise ConfigError("only four-bit weights whose groups are kept or dropped whole can be packed")
        scale, zero = (part.detach() for part in self._scale_and_zero())
        q = (self.codes() if codes is None else codes).detach()[whole].to(torch.uint8)
        pointer = torch.zeros(len(whole) + 1, dtype=torch.int32, device=whole.device)
        pointer[1:] = whole.sum(-1).cumsum(0)
        return QuantGroups(
            codes=(q[:, 0::2] | (q[:, 1::2] << 4)).contiguous(),
            scales=scale[whole].flatten().half(),
            zeros=zero[whole].flatten().to(torch.uint8),
            columns=whole.nonzero()[:, 1].to(torch.int16),
            pointer=pointer,
            shape=(whole.shape[0], whole.shape[1] * self.keep.shape[2]),
            group=self.keep.shape[2],
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
    rates = []
    for quantiser in quantisers.values():
        size = float(quantiser.weight.abs().sum() / quantiser.keep.sum().clamp(min=1))
        step = float(quantiser.scale.mean())
        slow = 0.1 * tuning.block_lr
        rates += [tuning.block_lr * size, slow * step, slow * 2**quantiser.bits]

    def batch_loss(i: int) -> Tensor:
        weights = {name: quantiser.dequantised() for name, quantiser in quantisers.items()}
        return (block.run(i, weights=weights) - targets[i]).square().mean()

    _descend(_flat(quantisers), rates, batch_loss, len(targets), tuning.block_epochs)


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
    parts, rates = [], []
    for quantiser in quantisers.values():
        parts += [quantiser.scale, quantiser.zero]
        rates += [tuning.model_lr * float(quantiser.scale.mean()), tuning.model_lr * 2**quantiser.bits]
    wrapped = LossModule(model, loss_fn)

    def batch_loss(i: int) -> Tensor:
        weights = {f"model.{name}": q.dequantised(codes[name]) for name, q in quantisers.items()}
        loss: Tensor = functional_call(wrapped, weights, (batches[i],))
        return loss

    if tuning.model_epochs:
        _descend(parts, rates, batch_loss, len(batches), tuning.model_epochs)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, quantiser in quantisers.items():
            parameters[name].copy_(quantiser.dequantised(codes[name]))
    return codes


def _flat(quantisers: dict[str, Quantiser]) -> list[Tensor]:
    return [part for quantiser in quantisers.values() for part in quantiser.parameters()]


def _descend(
    tensors: list[Tensor],
    rates: list[float],
    batch_loss: Callable[[int], Tensor],
    batches: int,
    epochs: int,
) -> None:
    """Adam with a cosine to zero over `epochs` passes; ends at the tensors with the least mean loss after any
    pass, the start included."""
    for tensor in tensors:
        tensor.requires_grad_()
    groups = [{"params": [tensor], "lr": rate} for tensor, rate in zip(tensors, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    order = torch.Generator().manual_seed(0)

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(float(batch_loss(i)) for i in range(batches)) / batches

    best, kept = mean_loss(), [tensor.detach().clone() for tensor in tensors]
    for _ in range(epochs):
        for i in torch.randperm(batches, generator=order).tolist():
            optimizer.zero_grad()
            batch_loss(i).backward()
            optimizer.step()
            schedule.step()
        loss = mean_loss()
        if math.isfinite(loss) and loss < best:
            best, kept = loss, [tensor.detach().clone() for tensor in tensors]
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.requires_grad_(False)
        tensor.copy_(value)


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
