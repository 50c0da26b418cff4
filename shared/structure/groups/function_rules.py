"""How functions and tensor methods treat unit labels: one small rule per kind of operation.

A rule gets the tracer's state, the fx node, a function from argument to labels, and the reason to give if
units must stay. It returns the labels of the result (a list of them for several results), or None to
decline: then everything that enters is fixed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from .labels import FIXED, Labels, factor_shapes, reshape_labels

if TYPE_CHECKING:
    from .tracing import Tracer

# Attributes under which attention modules keep their head counts. Where the forward pass splits an axis
# into as many heads as one of them says, surgery updates it; another name has to be declared.
HEAD_COUNTS: tuple[Any, ...] = (
    "num_heads",
    "n_heads",
    "n_head",
    "heads",
    "nhead",
    "num_attention_heads",
    "num_key_value_heads",
)
HEAD_COUNTS += ("num_kv_heads", "n_kv_heads", "kv_heads")
# Likewise for the width of all heads together, where the forward pass joins them again.
WIDTHS: tuple[Any, ...] = ("attn_dim", "all_head_size", "inner_dim", "embed_dim", "dim", "hidden_size")

Rule = Callable[["Tracer", Any, Callable[[Any], Any], str], Any]


def shape_of(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def ndim_of(node: Any) -> int:
    return len(shape_of(node))


def _argument(node: Any, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def same(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    """One tensor in, the same axes out."""
    return at(node.args[0])


def spatial(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    """Works on the axes from 2 on."""
    x = at(node.args[0])
    return x if set(x) <= {1} else None


def along_axis(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    """softmax and its like: fine unless it runs along a labelled axis."""
    x = at(node.args[0])
    if node.op == "call_module":
        dim = state.model.get_submodule(str(node.target)).dim
    else:
        dim = _argument(node, 1, "dim")
    return x if isinstance(dim, int) and dim % ndim_of(node.args[0]) not in x else None


def elementwise(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    """Any number of tensors that broadcast: equal positions are one unit."""
    shape = shape_of(node)
    operands = [a for a in node.args if isinstance(a, fx.Node) and "tensor_meta" in a.meta]
    result: Labels = {}
    for dim, size in enumerate(shape):
        met: np.ndarray | None = None
        first = True
        for operand in operands:
            own = shape_of(operand)
            position = dim - len(shape) + len(own)
            if position < 0 or (own[position] == 1 and size > 1):
                continue  # broadcast along this axis
            labels = at(operand).get(position)
            met = labels if first else state.meet(met, labels, why)
            first = False
        if met is not None:
            result[dim] = met
    return result


def reshape(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    before, after = shape_of(node.args[0]), shape_of(node)
    result = reshape_labels(at(node.args[0]), before, after, state.unions, why)
    _head_counts(state, node, before, after, result)
    return result


def _head_counts(
    state: Tracer, node: Any, before: tuple[int, ...], after: tuple[int, ...], labels: Labels
) -> None:
    """Notes attributes of the calling module that say how many heads an axis was split into, or how wide they
    are together."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0].partition("@")[0] if stack else ""
    owner = state.model.get_submodule(path)
    blocks = factor_shapes(before, after)
    parts = {axis for _, new in blocks if len(new) > 1 for axis in new}
    joined = {axis for old, new in blocks if len(old) > 1 for axis in new if len(new) == 1}
    for axes, names in ((parts, HEAD_COUNTS), (joined, WIDTHS)):
        for axis in axes & set(labels):
            for attribute in names:
                if getattr(owner, attribute, None) == after[axis] and FIXED not in labels[axis]:
                    state.attributes[f"{path}.{attribute}" if path else attribute] = labels[axis]


def cat(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    parts, dim = node.args[0], _argument(node, 1, "dim", 0) % ndim_of(node)
    result: Labels = {}
    for axis in range(ndim_of(node)):
        found = [at(part).get(axis) for part in parts]
        if all(labels is None for labels in found):
            continue
        if axis == dim:
            sizes = [shape_of(part)[axis] for part in parts]
            result[axis] = np.concatenate(
                [np.full(size, FIXED) if own is None else own for own, size in zip(found, sizes, strict=True)]
            )
        else:
            met = found[0]
            for labels in found[1:]:
                met = state.meet(met, labels, why)
            if met is not None:
                result[axis] = met
    return result


def mean(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    """Reductions along axes without labels."""
    dims = _argument(node, 1, "dim")
    if dims is None:
        return None
    n = ndim_of(node.args[0])
    reduced = {d % n for d in ([dims] if isinstance(dims, int) else dims)}
    x = at(node.args[0])
    if reduced & set(x):
        return None
    if ndim_of(node) == n:
        return x
    order = [d for d in range(n) if d not in reduced]
    return {order.index(d): labels for d, labels in x.items()}


def permute(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    dims = node.args[1:]
    order = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else list(dims)
    n = ndim_of(node)
    return {
        order.index(next(o for o in order if o % n == d)): labels for d, labels in at(node.args[0]).items()
    }


def transpose(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    n = ndim_of(node)
    a, b = (d % n for d in node.args[1:3])
    swap = {a: b, b: a}
    return {swap.get(d, d): labels for d, labels in at(node.args[0]).items()}


def matmul(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    """Batch axes meet, the outer axes pass; a labelled axis that is summed over is declined."""
    left, right = node.args[:2]
    x, y = at(left), at(right)
    n = ndim_of(node)
    if ndim_of(left) != n or ndim_of(right) != n or n - 1 in x or n - 2 in y:
        return None
    outer = ((n - 2, x.get(n - 2)), (n - 1, y.get(n - 1)))
    result = {d: own for d, own in outer if own is not None}
    for d in range(n - 2):
        if d in x or d in y:
            met = state.meet(x.get(d), y.get(d), why)
            if met is not None:
                result[d] = met
    return result


def attention_product(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    """scaled_dot_product_attention: heads meet on axis -3; grouped queries go with their key head."""
    q, k, v = (at(a) for a in node.args[:3])
    n = ndim_of(node)
    heads = n - 3
    if any(set(labels) - {heads} for labels in (q, k, v)):
        return None
    if heads not in q:
        return {} if heads not in k and heads not in v else None
    repeat = shape_of(node.args[0])[heads] // shape_of(node.args[1])[heads]
    for labels in (k, v):
        key = labels.get(heads)
        state.meet(q[heads], None if key is None else np.repeat(key, repeat), why)
    return {heads: q[heads]}


def repeat_interleave(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    repeats, dim = _argument(node, 1, "repeats"), _argument(node, 2, "dim")
    if not isinstance(repeats, int) or dim is None:
        return None
    dim %= ndim_of(node)
    return {d: np.repeat(own, repeats) if d == dim else own for d, own in at(node.args[0]).items()}


def expand(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    lead = ndim_of(node) - ndim_of(node.args[0])
    return {d + lead: labels for d, labels in at(node.args[0]).items()}


def split(state: Tracer, node: Any, at: Any, why: str) -> list[Labels] | None:
    """chunk and split along an axis: each part has its labels."""
    x = at(node.args[0])
    dim = _argument(node, 2, "dim", 0) % ndim_of(node.args[0])
    sizes = [tuple(meta.shape)[dim] for meta in node.meta["tensor_meta"]]
    ends = np.cumsum(sizes)[:-1]
    parts = {d: np.split(own, ends) if d == dim else [own] * len(sizes) for d, own in x.items()}
    return [{d: part[i] for d, part in parts.items()} for i in range(len(sizes))]


def unbind(state: Tracer, node: Any, at: Any, why: str) -> list[Labels] | None:
    x = at(node.args[0])
    dim = _argument(node, 1, "dim", 0) % ndim_of(node.args[0])
    if dim in x:
        return None
    return [{d - (d > dim): own for d, own in x.items()} for _ in node.meta["tensor_meta"]]


def _getitem(state: Tracer, node: Any, at: Any, why: str) -> Any:
    """One of several results, or basic indexing of a tensor."""
    source, index = node.args
    labels = at(source)
    if isinstance(labels, list):
        return labels[index] if isinstance(index, int) else None
    if not hasattr(source.meta.get("tensor_meta"), "shape"):
        return {}  # a size, or one of several results that carry no units
    entries = list(index) if isinstance(index, tuple) else [index]
    n = ndim_of(source)
    if Ellipsis in entries:
        at_dots = entries.index(Ellipsis)
        used = sum(e is not None and e is not Ellipsis for e in entries)
        entries[at_dots : at_dots + 1] = [slice(None)] * (n - used)
    result: Labels = {}
    old = new = 0
    for entry in entries:
        if entry is None:
            new += 1
        elif isinstance(entry, int):
            if old in labels:
                return None
            old += 1
        elif isinstance(entry, slice):
            if old in labels:
                if any(isinstance(part, fx.Node) for part in (entry.start, entry.stop, entry.step)):
                    return None
                result[new] = labels[old][entry]
            old, new = old + 1, new + 1
        else:
            return None
    for d in range(old, n):
        if d in labels:
            result[new + d - old] = labels[d]
    return result


def pad(state: Tracer, node: Any, at: Any, why: str) -> Labels | None:
    """Padding with zeros; padded positions of a labelled axis are fixed."""
    x, n = at(node.args[0]), ndim_of(node)
    pads = _argument(node, 1, "pad")
    if not all(isinstance(p, int) and p >= 0 for p in pads):
        return None
    result = dict(x)
    for i in range(len(pads) // 2):
        d = n - 1 - i
        if d in x:
            before, after = np.full(pads[2 * i], FIXED), np.full(pads[2 * i + 1], FIXED)
            result[d] = np.concatenate([before, x[d], after])
    return result


def _nothing(state: Tracer, node: Any, at: Any, why: str) -> Labels:
    """Sizes and dtypes carry no units."""
    return {}


_UNARY: tuple[Any, ...] = (
    F.relu,
    F.relu6,
    F.gelu,
    F.silu,
    F.leaky_relu,
    F.elu,
    F.hardswish,
    F.hardsigmoid,
    F.hardtanh,
    F.mish,
)
_UNARY += (
    F.softplus,
    F.sigmoid,
    F.tanh,
    F.dropout,
    F.dropout2d,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    torch.exp,
)
_UNARY += (torch.abs, torch.square, torch.sqrt, torch.rsqrt, operator.neg, torch.neg, torch.clamp)
_BINARY: tuple[Any, ...] = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.iadd,
    operator.isub,
    operator.imul,
)
_BINARY += (torch.add, torch.sub, torch.mul, torch.div)
_SPATIAL: tuple[Any, ...] = (
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.interpolate,
)
_SPATIAL += (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.adaptive_avg_pool3d)

FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys(_UNARY, same),
    **dict.fromkeys(_BINARY, elementwise),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys((F.softmax, F.log_softmax, torch.softmax, torch.log_softmax), along_axis),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.unsqueeze, torch.squeeze), reshape),
    **dict.fromkeys((torch.cat, torch.concat), cat),
    **dict.fromkeys((torch.mean, torch.sum, torch.amax), mean),
    **dict.fromkeys((torch.matmul, torch.bmm, operator.matmul), matmul),
    **dict.fromkeys((torch.chunk, torch.split), split),
    torch.unbind: unbind,
    torch.permute: permute,
    torch.transpose: transpose,
    torch.repeat_interleave: repeat_interleave,
    F.scaled_dot_product_attention: attention_product,
    F.pad: pad,
    operator.getitem: _getitem,
    getattr: _nothing,
    operator.floordiv: _nothing,
}

METHODS: dict[str, Rule] = {
    **dict.fromkeys(("relu", "relu_", "sigmoid", "tanh", "exp", "contiguous", "clone", "float", "to"), same),
    **dict.fromkeys(("type_as", "clamp", "abs", "square", "neg", "detach"), same),
    **dict.fromkeys(("add", "add_", "sub", "mul", "mul_", "div"), elementwise),
    **dict.fromkeys(("softmax", "log_softmax"), along_axis),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"), reshape),
    **dict.fromkeys(("mean", "sum", "amax"), mean),
    **dict.fromkeys(("matmul", "bmm"), matmul),
    **dict.fromkeys(("chunk", "split"), split),
    "unbind": unbind,
    "permute": permute,
    "transpose": transpose,
    "repeat_interleave": repeat_interleave,
    "expand": expand,
    "size": _nothing,
    "dim": _nothing,
}
