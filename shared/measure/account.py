"""Accounting that knows zeros: parameters, multiply-accumulates (MACs) and bytes, dense and sparse.

Conventions. FLOPs = 2 MACs. Matrix products, convolutions and attention are counted; element-wise work
(norms, activations, biases, softmax) is not, as in other counters. A convolution counts every product of a
window, also those with padding; causal attention counts the full square. A weight that a mask drops saves
each product it takes part in. Bytes are those of the parameters: dense as they are in memory, sparse as the
packed format stores them (kept values and the cheapest index). A parameter under two names counts once.

The counting happens where all layers meet, at the matrix products and convolutions that really run, whatever
module calls them. Layers whose work is done otherwise (sparse convolutions over pairs, recurrent layers) say
what they do through `register_counter`; in modules named by `register_messages` the sums over the edges of a
graph count, one product for each channel of a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import MaskError
from ..masks import Mask, MaskSet, masks_of
from ..store.formats.coding import encode_mask


class Macs(NamedTuple):
    """Multiply-accumulates with all weights, and with those that the masks keep."""

    dense: int
    kept: int

    def plus(self, other: Macs) -> Macs:
        return Macs(self.dense + other.dense, self.kept + other.kept)


@dataclass(frozen=True)
class LayerCost:
    """What one module costs by itself, its children apart."""

    name: str
    kind: str
    params: int
    params_kept: int
    macs: int
    macs_kept: int
    bytes_dense: int
    bytes_sparse: int

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def flops_kept(self) -> int:
        return 2 * self.macs_kept


@dataclass(frozen=True)
class Account:
    """Costs of a model for one example input.

    Attributes:
        layers: every module that has parameters or does counted work, in order of definition.
        uncounted: parameters of two or more dimensions that took part in no counted operation: their layer
            did not run on this input, or its kind of work needs a counter (see `register_counter`).
    """

    layers: tuple[LayerCost, ...]
    uncounted: tuple[str, ...]

    def _sum(self, field: str) -> int:
        return sum(getattr(layer, field) for layer in self.layers)

    @property
    def total(self) -> LayerCost:
        """The sum over all layers."""
        fields = ("params", "params_kept", "macs", "macs_kept", "bytes_dense", "bytes_sparse")
        return LayerCost("total", "", *(self._sum(field) for field in fields))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "total": asdict(self.total),
            "layers": [asdict(layer) for layer in self.layers],
            "uncounted": list(self.uncounted),
        }

    def __str__(self) -> str:
        head = ("layer", "kind", "params", "kept", "FLOPs", "kept", "bytes", "packed")
        rows: list[tuple[str, ...]] = [head]
        for layer in (*self.layers, self.total):
            rows.append(
                (
                    layer.name,
                    layer.kind,
                    *(
                        f"{value:,}"
                        for value in (
                            layer.params,
                            layer.params_kept,
                            layer.flops,
                            layer.flops_kept,
                            layer.bytes_dense,
                            layer.bytes_sparse,
                        )
                    ),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(8)]
        lines = []
        for row in rows:
            cells = zip(row, widths, strict=True)
            lines.append("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(cells)))
        if self.uncounted:
            lines.insert(0, f"not counted, so that FLOPs are too low: {', '.join(self.uncounted)}")
        return "\n".join(line.rstrip() for line in lines)


class Counting:
    """What a counter may ask about the masks of the model and of the graph it runs on."""

    def __init__(self, masks: Mapping[int, tuple[Tensor, Tensor]], edges: Tensor | None) -> None:
        self._masks = masks  # storage -> (parameter, keep with the parameter's strides)
        self._edges = edges

    def kept(self, weight: Tensor) -> int:
        """How many entries of a parameter, or of any view of one (transposed, a part of it), are kept."""
        entry = self._masks.get(_storage(weight))
        if entry is None:
            return weight.numel()
        parameter, keep = entry
        if weight.shape == parameter.shape and weight.stride() == parameter.stride():
            return int(keep.count_nonzero())
        offset = int(weight.storage_offset()) - int(parameter.storage_offset())
        return int(keep.as_strided(weight.shape, weight.stride(), offset).count_nonzero())

    def product(self, weight: Tensor, uses: int) -> Macs:
        """Each entry of `weight` is multiplied `uses` times (Linear: rows; convolution: output positions)."""
        return Macs(weight.numel() * uses, self.kept(weight) * uses)

    def messages(self, edges: int, width: int, loops: int = 0) -> Macs:
        """One product per channel for each of `edges` directed edges and `loops` self-loops (always kept).

        Raises:
            MaskError: the edge mask that `count` was given has another length.
        """
        kept = edges
        if self._edges is not None:
            if self._edges.numel() != edges:
                raise MaskError(
                    f"the edge mask has {self._edges.numel()} entries, the layer got {edges} "
                    "edges; give the mask of the graph that the model is run on"
                )
            kept = int(self._edges.count_nonzero())
        return Macs((edges + loops) * width, (kept + loops) * width)

    def pairs(self, weight: Tensor, pairs: Sequence[int]) -> Macs:
        """A sparse convolution: `weight[o]` is multiplied once for each of the `pairs[o]` pairs of offset o.

        Raises:
            MaskError: not one number of pairs per offset.
        """
        if len(pairs) != weight.shape[0]:
            raise MaskError(
                f"{len(pairs)} numbers of pairs for the {weight.shape[0]} offsets of a weight of "
                f"shape {list(weight.shape)}; put the offsets first"
            )
        total = Macs(0, 0)
        for part, count in zip(weight, pairs, strict=True):
            total = total.plus(self.product(part, int(count)))
        return total


# (module, positional arguments, keyword arguments, output, what is kept) -> MACs of the module with all it
# contains
Counter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any, Counting], Macs]

_COUNTERS: dict[type[nn.Module], Counter] = {}
_MESSAGES: list[type[nn.Module]] = []
_SUMS = ("scatter_add", "scatter_reduce", "index_add", "segment_reduce")


def register_counter(module_type: type[nn.Module], counter: Counter) -> None:
    """Let `counter` say what modules of a type (and of its subclasses) cost.

    It is called after the module's forward and stands for all that ran inside it, children included, so that
    the figure does not depend on the back-end that did the work.
    """
    _COUNTERS[module_type] = counter


def register_messages(module_type: type[nn.Module]) -> None:
    """Count the sums over edges that modules of a type (and of its subclasses) make."""
    _MESSAGES.append(module_type)


def _rnn(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any, counting: Counting) -> Macs:
    """Each weight of a recurrent layer once per step and sequence."""
    given = args[0]
    rows = len(given.data) if hasattr(given, "batch_sizes") else math.prod(given.shape[:-1])
    total = Macs(0, 0)
    for name, weight in module.named_parameters():
        if name.startswith("weight"):
            total = total.plus(counting.product(weight, rows))
    return total


def _bilinear(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any, counting: Counting) -> Macs:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return counting.product(weight, math.prod(output.shape[:-1]))


register_counter(nn.RNNBase, _rnn)
register_counter(nn.Bilinear, _bilinear)


def _counter_of(module: nn.Module) -> Counter | None:
    return next((_COUNTERS[base] for base in type(module).__mro__ if base in _COUNTERS), None)


def _storage(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor, the same for all its views (also on the meta device)."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)


def _scaled(macs: int, weights: Iterable[Tensor], counting: Counting) -> Macs:
    kept = macs
    for weight in weights:
        if weight.layout == torch.strided and (total := weight.numel()):
            kept = kept * counting.kept(weight) // total
    return Macs(macs, kept)


def _operation(name: str, args: tuple[Any, ...], output: Any, counting: Counting) -> Macs | None:
    """MACs of one ATen operation, None where it is not of a counted kind."""
    if name in ("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv"):
        a, b = args[1:3] if name.startswith(("add", "badd")) else args[:2]
        if a.layout != torch.strided:
            return Macs(*[int(a._nnz()) * (b.shape[-1] if b.dim() > 1 else 1)] * 2)
        columns = 1 if name in ("mv", "dot", "addmv") else b.shape[-1]
        return _scaled(a.numel() * columns, (a, b), counting)
    if name == "convolution":
        image, weight, transposed = args[0], args[1], args[6]
        positions = image.numel() if transposed else output.numel()
        return _scaled(positions * math.prod(weight.shape[1:]), (weight,), counting)
    if "scaled_dot_product" in name:
        query, key, value = args[:3]
        macs = math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return Macs(macs, macs)
    return None


class _Recorder(TorchDispatchMode):
    """Adds up the MACs of each module while the model runs."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.counting = counting
        self.macs: dict[str, Macs] = {}
        self.seen: set[int] = set()
        self.stack = [""]
        self.covered = 0  # depth inside modules that a registered counter stands for
        self.messages = 0  # depth inside modules whose sums over edges count

    def add(self, name: str, macs: Macs) -> None:
        self.macs[name] = self.macs.get(name, Macs(0, 0)).plus(macs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.lstrip("_")
        if not self.covered and not name.endswith("backward"):
            macs = _operation(name, args, output, self.counting)
            if self.messages and name.rstrip("_") in _SUMS:
                macs = self._sum_of(args)
            if macs is not None:
                self.add(self.stack[-1], macs)
            if macs is not None or name == "embedding":
                self.seen.update(_storage(arg) for arg in args if isinstance(arg, Tensor))
        return output

    def _sum_of(self, args: tuple[Any, ...]) -> Macs | None:
        """Messages [edges, ..., channels] that are added up; counts of edges [edges] are none."""
        source = args[3] if len(args) > 3 and isinstance(args[3], Tensor) else args[0]
        if source.dim() < 2:
            return None
        return self.counting.messages(len(source), source[0].numel())

    def before(self, name: str, counter: Counter | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(name)
            self.messages += isinstance(module, tuple(_MESSAGES))
            self.covered += counter is not None

        return hook

    def after(self, name: str, counter: Counter | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.stack.pop()
            self.covered -= counter is not None
            self.messages -= isinstance(module, tuple(_MESSAGES))
            if counter is not None and not self.covered:
                self.add(name, counter(module, args, kwargs, output, self.counting))
                self.seen.update(_storage(parameter) for parameter in module.parameters())

        return hook


def _run(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], recorder: _Recorder) -> None:
    training = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    handles = []
    try:
        for name, module in model.named_modules():
            counter = _counter_of(module)
            handles.append(module.register_forward_pre_hook(recorder.before(name, counter), with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.after(name, counter), with_kwargs=True))
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # one fused operation would hide the products within
        with torch.no_grad(), recorder:
            model(*inputs, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode


def packed_bytes(parameter: Tensor, mask: Mask | None) -> int:
    """Bytes of a parameter in the packed format, its share of the header apart."""
    if mask is None:
        return parameter.numel() * parameter.element_size()
    index = encode_mask(mask.keep.cpu().contiguous().numpy(), mask.pattern).nbytes
    return mask.kept * parameter.element_size() + index


def _keep_like(parameter: Tensor, mask: Mask) -> Tensor:
    """The mask on the CPU with the parameter's strides, so that a view of one is a view of the other."""
    keep = torch.empty_strided(parameter.shape, parameter.stride(), dtype=torch.bool)
    return keep.copy_(mask.keep.cpu())


def count(
    model: nn.Module,
    inputs: tuple[Any, ...] = (),
    masks: MaskSet | None = None,
    edges: Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Account:
    """Count what `model(*inputs, **kwargs)` costs, in eval mode and without gradients.

    Weights that the model computes on the fly from its parameters (products with gates, casts under autocast)
    count as dense; products with parameters and their views know the masks.

    Args:
        model: any module, on any device; on the meta device nothing is computed or allocated.
        inputs: example input.
        masks: the model's masks; by default those it carries.
        edges: boolean, for graph models: which of the input's directed edges are kept.
        kwargs: example keyword arguments.

    Raises:
        MaskError: masks that do not fit the model, or edges that do not fit the graph.
    """
    carried = masks if masks is not None else masks_of(model)
    given = {} if carried is None else dict(carried.items())
    if carried is not None:
        carried.check(model)
    parameters = dict(model.named_parameters())  # tied ones appear once, under their first name
    keeps = {_storage(p): (p, _keep_like(p, given[name])) for name, p in parameters.items() if name in given}
    recorder = _Recorder(Counting(keeps, edges))
    _run(model, tuple(inputs), dict(kwargs or {}), recorder)
    layers = []
    for prefix, module in model.named_modules():
        own = {name: p for name, p in parameters.items() if name.rpartition(".")[0] == prefix}
        macs = recorder.macs.get(prefix)
        if own or macs:
            found = macs or Macs(0, 0)
            layers.append(
                LayerCost(
                    prefix,
                    type(module).__name__,
                    sum(p.numel() for p in own.values()),
                    sum(given[name].kept if name in given else p.numel() for name, p in own.items()),
                    found.dense,
                    found.kept,
                    sum(p.numel() * p.element_size() for p in own.values()),
                    sum(packed_bytes(p, given.get(name)) for name, p in own.items()),
                )
            )
    uncounted = tuple(n for n, p in parameters.items() if p.dim() > 1 and _storage(p) not in recorder.seen)
    return Account(tuple(layers), uncounted)
