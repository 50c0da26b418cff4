"""Finds what is cut together by following unit labels through a traced forward pass (torch.fx)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ...errors import GroupError
from ...measure.modes import eval_mode
from .exported import labels_of_export
from .families import Family, GroupMap, Member, Role
from .function_rules import FUNCTIONS, METHODS
from .labels import FIXED, Labels, Unions
from .module_rules import MODULES
from .trial import tried


class Tracer:
    """State of one trace: labels of every tensor axis, joined as rules say (see `function_rules` and
    `module_rules`).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.unions = Unions()
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self._names: dict[int, str] = {}
        self._axes: dict[tuple[str, int], np.ndarray] = {}
        self._roles: dict[tuple[str, int], Role] = {}
        self.attributes: dict[str, np.ndarray] = {}  # path of a head count -> labels of the heads
        for name, tensor in {**self.parameters, **self.buffers}.items():
            self._names.setdefault(id(tensor), name)

    def axis(self, name: str, dim: int, role: Role) -> np.ndarray:
        """The labels of one axis of a parameter or buffer; a tied parameter has one set of labels."""
        tensor = self.parameters[name] if name in self.parameters else self.buffers[name]
        key = (self._names[id(tensor)], dim)
        if key not in self._axes:
            self._axes[key] = self.unions.fresh(tensor.shape[dim])
            self._roles[key] = role
        return self._axes[key]

    def meet(self, a: np.ndarray | None, b: np.ndarray | None, why: str) -> np.ndarray | None:
        """One unit per position of two equally long axes; an axis without labels fixes the other."""
        if a is None or b is None:
            present = a if a is not None else b
            if present is not None:
                self.unions.fix(present, why)
                return np.full_like(present, FIXED)
            return None
        self.unions.join(a, b, why)
        return np.where(a == FIXED, FIXED, np.where(b == FIXED, FIXED, a))

    def fix_all(self, labels: Labels, why: str) -> None:
        """Every labelled axis must stay."""
        for axis in labels.values():
            self.unions.fix(axis, why)

    def group_map(self) -> GroupMap:
        """Collects units with the same slices into families."""
        unit, fixed, inexact = self.unions.resolve()
        places: dict[int, list[tuple[tuple[str, int], int]]] = defaultdict(list)
        for key, labels in self._axes.items():
            for position, label in enumerate(unit[labels]):
                places[int(label)].append((key, position))
        frozen: dict[str, str] = {}
        kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for u, entries in places.items():
            if u in fixed:
                for (name, dim), _ in entries:
                    if self._roles[name, dim] == "out":
                        frozen.setdefault(name, fixed[u])
                continue
            counts: dict[tuple[str, int], int] = defaultdict(int)
            for key, _ in entries:
                counts[key] += 1
            kinds[(*counts.items(), u in inexact)].append(u)
        families: list[Family] = []
        for kind, units in kinds.items():
            keys = [key for key, _ in kind[:-1]]
            makers = [key for key in keys if self._roles[key] == "out"]
            if not makers or not any(self._roles[key] == "in" for key in keys):
                continue  # nothing makes it, or nothing reads it: not a unit that can be cut
            index = {key: [[p for k, p in places[u] if k == key] for u in units] for key in keys}
            members = tuple(
                Member(key[0], key[1], torch.tensor(index[key]), self._roles[key]) for key in keys
            )
            weights = [key[0] for key in makers if not key[0].endswith("bias")]
            name = (weights or [makers[0][0]])[0]
            if any(family.name == name for family in families):
                name = f"{name}[{index[makers[0]][0][0]}]"  # a further part of the same tensor
            attributes = tuple(
                (path, len(labels) // len(units))
                for path, labels in self.attributes.items()
                if len(labels) % len(units) == 0 and set(unit[labels].tolist()) == set(units)
            )
            families.append(Family(name, len(units), members, not kind[-1], attributes))
        return GroupMap(families, frozen)


class _LeafTracer(fx.Tracer):
    """Enters containers and user modules; modules with a rule stay whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in MODULES or super().is_leaf_module(m, module_qualified_name)


def trace_groups(model: nn.Module, inputs: tuple[Any, ...]) -> GroupMap:
    """What is cut together in `model`, found by following one forward pass.

    Known are Linear, convolutions (depthwise and grouped: a conv group goes as a whole), BatchNorm,
    InstanceNorm, GroupNorm (a norm group goes as a whole), LayerNorm and RMSNorm (inexact, see `Family`),
    Embedding, nn.MultiheadAttention (its heads) and nn.TransformerEncoderLayer (heads and hidden units),
    elementwise functions, pooling, reshaping, concatenation, attention as matmul or
    scaled_dot_product_attention with grouped queries. What torch.fx cannot trace, or a part that it meets an
    unknown module or function in, is followed through a program of torch.export instead (`exported`), if that
    reaches more. Every family is tried on a copy before it is given. Units that reach the model's input or
    output, or pass
    through anything unknown, are left out and listed in `GroupMap.frozen` with the reason.

    Args:
        model: any module that torch.fx or torch.export can trace; its mode and weights are left as they are.
        inputs: example inputs, a batch of at least two.

    Raises:
        GroupError: the model cannot be traced, or the inputs do not suit it.
    """
    try:
        graph = _LeafTracer().trace(model)
    except Exception:  # fx lets any error of the model's own Python code through
        return _exported(model, inputs)
    found = tried(model, _followed(model, graph, inputs), inputs)
    if not any("passes through" in reason for reason in found.frozen.values()):
        return found
    try:
        other = _exported(model, inputs)
    except GroupError:
        return found
    return other if other.reach(model) > found.reach(model) else found


def _exported(model: nn.Module, inputs: tuple[Any, ...]) -> GroupMap:
    state = Tracer(model)
    labels_of_export(state, inputs)
    return tried(model, state.group_map(), inputs)


def _followed(model: nn.Module, graph: fx.Graph, inputs: tuple[Any, ...]) -> GroupMap:
    module = fx.GraphModule(model, graph)
    try:
        with eval_mode(model), torch.no_grad():
            ShapeProp(module).propagate(*inputs)
    except RuntimeError as error:
        raise GroupError(f"the example inputs do not suit {type(model).__name__}: {error}") from error
    state = Tracer(model)
    labels: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        labels[node] = _visit(state, node, labels)
    return state.group_map()


def _visit(state: Tracer, node: fx.Node, labels: dict[fx.Node, Any]) -> Any:
    def at(value: Any) -> Any:
        return labels.get(value, {}) if isinstance(value, fx.Node) else {}

    why = f"passes through {node.op} {node.target}"
    if node.op == "placeholder":
        return {}
    if node.op == "get_attr":
        return attribute_labels(state, str(node.target))
    if node.op == "output":
        for source in node.all_input_nodes:
            _fix(state, at(source), "reaches the model's output")
        return {}
    if "tensor_meta" not in node.meta:
        return {}  # a size or another plain value
    rule = None
    if node.op == "call_module":
        rule = MODULES.get(type(state.model.get_submodule(str(node.target))))
    elif node.op == "call_function":
        rule = FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        rule = METHODS.get(str(node.target))
    result = rule(state, node, at, why) if rule is not None else None
    if result is None:  # unknown, or a case that the rule declines
        for source in node.all_input_nodes:
            _fix(state, at(source), why)
        return {}
    return result


def _fix(state: Tracer, labels: Any, why: str) -> None:
    for one in labels if isinstance(labels, list) else [labels]:
        state.fix_all(one, why)


def attribute_labels(state: Tracer, target: str) -> Labels:
    if target in state.parameters:
        tensor: Tensor = state.parameters[target]
        return {dim: state.axis(target, dim, "follow") for dim in range(tensor.ndim) if tensor.shape[dim] > 1}
    if target in state.buffers:
        shape = state.buffers[target].shape
        return {dim: np.full(size, FIXED) for dim, size in enumerate(shape) if size > 1}
    return {}
