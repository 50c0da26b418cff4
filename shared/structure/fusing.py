"""Activations and shortcuts that a packed convolution can take, and norms that follow one, by tracing.

torch.fx follows a `forward` symbolically. Where it cannot (control flow on data), or where arguments are
optional, a module stays as it is, and those inside it are tried.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer

from ..ops.modules import DepthwiseConv, SparseConv1x1, SparseConv2d

RELUS = {nn.ReLU: 1, nn.ReLU6: 6}
_RELU_CALLS: dict[str | Callable[..., Any], int] = {
    torch.relu: 1,
    nn.functional.relu: 1,
    nn.functional.relu6: 6,
    "relu": 1,
    "relu_": 1,
}
_ADDS: tuple[str | Callable[..., Any], ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_PASSED = (nn.Identity, nn.Dropout)  # in eval mode


class _Leaves(Tracer):
    """Follows modules that have parts; what has none is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children()) or super().is_leaf_module(m, module_qualified_name)


def traced(module: nn.Module) -> Graph | None:
    """The graph of a module's forward without what passes its input on; None where there is none."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if any(p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    try:
        graph = _Leaves().trace(module)
    except Exception:  # whatever a foreign forward raises on proxies, it cannot be followed
        return None
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), _PASSED):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def followers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The names of two modules of which the second alone takes what the first returns, each called once."""
    graph = traced(model)
    if graph is None:
        for name, child in model.named_children():
            yield from followers(child, f"{prefix}{name}.")
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        first = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(first, Node) or first.op != "call_module" or len(first.users) > 1:
            continue
        if calls[node.target] == calls[first.target] == 1:
            yield f"{prefix}{first.target}", f"{prefix}{node.target}"


def fuse(model: nn.Module) -> nn.Module:
    """Let packed convolutions take, in place, the activation and the sum with a shortcut that follow them.

    A module whose forward is rewritten keeps its parts, attributes and class, of which it is a subclass then.
    """
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for _, module in reversed(list(model.named_modules())):
        parts = list(module.modules())[1:]
        packed = any(isinstance(part, (SparseConv1x1, SparseConv2d, DepthwiseConv)) for part in parts)
        if not packed or type(module) in (nn.Sequential, nn.ModuleList):
            continue
        graph = traced(module)
        if graph is None or any(node.op == "get_attr" for node in graph.nodes):
            continue
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        once = {
            str(target)
            for target, count in calls.items()
            if count == 1 and places[id(module.get_submodule(str(target)))] == 1
        }
        if _rewrite(module, graph, once):
            forward = type(GraphModule(module, graph)).forward
            module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})
    return model


def _rewrite(module: nn.Module, graph: Graph, once: set[str]) -> bool:
    """Give packed convolutions what follows them; returns whether any took something."""

    def convolution(node: object, *kinds: type[nn.Module]) -> Any:
        if not isinstance(node, Node) or node.op != "call_module" or str(node.target) not in once:
            return None
        found = module.get_submodule(str(node.target))
        return found if isinstance(found, kinds) and not found.relu and len(node.users) == 1 else None

    changed = False
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target in _ADDS and len(node.args) == 2 and not node.kwargs:
            if not all(isinstance(each, Node) for each in node.args) or node.args[0] is node.args[1]:
                continue
            in_place = node.target in (operator.iadd, "add_")
            if in_place and len(node.args[0].users) > 1:
                continue
            first, last = sorted(node.args, key=order.__getitem__)
            if convolution(last, SparseConv1x1, SparseConv2d) is not None and len(last.args) == 1:
                last.args = (*last.args, first)
                node.replace_all_uses_with(last)
                graph.erase_node(node)
                changed = True
            continue
        relu = _relu_of(module, node)
        taker = convolution(node.args[0], SparseConv1x1, SparseConv2d, DepthwiseConv) if relu else None
        if taker is not None:
            taker.relu = relu
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            changed = True
    return _join(module, graph, once) or changed


def _join(module: nn.Module, graph: Graph, once: set[str]) -> bool:
    """Let 1x1 convolutions run in one pass with the depthwise ones before them, and with 1x1 ones before
    those; returns whether any does."""

    def single(node: object, kind: type[nn.Module]) -> Any:
        """The convolution that a node calls with one input, and that nothing else calls."""
        if not isinstance(node, Node) or node.op != "call_module" or str(node.target) not in once:
            return None
        found = module.get_submodule(str(node.target))
        return found if isinstance(found, kind) and getattr(found, "before", None) is None else None

    joined = False
    for node in list(graph.nodes):
        middle: Any = node.args[0] if node.args else None
        last, between = single(node, SparseConv1x1), single(middle, DepthwiseConv)
        if last is None or between is None or len(middle.users) > 1:
            continue
        first, expand, taken = middle.args[0], None, [middle]
        if isinstance(first, Node) and len(first.users) == 1 and len(first.args) == 1:
            expand = single(first, SparseConv1x1)
        if expand is not None:
            taken.append(first)
            first = first.args[0]
        last.before = (expand, between)
        node.args = (first, *node.args[1:])
        for each in taken:
            graph.erase_node(each)
        joined = True
    return joined


def _relu_of(module: nn.Module, node: Node) -> int:
    """1 or 6 for a call of ReLU or ReLU6, else 0."""
    if node.op == "call_module":
        return RELUS.get(type(module.get_submodule(str(node.target))), 0)
    return _RELU_CALLS.get(node.target, 0) if node.op in ("call_function", "call_method") else 0
