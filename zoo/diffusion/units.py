"""Prunable units of diffusion networks: attention heads, feed-forward neurons and whole residual layers.

Units are found by the type of a module, never by its name, so that the UNets and transformers of diffusers
(Stable Diffusion 1.5 to 3, SDXL, FLUX, DiT, PixArt, DDPM) are all handled by the same rules: heads and
neurons own columns of a down-projection and rows of the projections before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers.models.attention import BasicTransformerBlock, FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import nn

from zoo.errors import ConfigError

Kind = Literal["heads", "neurons"]


@dataclass(frozen=True)
class Rows:
    """Rows of an up-projection that belong to units: unit k owns rows k * width ... of each of `halves` equal
    parts (two for GEGLU, whose value half stands before its gate half)."""

    linear: str
    halves: int = 1


@dataclass(frozen=True)
class Columns:
    """Columns of a down-projection that belong to units, from column `start` on."""

    linear: str
    start: int = 0


@dataclass(frozen=True)
class UnitGroup:
    """The units of one module that can be removed one by one.

    Attributes:
        name: `path:heads` or `path:neurons`, unique in the network.
        module: path of the attention, feed-forward or block.
        kind: heads or neurons.
        count: how many there are.
        width: columns of the down-projection that each owns (the head's width; 1 for a neuron).
        rows, columns: where their weights lie; paths are absolute.
    """

    name: str
    module: str
    kind: Kind
    count: int
    width: int
    rows: tuple[Rows, ...]
    columns: tuple[Columns, ...]

    def parameters(self, network: nn.Module) -> int:
        """Parameters that one unit owns."""
        total = 0
        for part in self.rows:
            linear = _linear(network, part.linear)
            total += self.width * part.halves * (linear.in_features + (linear.bias is not None))
        return total + sum(self.width * _linear(network, c.linear).out_features for c in self.columns)


@dataclass(frozen=True)
class Layer:
    """A residual layer that may be dropped as a whole.

    Attributes:
        name: its path.
        kind: `resnet`, `transformer` (a Transformer2DModel) or `block` (one transformer block).
        parameters: that dropping it frees; a shortcut convolution stays.
        removable: whether the network keeps its shapes without it.
        reason: why not, if not.
    """

    name: str
    kind: Literal["resnet", "transformer", "block"]
    parameters: int
    removable: bool = True
    reason: str = field(default="", compare=False)


def unit_groups(network: nn.Module) -> list[UnitGroup]:
    """All heads and neurons of a network, by module, in the order of its modules.

    Raises:
        ConfigError: fused projections, attached adapters or quantised layers, whose visible weights are not
            those that work.
    """
    found: list[UnitGroup] = []
    for path, module in network.named_modules():
        for kinds, rule in _RULES:
            if isinstance(module, kinds):
                found += rule(path, module)
    for group in found:
        for path in (*(r.linear for r in group.rows), *(c.linear for c in group.columns)):
            _require_plain(network, path)
    return found


def layers(network: nn.Module) -> list[Layer]:
    """The residual layers that a network is made of, largest modules first where they nest.

    A Transformer2DModel of several blocks is listed as its blocks; with a single one it is listed whole.
    """
    return list(_layers("", network))


def _layers(path: str, module: nn.Module) -> Iterator[Layer]:
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if isinstance(child, ResnetBlock2D):
            yield _resnet(full, child)
        elif isinstance(child, Transformer2DModel) and len(child.transformer_blocks) == 1:
            yield Layer(full, "transformer", _size(child))
        elif isinstance(child, BLOCKS):
            reason = _needed(name, child)
            yield Layer(full, "block", _size(child), not reason, reason)
        elif isinstance(child, Attention) and child.residual_connection:
            yield Layer(full, "transformer", _size(child))
        else:
            yield from _layers(full, child)


BLOCKS = (BasicTransformerBlock, JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock)


def _needed(name: str, block: Any) -> str:
    """Why the network cannot do without a transformer block; empty if it can."""
    if isinstance(block, JointTransformerBlock) and block.context_pre_only:
        return "the last block ends the text stream"
    if name == "0" and getattr(block, "norm_type", "") == "ada_norm_zero":
        return "the network's last layer reads the embedding of its first block"
    return ""


def _resnet(path: str, block: ResnetBlock2D) -> Layer:
    resamples = block.upsample is not None or block.downsample is not None
    kept = _size(block.conv_shortcut) if block.conv_shortcut is not None else 0
    return Layer(path, "resnet", _size(block) - kept, not resamples, "it resamples its input" * resamples)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linear(network: nn.Module, path: str) -> nn.Linear:
    module = network.get_submodule(path)
    assert isinstance(module, nn.Linear)  # `unit_groups` has refused everything else
    return module


def _require_plain(network: nn.Module, path: str) -> None:
    module = network.get_submodule(path)
    if type(module) is not nn.Linear:
        raise ConfigError(
            f"{path!r} is a {type(module).__name__}: its visible weight is not the one that works. "
            "Merge or unload adapters (`unload_lora_weights`), dequantise, and try again."
        )


def _attention(path: str, module: Attention | FluxAttention) -> list[UnitGroup]:
    if getattr(module, "fused_projections", False):
        raise ConfigError(
            f"{path!r} has fused projections, and cutting its single ones would change nothing. Call "
            "`unfuse_qkv_projections()` first."
        )
    heads = int(module.heads)
    kv_width = module.inner_dim if isinstance(module, FluxAttention) else module.inner_kv_dim
    if kv_width != module.inner_dim:
        raise ConfigError(
            f"{path!r} shares keys and values among heads ({module.inner_dim} and {kv_width} columns); its "
            "heads cannot be cut one by one."
        )
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        weight = getattr(getattr(module, name, None), "weight", None)
        if weight is not None and weight.numel() != module.inner_dim // heads:
            raise ConfigError(
                f"{path}.{name} normalises over all heads together; they cannot be cut one by one."
            )
    rows = [
        Rows(f"{path}.{name}")
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        if getattr(module, name, None) is not None
    ]
    columns = []
    if getattr(module, "to_out", None) is not None:
        columns.append(Columns(f"{path}.to_out.0"))
    if getattr(module, "to_add_out", None) is not None:
        columns.append(Columns(f"{path}.to_add_out"))
    if not columns:  # the attention of a FLUX single block: its block projects (see _flux_single)
        return []
    width = module.inner_dim // heads
    return [UnitGroup(f"{path}:heads", path, "heads", heads, width, tuple(rows), tuple(columns))]


def _feed_forward(path: str, module: FeedForward) -> list[UnitGroup]:
    down = module.net[2]
    up = getattr(module.net[0], "proj", None)
    if up is None or up.out_features % down.in_features:
        raise ConfigError(f"{path!r} has a first layer of unknown kind, {type(module.net[0]).__name__}")
    rows = (Rows(f"{path}.net.0.proj", up.out_features // down.in_features),)
    return [
        UnitGroup(f"{path}:neurons", path, "neurons", down.in_features, 1, rows, (Columns(f"{path}.net.2"),))
    ]


def _flux_single(path: str, module: FluxSingleTransformerBlock) -> list[UnitGroup]:
    attention = module.attn
    inner, neurons = int(attention.to_q.out_features), int(module.proj_mlp.out_features)
    rows = tuple(Rows(f"{path}.attn.{name}") for name in ("to_q", "to_k", "to_v"))
    heads = int(attention.heads)
    return [
        UnitGroup(
            f"{path}:heads", path, "heads", heads, inner // heads, rows, (Columns(f"{path}.proj_out"),)
        ),
        UnitGroup(
            f"{path}:neurons",
            path,
            "neurons",
            neurons,
            1,
            (Rows(f"{path}.proj_mlp"),),
            (Columns(f"{path}.proj_out", inner),),
        ),
    ]


_RULES: tuple[tuple[Any, Callable[[str, Any], list[UnitGroup]]], ...] = (
    ((Attention, FluxAttention), _attention),
    (FeedForward, _feed_forward),
    (FluxSingleTransformerBlock, _flux_single),
)
