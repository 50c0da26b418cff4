"""Unit labels through a program of torch.export: any model that runs, whoever calls its norms.

`tracing` follows modules through torch.fx, which refuses loops over tensors, control flow that looks at sizes
and the like, and knows a layer by its class. Here the operators themselves have the rules, mostly those of
`function_rules`: what a norm of timm, a block of YOLO or a transformer of transformers calls in the end is
the same `layer_norm` or `linear`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ...errors import GroupError
from ...measure.modes import eval_mode
from . import function_rules as rules
from .families import Role
from .labels import FIXED, Labels
from .module_rules import convolved, grouped, linear_out, normed

if TYPE_CHECKING:
    from .tracing import Tracer


def labels_of_export(state: Tracer, inputs: tuple[Any, ...]) -> None:
    """Follow the labels of a state's model through its exported program.

    Raises:
        GroupError: the model cannot be exported with these inputs.
    """
    model = state.model
    try:
        with eval_mode(model), _without_cache(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, inputs, strict=False)
    except Exception as error:  # torch raises its own and any of the model's
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise GroupError(
            f"{type(model).__name__} can be followed neither by torch.fx nor by torch.export "
            f"({type(error).__name__}: {line}); declare its families with GroupMap.declare."
        ) from error
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    labels: dict[fx.Node, Any] = {}

    def at(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return {}
        return labels_of_tensor(state, stored[value.name]) if value.name in stored else labels.get(value, {})

    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor | list | tuple):
            node.meta["tensor_meta"] = value
        node.meta["stored"] = stored.get(node.name)
        labels[node] = _visit(state, node, at)
    for name, module in model.named_modules():
        if isinstance(
            module, nn.MultiheadAttention
        ):  # its forward pass checks the width that it was made with
            for own, parameter in module.named_parameters():
                for dim in range(parameter.ndim):
                    state.unions.fix(state.axis(f"{name}.{own}", dim, "follow"), "is nn.MultiheadAttention's")


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Keep a language model of transformers from giving out its cache, which no program can hold."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False
    try:
        yield
    finally:
        if before:
            config.use_cache = before


def labels_of_tensor(state: Tracer, name: str) -> Labels:
    """A parameter that is used as it is: each of its axes follows what it meets. A buffer is fixed."""
    from .tracing import attribute_labels

    return attribute_labels(state, name)


def _visit(state: Tracer, node: fx.Node, at: Any) -> Any:
    if node.op == "output":
        for source in node.all_input_nodes:
            _fix(state, at(source), "reaches the model's output")
    if node.op != "call_function" or "tensor_meta" not in node.meta:
        return {}
    name = str(node.target).split(".")[1] if "." in str(node.target) else ""
    why = f"passes through {node.target}"
    rule = rules.FUNCTIONS.get(node.target) or ATEN.get(name) or ATEN.get(name.removesuffix("_"))
    result = rule(state, node, at, why) if rule is not None else None
    if result is None:  # unknown, or a case that the rule declines
        for source in node.all_input_nodes:
            _fix(state, at(source), why)
        return {}
    return [_free(one) for one in result] if isinstance(result, list) else _free(result)


def _free(labels: Labels) -> Labels:
    """The axes of which something can be cut: one that is fixed throughout, as that of the tokens by their
    positions' embedding, says no more than one without labels, and stands in no rule's way."""
    return {dim: own for dim, own in labels.items() if bool((own != FIXED).any())}


def _fix(state: Tracer, labels: Any, why: str) -> None:
    for one in labels if isinstance(labels, list) else [labels]:
        state.fix_all(one, why)


def _stored(node: fx.Node, position: int) -> str | None:
    """The parameter or buffer that is an operator's argument as it is."""
    argument = node.args[position] if len(node.args) > position else None
    name: str | None = argument.meta.get("stored") if isinstance(argument, fx.Node) else None
    return name


def _present(node: fx.Node, position: int) -> bool:
    return len(node.args) > position and isinstance(node.args[position], fx.Node)


def _linear(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    weight, bias = _stored(node, 1), _stored(node, 2)
    if weight is None or (_present(node, 2) and bias is None):
        return None
    return linear_out(state, at(node.args[0]), rules.ndim_of(node) - 1, weight, bias, why)


def _convolution(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    weight, bias = _stored(node, 1), _stored(node, 2)
    if weight is None or (_present(node, 2) and bias is None):
        return None
    transposed = "transpose" in str(node.target)
    place = 7 if transposed else 6
    groups = (
        node.args[place - 1 if transposed else place] if len(node.args) >= place + (not transposed) else 1
    )
    return convolved(state, at(node.args[0]), weight, bias, int(groups), transposed, why)


def _batch_norm(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    keys: list[tuple[str | None, Role]] = [(_stored(node, 1), "follow"), (_stored(node, 2), "follow")]
    keys += [(_stored(node, 3), "state"), (_stored(node, 4), "state")]
    if any(name is None and _present(node, place) for place, (name, _) in enumerate(keys, 1)):
        return None  # scales that are computed
    return normed(state, at(node.args[0]), 1, [(name, role) for name, role in keys if name], why)


def _layer_norm(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    if len(node.args[1]) != 1:
        return None
    last = rules.ndim_of(node) - 1
    keys: list[tuple[str, Role]] = [(name, "follow") for n in (2, 3) if (name := _stored(node, n))]
    x = normed(state, at(node.args[0]), last, keys, why)
    if last in x:
        state.unions.mark_inexact(x[last])
    return x


def _group_norm(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    x = grouped(state, at(node.args[0]), int(node.args[1]), why)
    keys: list[tuple[str, Role]] = [(name, "follow") for n in (2, 3) if (name := _stored(node, n))]
    return normed(state, x, 1, keys, why)


def _embedding(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    weight = _stored(node, 0)
    if weight is None:
        return None
    state.unions.fix(state.axis(weight, 0, "follow"), "indexes an embedding")
    return {rules.ndim_of(node) - 1: state.axis(weight, 1, "out")}


def _prelu(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    weight = _stored(node, 1)
    if weight is None:
        return None
    single = state.parameters[weight].numel() == 1
    return normed(state, at(node.args[0]), 1, [] if single else [(weight, "follow")], why)


def _slice(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    x, n = at(node.args[0]), rules.ndim_of(node)
    dim = (node.args[1] if len(node.args) > 1 else 0) % n
    bounds = [*node.args[2:5]] + [None] * (3 - len(node.args[2:5]))
    if dim not in x:
        return dict(x)
    if any(isinstance(bound, fx.Node) for bound in bounds):
        return None
    return {d: own[slice(*bounds)] if d == dim else own for d, own in x.items()}


def _select(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    x = at(node.args[0])
    dim = node.args[1] % rules.ndim_of(node.args[0])
    return None if dim in x else {d - (d > dim): own for d, own in x.items()}


def _chunk(state: Tracer, node: Any, at: Any, why: str) -> list[Labels] | None:
    """Parts of equal size must stay of equal size: their positions are cut together."""
    parts: Any = rules.split(state, node, at, why)
    for dim in set().union(*parts):
        axes = [part[dim] for part in parts if dim in part]
        if len({len(axis) for axis in axes}) == 1:
            for axis in axes[1:]:
                if not np.array_equal(axis, axes[0]):
                    state.unions.join(axes[0], axis, why)
    return list(parts)


_UNARY = (
    *("relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu"),
    *(
        "mish",
        "softplus",
        "relu6",
        "erf",
        "exp",
        "abs",
        "square",
        "sqrt",
        "rsqrt",
        "neg",
        "clamp",
        "pow",
        "selu",
    ),
    *("clamp_min", "dropout", "feature_dropout", "alias", "contiguous", "clone", "detach", "to", "type_as"),
    *("log_sigmoid", "celu", "_to_copy", "lift_fresh_copy"),
)
_SPATIAL = (
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
    *(f"upsample_{kind}" for kind in ("nearest2d", "bilinear2d", "bicubic2d", "nearest1d", "linear1d")),
)
_CONVOLUTIONS = tuple(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))

ATEN: dict[str, rules.Rule] = {
    "linear": _linear,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    "batch_norm": _batch_norm,
    "instance_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "prelu": _prelu,
    **dict.fromkeys(_UNARY, rules.same),
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum"), rules.elementwise),
    **dict.fromkeys(_SPATIAL, rules.spatial),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), rules.along_axis),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"), rules.reshape),
    **dict.fromkeys(("_unsafe_view", "reshape_as", "view_as"), rules.reshape),
    **dict.fromkeys(("mean", "sum", "amax"), rules.mean),
    **dict.fromkeys(("matmul", "bmm"), rules.matmul),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _chunk),
    "cat": rules.cat,
    "unbind": rules.unbind,
    "permute": rules.permute,
    **dict.fromkeys(("transpose", "swapaxes"), rules.transpose),
    "repeat_interleave": rules.repeat_interleave,
    **dict.fromkeys(("expand", "expand_as"), rules.expand),
    "scaled_dot_product_attention": rules.attention_product,
    **dict.fromkeys(("pad", "constant_pad_nd"), rules.pad),
    "slice": _slice,
    "select": _select,
}
