"""Decoders whose thresholds save time: `execution="packed"` for models with thresholds on their activations.

    model = pack_model(attach(model, thresholds))

- A gated FFN computes its gate as before, then reads only the rows of W_up and W_down whose gate is open, in
  one call of `zoo.shared.ops.gated_product`; W_down is stored by its inputs.
- A projection with a threshold on its input is stored by its inputs and reads those that are not zero
  (`zoo.shared.ops.gather_linear`).
- Where the weights are sparse, too, the gate is a packed product and the other two are packed by mask bits.
- Weights of fewer than `SMALL` entries stay as they are: a token has been through them before what is open
  has been found.

Up to 8 tokens at a time (a decoding batch) use the union of their active sets; more, as in a prompt, take the
dense products.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.llm.models.thresholds import ThresholdedActivation, ThresholdedLinear, attach
from zoo.shared.masks import Mask, MaskSet, masks_of
from zoo.shared.measure.account import Counting, Macs, register_counter
from zoo.shared.ops import DenseRows, SparseLinear, SparseWeight, gather_linear, pack, packing, store_rows
from zoo.shared.ops.dense_linear import product
from zoo.shared.ops.gated_product import gated_product
from zoo.shared.ops.gather_linear import MOST_BATCH
from zoo.shared.ops.modules import LinearByRows

SMALL = 1 << 20
_STORED = (torch.float32, torch.bfloat16, torch.float16)


def pack_model(model: nn.Module) -> nn.Module:
    """Make the zeros of a model's masks and thresholds save time, in place; for inference only."""
    return packing.pack(model, masks_of(model) or MaskSet({}))


def take_extras(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the thresholds of a bundle on its model; see `zoo.llm.models.EXTRAS`."""
    attach(model, tensors)


class DenseStore(nn.Module):
    """A matrix stored row by row, whole rows of which are skipped."""

    data: Tensor

    def __init__(self, matrix: Float[Tensor, "rows cols"]) -> None:
        super().__init__()
        rows = store_rows(matrix)
        self.out_features, self.in_features = matrix.shape
        self.register_buffer("data", rows.data)

    @property
    def weight(self) -> DenseRows:
        """As the ops take it; in the dtype that the buffer has now."""
        return DenseRows(self.data, None, str(self.data.dtype).removeprefix("torch."), self.in_features)


class PackedInput(nn.Module):
    """A `ThresholdedLinear` that reads the weights of the inputs above the threshold.

    Args:
        linear: the layer.
    """

    bias: Tensor | None

    def __init__(self, linear: ThresholdedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.threshold = linear.threshold
        self.store = DenseStore(linear.weight.detach().t())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        x = self.threshold(x)
        if x.numel() <= MOST_BATCH * self.in_features:
            return gather_linear(x, self.store.weight, self.bias)
        y = product(x, self.store.weight.dense().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


class PackedSparseInput(nn.Module):
    """A `ThresholdedLinear` of sparse weights: the threshold, then the packed product."""

    def __init__(self, linear: ThresholdedLinear, mask: Mask) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.threshold = linear.threshold
        self.linear = SparseLinear.from_dense(linear.plain(), mask.keep).requires_grad_(False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y: Tensor = self.linear(self.threshold(x))
        return y


class PackedGatedMLP(nn.Module):
    """y = W_down (g * (W_up x + b)) + c with g = act(W_gate x) thresholded: closed channels are not read.

    Args:
        gate_proj: any module.
        act_fn: activation and threshold.
        up, down: W_up and W_down transposed, stored by channel, both dense or both packed.
        up_bias, down_bias: of the two projections.
    """

    up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        gate_proj: nn.Module,
        act_fn: ThresholdedActivation,
        up: DenseStore | SparseLinear,
        down: DenseStore | SparseLinear,
        up_bias: Float[Tensor, " f"] | None = None,
        down_bias: Float[Tensor, " d"] | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj, self.act_fn = gate_proj, act_fn
        self.up_proj, self.down_proj = up, down
        self.register_buffer("up_bias", up_bias)
        self.register_buffer("down_bias", down_bias)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        g = self.act_fn(self.gate_proj(x))
        y = gated_product(x, g, self.up_proj.weight, self.down_proj.weight, self.up_bias)
        return y if self.down_bias is None else y + self.down_bias


@packing.register_packer(ThresholdedLinear, masked=False)
def _pack_linear(module: nn.Module, masks: Mapping[str, Mask]) -> nn.Module | None:
    if not isinstance(module, ThresholdedLinear) or module.weight.dtype not in _STORED:
        return None
    if module.weight.numel() < SMALL:
        return None
    mask = masks.get("weight")
    if mask is not None and mask.sparsity >= packing.MIN_SPARSITY:
        return PackedSparseInput(module, mask)
    return PackedInput(module)


@packing.register_composite_packer
def _pack_mlp(module: nn.Module) -> nn.Module | None:
    """A gated FFN of any model, recognised by its parts and proved on a random input."""
    act_fn = getattr(module, "act_fn", None)
    parts = [getattr(module, f"{part}_proj", None) for part in ("gate", "up", "down")]
    if isinstance(module, PackedGatedMLP) or not isinstance(act_fn, ThresholdedActivation):
        return None
    gate, up, down = parts
    plain = (nn.Linear, LinearByRows, SparseLinear)
    if gate is None or up is None or down is None or type(up) not in plain or type(down) not in plain:
        return None
    if _weight(up).dtype not in _STORED or up.in_features * up.out_features < SMALL:
        return None
    stores: tuple[DenseStore | SparseLinear, DenseStore | SparseLinear]
    if isinstance(up, SparseLinear) and isinstance(down, SparseLinear):
        stores = (_by_bits(up.weight), _by_bits(_transposed(down.weight)))
    else:
        stores = (DenseStore(_weight(up)), DenseStore(_weight(down).t()))
    biases = [None if one.bias is None else one.bias.detach() for one in (up, down)]
    packed = PackedGatedMLP(gate, act_fn, stores[0], stores[1], biases[0], biases[1]).requires_grad_(False)
    return packed if _same(module, packed, up.in_features) else None


def _weight(linear: Any) -> Tensor:
    return linear.weight.to_dense() if isinstance(linear, SparseLinear) else linear.weight.detach()


def _transposed(weight: SparseWeight) -> SparseWeight:
    rows, cols = weight.coordinates()
    keep = torch.zeros(weight.shape, dtype=torch.bool, device=weight.values.device)
    keep[rows, cols] = True
    return pack(weight.to_dense().t().contiguous(), keep.t().contiguous(), "bitmask")


def _by_bits(weight: SparseWeight) -> SparseLinear:
    """The same weight in the layout of mask bits, whose rows can be skipped."""
    if weight.layout != "bitmask":
        rows, cols = weight.coordinates()
        keep = torch.zeros(weight.shape, dtype=torch.bool, device=weight.values.device)
        keep[rows, cols] = True
        weight = pack(weight.to_dense(), keep, "bitmask")
    return SparseLinear(weight)


@torch.no_grad()
def _same(module: nn.Module, packed: nn.Module, features: int) -> bool:
    """Whether the packed FFN computes what the module does (a family may use its parts in another way)."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(module.parameters())
    x = torch.randn(2, features, generator=generator).to(parameter)
    wanted, found = module(x), packed(x)
    scale = float(wanted.abs().amax())
    # A gate at its threshold may open in one and not in the other; sums are ordered differently.
    return bool((wanted - found).abs().mean() <= 0.02 * scale) and wanted.shape == found.shape


def _macs(module: nn.Module, args: Any, kwargs: Any, output: Tensor, counting: Counting) -> Macs:
    """Every kept weight once per token: what the thresholds spare depends on the text."""
    if isinstance(module, PackedInput):
        layers: tuple[Any, ...] = (module,)
    elif isinstance(module, PackedGatedMLP):
        layers = (module.gate_proj, module.up_proj, module.down_proj)
    else:
        return Macs(0, 0)
    tokens = args[0].numel() // args[0].shape[-1]
    weights = [_sizes(layer) for layer in layers]
    return Macs(tokens * sum(size for size, _ in weights), tokens * sum(kept for _, kept in weights))


def _sizes(layer: Any) -> tuple[int, int]:
    """Weights of a layer, and those kept."""
    size = layer.in_features * layer.out_features
    return size, layer.weight.kept if isinstance(layer, SparseLinear) else size


register_counter(PackedInput, _macs)
register_counter(PackedGatedMLP, _macs)
