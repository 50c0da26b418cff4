"""One token through a decoder layer: two calls, with the cache of keys and values between them.

    q, k, v = layer_inputs(x, weights, cosine, sine)  # norm, three products, rotation
    keys, values = cache.update(k, v)
    y = layer_outputs(x, q, keys, values, weights)  # attention, W_o, norm, gated FFN, residuals

A weight is dense, packed (`sparse_linear`) or four-bit groups in panels (`quant_panel_linear`, which rounds x
to eight bits). The references, in plain PyTorch, are the definition. The native kernels do the same with the
sums of those ops; what lies between two products, some thirty operations of torch, takes no call of its own
there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from . import _native
from .dispatch import runs_natively
from .layout import LAYOUTS, PANEL, VALUE_TYPES
from .one_token import (
    check_cache,
    reference_attention,
    reference_norm,
    reference_rotation,
)
from .quant_panel_linear import QuantPanels
from .quant_panel_linear import reference as panels_reference
from .sparse_linear import entries_of
from .sparse_linear import reference as packed_reference
from .weights import SparseWeight

__all__ = ["LayerWeights", "layer_inputs", "layer_outputs"]


Weight = QuantPanels | SparseWeight | Tensor
_KINDS = (QuantPanels, Tensor, SparseWeight)  # in the order of `enum Kind` in native/src/decoder_layer.cpp


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The weights of a layer h = x + W_o attention(norm(x)), y = h + W_down (silu(W_gate n) * W_up n) with
    n = norm(h).

    Attributes:
        q, k, v, o, gate, up, down: the seven weights, each in panels, packed, or dense [out, in]; dense and
            packed ones in fp32, bf16 or fp16.
        input_norm, output_norm: scales of the two RMS norms, [d], fp32, bf16 or fp16.
        epsilon: added to the mean square in both.
        head: inputs per head, even.
        scale: of attention scores.
        thresholds: of the inputs of weights, by name: what is not above it in magnitude is zero (a NaN
            stays); one number or one for each input, fp32, bf16 or fp16.
        gate_threshold: the same of silu(W_gate n); a closed gate makes zero of any product.
    """

    q: Weight
    k: Weight
    v: Weight
    o: Weight
    gate: Weight
    up: Weight
    down: Weight
    input_norm: Float[Tensor, " d"]
    output_norm: Float[Tensor, " d"]
    epsilon: float
    head: int
    scale: float
    thresholds: Mapping[str, Tensor] = field(default_factory=dict)
    gate_threshold: Tensor | None = None

    def __post_init__(self) -> None:
        width, inner, wide = self.q.shape[1], self.q.shape[0], self.gate.shape[0]
        expected = {
            "k": (self.v.shape[0], width),
            "v": (self.k.shape[0], width),
            "o": (width, inner),
            "gate": (wide, width),
            "up": (wide, width),
            "down": (width, wide),
        }
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise OpError(
                    f"{name} must be {shape} beside the others, received {tuple(getattr(self, name).shape)}"
                )
        if self.head % 2 or any(rows % self.head for rows in (inner, self.k.shape[0])):
            raise OpError(
                f"heads of {self.head} do not fit {inner} and {self.k.shape[0]} outputs of q and k: the size "
                "must be even and divide both"
            )
        if inner % self.k.shape[0]:
            raise OpError(f"{inner // self.head} heads of q do not divide among those of k")
        for name in ("input_norm", "output_norm"):
            norm: Tensor = getattr(self, name)
            if norm.shape != (width,) or norm.dtype not in VALUE_TYPES:
                raise OpError(
                    f"{name} must be float32, bfloat16 or float16 [{width}], not {norm.dtype} "
                    f"{tuple(norm.shape)}"
                )

        if not set(self.thresholds) <= set(_NAMES):
            raise OpError(f"thresholds are of {', '.join(_NAMES)}, not of {', '.join(self.thresholds)}")
        found = [(name, each, getattr(self, name).shape[1]) for name, each in self.thresholds.items()]
        if self.gate_threshold is not None:
            found.append(("the gate", self.gate_threshold, wide))
        for name, each, count in found:
            if each.dtype not in VALUE_TYPES or each.shape not in ((), (count,)):
                raise OpError(
                    f"the threshold of {name} must be one number or {count}, fp32, bf16 or fp16, not "
                    f"{each.dtype} {tuple(each.shape)}"
                )

    @functools.cached_property
    def inputs(self) -> _Table:
        """What the kernel of `layer_inputs` is told."""
        return self._table("q", "k", "v")

    @functools.cached_property
    def outputs(self) -> _Table:
        """What the kernel of `layer_outputs` is told."""
        return self._table("o", "gate", "up", "down")

    def _table(self, *names: str) -> _Table:
        gates = [self.gate_threshold if name == "gate" else None for name in names]
        kept = [(self.thresholds.get(name), gate) for name, gate in zip(names, gates, strict=True)]
        return _Table([getattr(self, name) for name in names], kept)

    @functools.cached_property
    def numbers(self) -> Float[Tensor, 2]:
        """Epsilon and scale as the kernels read them."""
        return torch.tensor([self.epsilon, self.scale])


class _Table:
    """Addresses and sizes of weights as native/src/decoder_layer.cpp reads them."""

    def __init__(
        self, weights: Sequence[Weight], thresholds: Sequence[tuple[Tensor | None, Tensor | None]]
    ) -> None:
        self._weights, self._thresholds = weights, thresholds
        self._tensors = [part for each in weights for part in _parts(each)]
        self._tensors += [each for pair in thresholds for each in pair if each is not None]
        kept = [each for pair in thresholds for each in pair]
        self._dense = [each for each in (*weights, *kept) if isinstance(each, Tensor)]
        self._places: list[object] = []
        self._rows = torch.empty(0, dtype=torch.int64)

    def address(self) -> int:
        """Where the numbers are; made again when a tensor of the weights lies elsewhere or is another kind.

        Raises:
            OpError: parts of a weight do not fit (any more).
        """
        places: list[object] = [*map(_data_ptr, self._tensors), *((t.dtype, t.stride()) for t in self._dense)]
        if places != self._places:
            rows = [
                [*_numbers(weight), *(number for each in pair for number in _threshold_numbers(each))]
                for weight, pair in zip(self._weights, self._thresholds, strict=True)
            ]
            self._rows = torch.tensor(rows, dtype=torch.int64)
            self._places = places
        return self._rows.data_ptr()


def _parts(weight: Weight) -> tuple[Tensor, ...]:
    """The tensors that a weight consists of."""
    return (weight,) if isinstance(weight, Tensor) else weight.parts


def _numbers(weight: Weight) -> list[int]:
    """What the kernels are told of a weight, `kNumbers` of native/src/decoder_layer.cpp."""
    numbers = [next(i for i, kind in enumerate(_KINDS) if isinstance(weight, kind)), *weight.shape]
    if isinstance(weight, Tensor):
        if weight.dtype not in VALUE_TYPES or not weight.is_contiguous() or weight.device.type != "cpu":
            raise OpError(
                f"a dense weight must be contiguous fp32, bf16 or fp16 on a CPU, not {weight.dtype} "
                f"{tuple(weight.shape)} with strides {weight.stride()} on {weight.device}"
            )
        numbers += [weight.data_ptr(), VALUE_TYPES.index(weight.dtype)]
    else:
        weight.check()
        numbers += map(_data_ptr, weight.parts)
        if isinstance(weight, SparseWeight):
            if weight.values.dtype not in VALUE_TYPES:
                raise OpError(f"a packed weight must be in fp32, bf16 or fp16, not {weight.values.dtype}")
            kind = LAYOUTS.index(weight.layout), weight.width, VALUE_TYPES.index(weight.values.dtype)
            numbers += [entries_of(weight), PANEL, *kind]
        else:
            numbers += [weight.scales.shape[0], weight.group]
    return numbers + [0] * (_NUMBERS - len(numbers))


def _threshold_numbers(threshold: Tensor | None) -> tuple[int, int, int]:
    if threshold is None:
        return 0, 0, 0
    if threshold.device.type != "cpu" or not threshold.is_contiguous():
        raise OpError(f"a threshold must be contiguous and on a CPU, not {threshold.device}")
    return threshold.data_ptr(), VALUE_TYPES.index(threshold.dtype), threshold.dim()


_NUMBERS = 11  # of a weight, and three for each of two thresholds
_NAMES = ("q", "k", "v", "o", "gate", "up", "down")
_data_ptr = torch.Tensor.data_ptr


def above(x: Float[Tensor, " d"], threshold: Tensor | None) -> Float[Tensor, " d"]:
    """x where its magnitude is above a threshold, else zero; a NaN stays."""
    return x if threshold is None else x.masked_fill(x.abs() <= threshold.float(), 0)


def product(x: Float[Tensor, " in"], weights: LayerWeights, name: str) -> Float[Tensor, " out"]:
    """The definition of a product in fp32, by the name of the weight."""
    x, weight = above(x, weights.thresholds.get(name)), getattr(weights, name)
    if isinstance(weight, Tensor):
        return weight.float() @ x
    if isinstance(weight, SparseWeight):
        return packed_reference(x, weight)
    return panels_reference(x, weight)


def layer_inputs(
    x: Float[Tensor, " d"],
    weights: LayerWeights,
    cosine: Float[Tensor, " head"],
    sine: Float[Tensor, " head"],
) -> tuple[Float[Tensor, " qs"], Float[Tensor, " ks"], Float[Tensor, " ks"]]:
    """Queries, keys and values of one token, the first two rotated by its position, in the dtype of x; sums
    are in fp32.

    Raises:
        OpError: another dtype than fp32, bf16 or fp16, shapes that do not fit, or an index that was changed.
    """
    _check(x, weights)
    if cosine.shape != (weights.head,) or sine.shape != (weights.head,):
        raise OpError(f"cosine and sine must be [{weights.head}], received {tuple(cosine.shape)}")
    sizes = [weights.q.shape[0], weights.k.shape[0], weights.v.shape[0]]
    if not runs_natively(x):
        normed = reference_norm(x.float(), weights.input_norm, weights.epsilon)
        q, k, v = (product(normed, weights, name) for name in ("q", "k", "v"))
        q, k = (reference_rotation(each, cosine.float(), sine.float()) for each in (q, k))
        return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)
    out = torch.empty(sum(sizes))
    wide, norm = _native.plain(x), _native.plain(weights.input_norm)
    cosine, sine = _native.plain(cosine), _native.plain(sine)
    _native.function("zoo_decoder_inputs", "pppppppii")(
        wide.data_ptr(),
        weights.inputs.address(),
        norm.data_ptr(),
        weights.numbers.data_ptr(),
        cosine.data_ptr(),
        sine.data_ptr(),
        out.data_ptr(),
        weights.head,
        _native.threads(),
    )
    q, k, v = (out if x.dtype is torch.float32 else out.to(x.dtype)).split(sizes)
    return q, k, v


def layer_outputs(
    x: Float[Tensor, " d"],
    q: Float[Tensor, " qs"],
    keys: Float[Tensor, "kv_heads count head"],
    values: Float[Tensor, "kv_heads count head"],
    weights: LayerWeights,
) -> Float[Tensor, " d"]:
    """What the layer makes of one token x, its queries, and the keys and values of all tokens up to it, in
    the dtype of x; sums are in fp32.

    Raises:
        OpError: another dtype than fp32, bf16 or fp16, shapes that do not fit, or an index that was changed.
    """
    _check(x, weights)
    head, kv_heads = weights.head, weights.k.shape[0] // weights.head
    if keys.shape != values.shape or keys.shape[::2] != (kv_heads, head) or q.shape != weights.q.shape[:1]:
        raise OpError(
            f"keys and values must be [{kv_heads}, count, {head}] and q [{weights.q.shape[0]}], received "
            f"{tuple(keys.shape)}, {tuple(values.shape)} and {tuple(q.shape)}"
        )
    check_cache(keys, values)
    if not runs_natively(x):
        wide, q, keys, values = (each.float() for each in (x, q, keys, values))
        return _reference_outputs(wide, q, keys, values, weights).to(x.dtype)
    keys, values = (each if each.stride(2) == 1 else each.contiguous() for each in (keys, values))
    y = torch.empty(weights.o.shape[0])
    wide, q, norm = _native.plain(x), _native.plain(q), _native.plain(weights.output_norm)
    _native.function("zoo_decoder_outputs", "ppppippppiiiiiiiii")(
        wide.data_ptr(),
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        VALUE_TYPES.index(keys.dtype),
        weights.outputs.address(),
        norm.data_ptr(),
        weights.numbers.data_ptr(),
        y.data_ptr(),
        weights.q.shape[0] // head,
        kv_heads,
        head,
        keys.shape[1],
        *keys.stride()[:2],
        *values.stride()[:2],
        _native.threads(),
    )
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _reference_outputs(x: Tensor, q: Tensor, keys: Tensor, values: Tensor, weights: LayerWeights) -> Tensor:
    h = x + product(reference_attention(q, keys, values, weights.scale), weights, "o")
    normed = reference_norm(h, weights.output_norm, weights.epsilon)
    gate, up = (product(normed, weights, name) for name in ("gate", "up"))
    gate = above(torch.nn.functional.silu(gate), weights.gate_threshold)
    if weights.gate_threshold is not None:
        up = up.masked_fill(gate == 0, 0)
    return h + product(gate * up, weights, "down")


def _check(x: Tensor, weights: LayerWeights) -> None:
    if x.shape != weights.input_norm.shape or x.device != weights.input_norm.device:
        raise OpError(
            f"x must be [{weights.input_norm.shape[0]}] on {weights.input_norm.device}, received "
            f"{tuple(x.shape)} on {x.device}"
        )
    if x.dtype not in VALUE_TYPES:
        raise OpError(f"x must be float32, bfloat16 or float16, not {x.dtype}")
