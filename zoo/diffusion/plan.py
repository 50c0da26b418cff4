"""Plans of what is cut from a diffusion network, and the surgery that carries them out.

A plan is plain data (JSON): which heads and neurons of which module stay, and which layers are dropped. The
network keeps its class tree and its call signatures: a dropped layer, or a module without units, is replaced
by a stub that returns what the emptied module would return, so that skip connections stay in step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel, Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn

from zoo.diffusion.units import Layer, UnitGroup, layers, unit_groups
from zoo.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """What stays of a network.

    Attributes:
        units: indices of the units that stay, by the name of their group (`path:heads`, `path:neurons`);
            groups that are not named stay whole.
        dropped: paths of the layers that go.
    """

    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {
            "units": {name: list(kept) for name, kept in self.units.items()},
            "dropped": list(self.dropped),
        }

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote.

        Raises:
            ConfigError: fields of another kind.
        """
        if not isinstance(plan, Mapping) or set(plan) - {"units", "dropped"}:
            raise ConfigError(f"a pruning plan has the fields 'units' and 'dropped'. Received: {plan!r:.200}")
        units, dropped = plan.get("units", {}), plan.get("dropped", [])
        whole = isinstance(units, Mapping) and all(
            isinstance(kept, (list, tuple)) and all(type(index) is int for index in kept)
            for kept in units.values()
        )
        if (
            not whole
            or not isinstance(dropped, (list, tuple))
            or not all(isinstance(d, str) for d in dropped)
        ):
            raise ConfigError("a pruning plan lists unit indices by group and paths of dropped layers")
        return cls({name: tuple(kept) for name, kept in units.items()}, tuple(dropped))


def apply_plan(network: nn.Module, plan: Plan) -> None:
    """Cut a network in place.

    Raises:
        ConfigError: the plan is of another network: a group or layer that is not there, an index out of range
            or named twice, or a layer that cannot go.
    """
    groups = {group.name: group for group in unit_groups(network)}
    known = {layer.name: layer for layer in layers(network)}
    for name in plan.dropped:
        _check_layer(name, known)
    if len(set(plan.dropped)) != len(plan.dropped):
        raise ConfigError("the pruning plan drops a layer twice")
    for name, kept in plan.units.items():
        if name not in groups:
            raise ConfigError(f"the pruning plan names {name!r}, which this {type(network).__name__} has not")
        if len(set(kept)) != len(kept) or any(not 0 <= index < groups[name].count for index in kept):
            raise ConfigError(
                f"the pruning plan keeps units of {name!r} that are not 0 to {groups[name].count - 1}"
            )
    for name, kept in plan.units.items():
        if not any(name.startswith(f"{gone}.") or name.startswith(f"{gone}:") for gone in plan.dropped):
            _cut(network, groups[name], sorted(kept))
    for name in plan.dropped:
        drop_layer(network, name)


def _check_layer(name: str, known: Mapping[str, Layer]) -> None:
    if name not in known:
        raise ConfigError(f"the pruning plan drops {name!r}, which is no layer of this network")
    if not known[name].removable:
        raise ConfigError(f"{name!r} cannot be dropped: {known[name].reason}")


def drop_layer(network: nn.Module, name: str) -> nn.Module:
    """Replace a layer by a stub in place; returns the layer, so that it can be put back."""
    layer = network.get_submodule(name)
    set_module(network, name, without_layer(layer))
    return layer


def set_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module where another one is."""
    parent, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


def _cut(network: nn.Module, group: UnitGroup, kept: list[int]) -> None:
    if len(kept) == group.count:
        return
    module = network.get_submodule(group.module)
    if not kept and not isinstance(module, FluxSingleTransformerBlock):
        set_module(network, group.module, without_units(module))
        return
    columns = torch.tensor(
        [unit * group.width + k for unit in kept for k in range(group.width)], dtype=torch.long
    )
    for part in group.rows:
        linear: Any = network.get_submodule(part.linear)
        size = linear.out_features // part.halves
        rows = torch.cat([columns + half * size for half in range(part.halves)])
        _keep_rows(linear, rows)
    for where in group.columns:
        linear = network.get_submodule(where.linear)
        assert isinstance(linear, nn.Linear)  # as `unit_groups` has made sure of
        # Units before this group in the same projection may have been cut already: count from the end.
        start = linear.in_features - group.count * group.width if where.start else 0
        stop = start + group.count * group.width
        untouched = torch.arange(linear.in_features)
        _keep_columns(linear, torch.cat([untouched[:start], columns + start, untouched[stop:]]))
    _update_counts(module, group, len(kept))


def _keep_rows(linear: nn.Module, rows: Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    linear.weight = _part(linear.weight, rows, 0)
    if linear.bias is not None:
        linear.bias = _part(linear.bias, rows, 0)
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Module, columns: Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    linear.weight = _part(linear.weight, columns, 1)
    linear.in_features = len(columns)


def _part(parameter: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    chosen = parameter.detach().index_select(dim, index.to(parameter.device)).clone()
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


def _update_counts(module: Any, group: UnitGroup, kept: int) -> None:
    """Tell a module how many heads it has, since forward reshapes by them."""
    if isinstance(module, FluxSingleTransformerBlock):
        if group.kind == "neurons":
            module.mlp_hidden_dim = kept
            return
        if kept == 0:
            module.attn = NoHeads()
            return
        module = module.attn
    if group.kind == "neurons":
        return
    module.heads, module.inner_dim = kept, kept * group.width
    if isinstance(module, Attention):
        module.inner_kv_dim = module.inner_dim
        module.sliceable_head_dim = kept


class NoHeads(nn.Module):
    """An attention without heads inside a block that projects itself: no columns at all."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states[..., :0]


class Bias(nn.Module):
    """What an attention or feed-forward without units adds: the bias of its down-projection, everywhere."""

    def __init__(self, down: nn.Linear) -> None:
        super().__init__()
        bias = down.bias if down.bias is not None else torch.zeros(down.out_features, dtype=down.weight.dtype)
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.bias.to(hidden_states.dtype).expand(*hidden_states.shape[:-1], -1)


class JointBias(nn.Module):
    """The same for attention over image and text together, which returns both streams."""

    def __init__(self, image: nn.Linear, text: nn.Linear | None) -> None:
        super().__init__()
        self.image, self.text = Bias(image), Bias(text) if text is not None else None

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        image = self.image(hidden_states)
        if encoder_hidden_states is None:
            return image
        text = encoder_hidden_states if self.text is None else self.text(encoder_hidden_states)
        return image, text


class ResidualBias(nn.Module):
    """The same for attention on feature maps, which adds its own input."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        assert attention.to_out is not None
        self.bias, self.scale = Bias(attention.to_out[0]).bias, attention.rescale_output_factor

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        bias = self.bias.view(-1, 1, 1) if hidden_states.dim() == 4 else self.bias
        return (hidden_states + bias) / self.scale


class NoResnet(nn.Module):
    """A residual convolution layer without its residual: what is left is the shortcut."""

    def __init__(self, layer: ResnetBlock2D) -> None:
        super().__init__()
        self.conv_shortcut, self.scale = layer.conv_shortcut, layer.output_scale_factor

    def forward(self, input_tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        kept = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return kept / self.scale


class NoTransformer(nn.Module):
    """A dropped Transformer2DModel: its input."""

    def forward(self, hidden_states: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)


class NoBlock(nn.Module):
    """A dropped transformer block with one stream: its input."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class NoJointBlock(nn.Module):
    """A dropped transformer block with an image and a text stream: both inputs, text first."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states, hidden_states


class NoAttention(nn.Module):
    """A dropped attention on feature maps: its input."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states / self.scale


def without_layer(layer: nn.Module) -> nn.Module:
    """The stand-in of a layer that is dropped whole: its input, or the shortcut of a residual layer."""
    if isinstance(layer, ResnetBlock2D):
        return NoResnet(layer)
    if isinstance(layer, Transformer2DModel):
        return NoTransformer()
    if isinstance(layer, BasicTransformerBlock):
        return NoBlock()
    if isinstance(layer, Attention):
        return NoAttention(float(layer.rescale_output_factor))
    return NoJointBlock()


def without_units(module: Any) -> nn.Module:
    """The stand-in of an attention or feed-forward that lost all its units: the bias of its projection."""
    if isinstance(module, FeedForward):
        return Bias(module.net[2])
    if getattr(module, "residual_connection", False):
        return ResidualBias(module)
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return JointBias(module.to_out[0], module.to_add_out)
    return Bias(module.to_out[0])
