"""How modules with weights of their own treat unit labels; see `function_rules` for what a rule is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from .families import Role
from .function_rules import Rule, along_axis, ndim_of, reshape, same, spatial
from .labels import FIXED, Labels

if TYPE_CHECKING:
    from .tracing import Tracer


def _parameter(state: Tracer, name: str) -> str | None:
    return name if name in state.parameters else None


def linear_out(state: Tracer, x: Labels, last: int, weight: str, bias: str | None, why: str) -> Labels:
    """A product with a weight [out, in] along the last axis."""
    x = dict(x)
    out = state.axis(weight, 0, "out")
    state.meet(x.pop(last, None), state.axis(weight, 1, "in"), "reads an input that is not cut")
    if bias is not None:
        state.unions.join(out, state.axis(bias, 0, "out"), why)
    return {**x, last: out}


def _linear(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    name, last = str(node.target), ndim_of(node.args[0]) - 1
    bias = _parameter(state, f"{name}.bias")
    return linear_out(state, at(node.args[0]), last, f"{name}.weight", bias, why)


def _convolution(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    name = str(node.target)
    module: Any = state.model.get_submodule(name)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    bias = _parameter(state, f"{name}.bias")
    return convolved(state, at(node.args[0]), f"{name}.weight", bias, module.groups, transposed, why)


def convolved(
    state: Tracer, x: Labels, weight: str, bias: str | None, groups: int, transposed: bool, why: str
) -> Labels | None:
    """A convolution over the axes from 2 on."""
    if set(x) - {1}:
        return None
    shape = state.parameters[weight].shape
    c_in, c_out = shape[1] * groups, shape[0]
    if groups == 1:
        out = state.axis(weight, 1 if transposed else 0, "out")
        state.meet(
            x.get(1),
            state.axis(weight, 0 if transposed else 1, "in"),
            "reads an input that is not cut",
        )
    elif transposed:
        return None
    else:
        # A conv group is cut as a whole: its inputs and its outputs are one unit. Depthwise: group = channel.
        source = x.get(1, np.full(c_in, FIXED)).reshape(groups, -1)
        out = state.axis(weight, 0, "follow" if groups == c_in else "out")
        heads = state.unions.join_rows(source, why)
        state.unions.join(out, np.repeat(heads, c_out // groups), why)
    if bias is not None:
        state.unions.join(out, state.axis(bias, 0, "out" if groups == 1 else "follow"), why)
    return {1: out}


def normed(state: Tracer, x: Labels, dim: int, keys: Sequence[tuple[str, Role]], why: str) -> Labels:
    """Parameters and buffers that act on each position of an axis by itself."""
    for name, role in keys:
        state.meet(x.get(dim), state.axis(name, 0, role), why)
    return dict(x)


def _there(state: Tracer, node: Any, keys: Sequence[tuple[str, Role]]) -> list[tuple[str, Role]]:
    """The parameters and buffers of a module that it really has, by full name."""
    named: list[tuple[str, Role]] = [(f"{node.target}.{key}", role) for key, role in keys]
    return [(name, role) for name, role in named if name in state.parameters or name in state.buffers]


def _batch_norm(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    keys: list[tuple[str, Role]] = [("weight", "follow"), ("bias", "follow")]
    keys += [("running_mean", "state"), ("running_var", "state")]
    return normed(state, at(node.args[0]), 1, _there(state, node, keys), why)


def grouped(state: Tracer, x: Labels, groups: int, why: str) -> Labels:
    """A norm group is cut as a whole, so that the statistics of the others stay; in the only one units go
    singly, as under a LayerNorm, and change its statistics."""
    x = dict(x)
    if 1 in x and groups == 1:
        state.unions.mark_inexact(x[1])
    elif 1 in x:
        heads = state.unions.join_rows(x[1].reshape(groups, -1), why)
        x[1] = np.repeat(heads, len(x[1]) // groups)
    return x


def _group_norm(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    module: Any = state.model.get_submodule(str(node.target))
    x = grouped(state, at(node.args[0]), module.num_groups, why)
    return normed(state, x, 1, _there(state, node, (("weight", "follow"), ("bias", "follow"))), why)


def _layer_norm(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    module: Any = state.model.get_submodule(str(node.target))
    last = ndim_of(node.args[0]) - 1
    if len(module.normalized_shape) != 1:
        return None
    keys = _there(state, node, (("weight", "follow"), ("bias", "follow")))
    x = normed(state, at(node.args[0]), last, keys, why)
    if last in x:
        state.unions.mark_inexact(x[last])
    return x


def _embedding(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    state.unions.fix(state.axis(f"{node.target}.weight", 0, "follow"), "indexes an embedding")
    return {ndim_of(node) - 1: state.axis(f"{node.target}.weight", 1, "out")}


def _prelu(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    x = at(node.args[0])
    if state.parameters[f"{node.target}.weight"].numel() > 1:
        state.meet(x.get(1), state.axis(f"{node.target}.weight", 0, "follow"), why)
    return x


def _heads(state: Tracer, name: str) -> None:
    """The heads of one nn.MultiheadAttention: rows of q, k and v, columns of the output projection."""
    module: Any = state.model.get_submodule(name)
    if not module._qkv_same_embed_dim or module.bias_k is not None:
        return
    width = module.embed_dim // module.num_heads
    heads = state.unions.fresh(module.num_heads)
    why = "is a head"
    rows = np.tile(np.repeat(heads, width), 3)
    state.unions.join(rows, state.axis(f"{name}.in_proj_weight", 0, "out"), why)
    if module.in_proj_bias is not None:
        state.unions.join(rows, state.axis(f"{name}.in_proj_bias", 0, "out"), why)
    state.unions.join(np.repeat(heads, width), state.axis(f"{name}.out_proj.weight", 1, "in"), why)
    state.attributes[f"{name}.num_heads"] = heads


def _attention(state: Tracer, node: Any, at: Any, why: str) -> None:
    _heads(state, str(node.target))
    return None  # the stream around it keeps its width


def _encoder_parts(state: Tracer, name: str) -> None:
    """Heads and hidden units of one nn.TransformerEncoderLayer."""
    _heads(state, f"{name}.self_attn")
    hidden = state.axis(f"{name}.linear1.weight", 0, "out")
    if f"{name}.linear1.bias" in state.parameters:
        state.unions.join(hidden, state.axis(f"{name}.linear1.bias", 0, "out"), "is a hidden unit")
    state.unions.join(hidden, state.axis(f"{name}.linear2.weight", 1, "in"), "is a hidden unit")


def _encoder_layer(state: Tracer, node: Any, at: Any, why: str) -> None:
    _encoder_parts(state, str(node.target))
    return None


def _encoder(state: Tracer, node: Any, at: Any, why: str) -> None:
    for index, _ in enumerate(state.model.get_submodule(f"{node.target}.layers").children()):
        _encoder_parts(state, f"{node.target}.layers.{index}")
    return None


_CONVOLUTIONS: tuple[Any, ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_BATCH_NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS: tuple[Any, ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_POOLS = tuple(
    getattr(nn, f"{kind}Pool{n}d") for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax") for n in (1, 2, 3)
)
_ACTIVATIONS: tuple[Any, ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Tanh,
    nn.Sigmoid,
)
_ACTIVATIONS += (nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Mish, nn.Softplus, nn.Identity, nn.LogSigmoid)
_DROPOUTS: tuple[Any, ...] = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)

MODULES: dict[type, Rule] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.Softmax: along_axis,
    nn.LogSoftmax: along_axis,
    nn.Flatten: reshape,
    nn.Unflatten: reshape,
    nn.Upsample: spatial,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_BATCH_NORMS, _batch_norm),
    **dict.fromkeys(_INSTANCE_NORMS, _batch_norm),
    **dict.fromkeys(_POOLS, spatial),
    **dict.fromkeys((*_ACTIVATIONS, *_DROPOUTS), same),
}
