"""Linear layers whose weights are kept four-bit groups: as a bundle stores them, and as the op runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ConfigError
from zoo.shared.blocks import find_chains
from zoo.shared.masks import Mask
from zoo.shared.measure.account import Counting, Macs, register_counter
from zoo.shared.ops.packing import register_packer
from zoo.shared.ops.quant_panel_linear import QuantPanels, quant_panel_linear
from zoo.shared.ops.quant_sparse_linear import QuantGroups, quantise_groups


class GroupQuantLinear(nn.Module):
    """y = x W^T + b with W = scale (q - zero) over kept groups of G consecutive inputs, zero elsewhere.

    Codes, zero points and places are buffers; the scales are the only weights that train, so that fine-tuning
    tunes the quantiser, and neither a zero nor a code can be lost. The forward multiplies by the dequantised
    weight; `zoo.shared.ops.packing.pack` makes it a `PackedGroupLinear`.

    Args:
        groups: the weight.
        bias: or None.
    """

    codes: Tensor
    zeros: Tensor
    columns: Tensor
    pointer: Tensor

    def __init__(self, groups: QuantGroups, bias: Float[Tensor, " out"] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = groups.shape
        self.group = groups.group
        self.scales = nn.Parameter(groups.scales)
        for name in ("codes", "zeros", "columns", "pointer"):
            self.register_buffer(name, getattr(groups, name))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def empty(cls, linear: nn.Linear, group: int, kept: int) -> GroupQuantLinear:
        """A layer of the shape of `linear` each of whose rows keeps that many groups, to load stored tensors
        into.

        Raises:
            ConfigError: a group that is no multiple of 16 or does not divide the inputs, or too many of them.
        """
        rows, columns = linear.weight.shape
        check_group(columns, group)
        if not 0 <= kept <= columns // group:
            raise ConfigError(f"a row of {columns} inputs has {columns // group} groups; received {kept}")
        groups = QuantGroups(
            codes=torch.zeros(rows * kept, group // 2, dtype=torch.uint8),
            scales=torch.ones(rows * kept, dtype=torch.float16),
            zeros=torch.zeros(rows * kept, dtype=torch.uint8),
            columns=torch.arange(kept, dtype=torch.int16).repeat(rows),
            pointer=torch.arange(rows + 1, dtype=torch.int32) * kept,
            shape=(rows, columns),
            group=group,
        )
        return cls(groups, linear.bias)

    @property
    def groups(self) -> QuantGroups:
        """The weight as the op takes it; scales are rounded to fp16, in which they are stored."""
        return QuantGroups(
            self.codes,
            self.scales.detach().half().contiguous(),
            self.zeros,
            self.columns,
            self.pointer,
            (self.out_features, self.in_features),
            self.group,
        )

    def check_loaded(self) -> None:
        """Raise OpError if stored codes or places make no weight; the packed product refuses them, too."""
        self.groups.check()

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dequantised weight, float32; differentiable in the scales."""
        q = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1).float()
        values = (q - self.zeros.float().unsqueeze(1)) * self.scales.float().unsqueeze(1)
        rows = torch.repeat_interleave(
            torch.arange(self.out_features, device=self.codes.device), self.pointer.diff().long()
        )
        dense = values.new_zeros(self.out_features, self.in_features // self.group, self.group)
        return dense.index_put((rows, self.columns.long()), values).flatten(1)

    @property
    def coded_weights(self) -> int:
        """Weights that are kept as codes and not as parameters."""
        return self.columns.numel() * self.group

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}, "
            f"density={self.groups.density:.3f}"
        )


class PackedGroupLinear(nn.Module):
    """The same product by `zoo.shared.ops.quant_panel_linear`, which reads the kept groups only and rounds x
    to eight bits; for inference.

    Args:
        groups: the weight.
        bias: or None.
    """

    bias: Tensor | None

    def __init__(self, groups: QuantGroups, bias: Float[Tensor, " out"] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = groups.shape
        self.panels = QuantPanels.of(groups)
        self.coded_weights = groups.columns.numel() * groups.group  # that are kept
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return quant_panel_linear(x, self.panels, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.panels.group}"


def _macs(module: nn.Module, args: Any, kwargs: Any, output: Tensor, counting: Counting) -> Macs:
    """A kept group is multiplied by each row of the input."""
    if not isinstance(module, (GroupQuantLinear, PackedGroupLinear)):
        return Macs(0, 0)
    rows = output.numel() // module.out_features
    return Macs(rows * module.in_features * module.out_features, rows * module.coded_weights)


register_counter(GroupQuantLinear, _macs)
register_counter(PackedGroupLinear, _macs)


@register_packer(GroupQuantLinear, masked=False)
def _pack(module: nn.Module, masks: Mapping[str, Mask]) -> nn.Module | None:
    if not isinstance(module, GroupQuantLinear):
        return None
    return PackedGroupLinear(module.groups, None if module.bias is None else module.bias.detach())


def check_group(columns: int, group: int) -> None:
    """Raises ConfigError unless the inputs divide into groups of a size that the op takes."""
    if group < 16 or group % 16 or columns % group:
        raise ConfigError(
            f"groups of {group} do not fit {columns} inputs: the size must be a multiple of 16 that divides "
            "them (pad_ffn widens an FFN without changing the model)"
        )


def quantise_head(model: nn.Module, group: int) -> None:
    """Put the output layer of a causal LM in four-bit groups, all of them kept, in place. An embedding that
    it shared its weight with stays as it is.

    Raises:
        ConfigError: groups that do not fit its inputs.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    rows, columns = head.weight.shape
    check_group(columns, group)
    every = torch.ones(rows, columns // group, dtype=torch.bool, device=head.weight.device)
    _set_head(model, GroupQuantLinear(quantise_groups(head.weight, every, group), head.bias))


def _set_head(model: nn.Module, layer: GroupQuantLinear) -> None:
    model.set_output_embeddings(layer)  # type: ignore[operator]
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def with_empty_groups(model: nn.Module, group: int, kept: Mapping[str, int], head: bool = False) -> None:
    """Make the linear layers inside the blocks `GroupQuantLinear` that wait for their stored tensors, in
    place.

    Args:
        model: a transformer.
        group: inputs per group.
        kept: groups kept in each row, by the number of inputs of the layer (as text, for cards).
        head: whether the output layer is in groups, too; it keeps all of them.

    Raises:
        ConfigError: see `GroupQuantLinear.empty`; or a number of inputs that `kept` does not name.
    """
    if head:
        output: Any = model.get_output_embeddings()  # type: ignore[operator]
        _set_head(model, GroupQuantLinear.empty(output, group, output.in_features // group))
    for path in find_chains(model):
        stack = model.get_submodule(path)
        for name, module in list(stack.named_modules()):
            if isinstance(module, nn.Linear):
                columns = str(module.in_features)
                if columns not in kept:
                    raise ConfigError(f"kept says nothing of layers with {columns} inputs: {dict(kept)}")
                replace_module(stack, name, GroupQuantLinear.empty(module, group, kept[columns]))


def group_arguments(model: nn.Module) -> dict[str, Any] | None:
    """The arguments of `with_empty_groups` that make the layers of this model; None if it has none of them.

    Raises:
        ConfigError: layers that these arguments cannot tell apart.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [m for m in model.modules() if isinstance(m, GroupQuantLinear) and m is not head]
    if not layers:
        return None
    kept: dict[str, int] = {}
    for layer in layers:
        per_row, rest = divmod(layer.columns.numel(), layer.out_features)
        known = kept.setdefault(str(layer.in_features), per_row)
        if rest or known != per_row or layer.group != layers[0].group:
            raise ConfigError(
                f"layers of {layer.in_features} inputs keep unequal numbers of groups, which cannot be "
                "stored: choose groups with spread='row'"
            )
    quantised_head = {"head": True} if isinstance(head, GroupQuantLinear) else {}
    return {"group": layers[0].group, "kept": kept, **quantised_head}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
