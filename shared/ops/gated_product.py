"""y = W_down (g * (W_up x)) where many gates g are exactly zero: neither row of such a channel is read.

What a gated feed-forward block does behind its gate (SwiGLU, GeGLU), for decoders whose gates are thresholded
(CHESS, CATS):

    up, down = store_rows(W_up), store_rows(W_down.t())       # or pack(...) where the weights are sparse too
    y = gated_product(x, g, up, down)

Both matrices are stored row by row of the hidden channels, dense (`DenseRows`) or packed by mask bits
(`SparseWeight`). A batch uses the union of its rows' active channels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch, triton
from .dense_linear import linear, product
from .dense_rows import ALIGN, DenseRows, store_rows
from .gather_linear import MOST_BATCH
from .layout import PANEL, VALUE_TYPES
from .sparse_linear import sparse_linear
from .weights import SparseWeight, pack

__all__ = ["DenseRows", "SparseWeight", "gated_product", "pack", "plan", "reference", "store_rows"]

Rows = DenseRows | SparseWeight
_FLOATS = ("float32", "bfloat16", "float16")


def gated_product(
    x: Float[Tensor, "*batch in"],
    g: Float[Tensor, "*batch hidden"],
    up: Rows,
    down: Rows,
    up_bias: Float[Tensor, " hidden"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """y = sum over i with g_i != 0 of g_i (W_up[i] x + b_i) W_down[:, i].

    Args:
        x: the block's input, fp32, bf16 or fp16 (fp64 runs on the reference).
        g: the activated and thresholded gate; its zeros are found here. NaN is not zero.
        up: W_up [hidden, in].
        down: W_down transposed, [hidden, out]; stored like `up`.
        up_bias: of the up projection.

    The native kernel sums in fp32 and its result does not depend on the number of threads. It serves
    inference: where gradients are wanted, the dense path is taken.

    Raises:
        OpError: shapes, dtypes, devices or storages that do not fit.
    """
    if dispatch.direct(x, g, *_tensors(up), *_tensors(down), up_bias):
        return _forward(x, g, up, down, up_bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, g)):
        _check(x, g, up, down, up_bias)
        return _dense_product(x, g, up, down, up_bias)
    return _gated_product(x, g, *_flat(up), *_flat(down), up_bias)


def reference(
    x: Float[Tensor, "*batch in"],
    g: Float[Tensor, "*batch hidden"],
    up: Rows,
    down: Rows,
    up_bias: Float[Tensor, " hidden"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """The definition of `gated_product`, over the active channels only, in fp32 (fp64 for fp64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat, gates = x.reshape(-1, x.shape[-1]).to(wide), g.reshape(-1, g.shape[-1]).to(wide)
    active = (gates != 0).any(0).nonzero().squeeze(1)
    u = flat @ _matrix(up)[active].to(wide).t()
    if up_bias is not None:
        u = u + up_bias[active].to(wide)
    h = torch.where(gates[:, active] != 0, gates[:, active] * u, 0)
    return (h @ _matrix(down)[active].to(wide)).to(x.dtype).reshape(*x.shape[:-1], _shape(down)[1])


def plan(
    x: Float[Tensor, "*batch in"],
    g: Float[Tensor, "*batch hidden"],
    up: Rows,
    down: Rows,
    up_bias: Float[Tensor, " hidden"] | None = None,
) -> dispatch.Plan:
    """The backend that `gated_product` would run these arguments on."""
    _check(x, g, up, down, up_bias)
    return dispatch.choose("gated_product", x.device, *_case(x, up))


def _case(x: Tensor, up: Rows) -> tuple[tuple[str, ...], str, tuple[float, ...]]:
    """Backends offered, and the kind and sizes by which measured cases are looked up."""
    rows, cols = _shape(up)
    batch = max(1, x.numel() // max(1, cols))
    small = x.dtype != torch.float64 and batch <= MOST_BATCH
    offered = ("native", "dense", "reference") if small else ("dense", "reference")
    if small and isinstance(up, DenseRows):
        offered = (*offered, *triton.offered(x))
    return offered, _kind(up), (float(max(1, rows * cols)), float(batch))


def _shape(rows: Rows) -> tuple[int, int]:
    return rows.shape if isinstance(rows, SparseWeight) else (rows.rows, rows.cols)


def _kind(rows: Rows) -> str:
    if isinstance(rows, SparseWeight):
        return f"{rows.layout} {str(rows.values.dtype).removeprefix('torch.')}"
    return rows.kind


def _stride(rows: Rows) -> int:
    return -(-_shape(rows)[1] // ALIGN) * ALIGN if isinstance(rows, SparseWeight) else rows.stride


def _matrix(rows: Rows) -> Tensor:
    """The matrix with its zeros; of a packed weight a copy."""
    if isinstance(rows, SparseWeight):
        return rows.expanded(rows.values.dtype)
    return rows.dense()


def _tensors(rows: Rows) -> tuple[Tensor | None, ...]:
    if isinstance(rows, SparseWeight):
        return rows.values, rows.index, rows.pointer
    return rows.data, rows.scales


def _check(x: Tensor, g: Tensor, up: Rows, down: Rows, up_bias: Tensor | None) -> None:
    for rows in (up, down):
        if isinstance(rows, SparseWeight):
            rows.check()
    hidden, inputs = _shape(up)
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise OpError(f"x {tuple(x.shape)} does not end in the {inputs} inputs of the up projection")
    if g.shape != (*x.shape[:-1], hidden):
        raise OpError(f"g must be {(*x.shape[:-1], hidden)}, received {tuple(g.shape)}")
    if _shape(down)[0] != hidden:
        raise OpError(
            f"the down projection, stored by its inputs, has {_shape(down)[0]} rows for {hidden} channels: "
            "store W_down.t()"
        )
    if _kind(up) != _kind(down) or _kind(up).removeprefix("bitmask ") not in _FLOATS:
        raise OpError(
            f"up is stored as {_kind(up)}, down as {_kind(down)}: both must be dense rows or both bitmask, "
            f"of one of {', '.join(_FLOATS)}"
        )
    if not x.dtype.is_floating_point or g.dtype != x.dtype:
        raise OpError(f"x and g must have one floating-point dtype, received {x.dtype} and {g.dtype}")
    places = {t.device for t in (x, g, *_tensors(up), *_tensors(down), up_bias) if t is not None}
    if len(places) > 1:
        raise OpError(f"the arguments are on {', '.join(map(str, places))}: move them to one device")
    if up_bias is not None and up_bias.shape != (hidden,):
        raise OpError(f"up_bias must be [{hidden}], received {tuple(up_bias.shape)}")


@dispatch.in_own_precision
def _forward(x: Tensor, g: Tensor, up: Rows, down: Rows, up_bias: Tensor | None) -> Tensor:
    _check(x, g, up, down, up_bias)
    backend = dispatch.choose("gated_product", x.device, *_case(x, up)).backend
    if backend == "native" and x.numel() and _finite(x, up):
        return _native_product(x, g, up, down, up_bias)
    if backend == "reference":
        return reference(x, g, up, down, up_bias)
    if backend == "triton" and isinstance(up, DenseRows) and isinstance(down, DenseRows):
        from .triton import gather

        return gather.gated_product(x, g, up, down, up_bias)
    return _dense_product(x, g, up, down, up_bias)


def _finite(x: Tensor, up: Rows) -> bool:
    """Whether the kernel may take x: a zero that it expands from mask bits would turn infinity into NaN."""
    return isinstance(up, DenseRows) or bool(torch.isfinite(x.sum(dtype=torch.float64)))


def _dense_product(x: Tensor, g: Tensor, up: Rows, down: Rows, up_bias: Tensor | None) -> Tensor:
    bias = None if up_bias is None else up_bias.to(x.dtype)
    if isinstance(up, SparseWeight):
        u = sparse_linear(x, up, bias)
    else:
        u = linear(x, up.dense().to(x.dtype), bias)
    h = g * u
    if torch.is_grad_enabled() and (x.requires_grad or g.requires_grad):
        # A closed gate that met an infinite product made a NaN of it, which is not in the sum.
        return product(torch.where((g == 0) & ~torch.isfinite(u), 0, h), _matrix(down).to(x.dtype))
    y = product(h, _matrix(down).to(x.dtype))
    return y if _native.finite(y) else reference(x, g, up, down, up_bias)


def _native_product(x: Tensor, g: Tensor, up: Rows, down: Rows, up_bias: Tensor | None) -> Tensor:
    hidden, inputs = _shape(up)
    out, stride = _shape(down)[1], _stride(down)
    flat, gates = _native.plain(x.reshape(-1, inputs)), _native.plain(g.reshape(-1, hidden))
    bias = None if up_bias is None else _native.plain(up_bias)
    rows = flat.shape[0]
    batch = 1 << (rows - 1).bit_length()
    if batch != rows:  # the kernel is built for 1, 2, 4 and 8; rows without gates cost little
        flat, gates = (torch.nn.functional.pad(t, (0, 0, 0, batch - rows)) for t in (flat, gates))
    y = torch.empty(batch, stride)
    values = VALUE_TYPES.index(up.values.dtype if isinstance(up, SparseWeight) else up.data.dtype)
    _native.function("zoo_gated_product", "ppppppppppiiiiiiiiiii")(
        flat.data_ptr(),
        gates.data_ptr(),
        *_addresses(up),
        None if bias is None else bias.data_ptr(),
        *_addresses(down),
        y.data_ptr(),
        batch,
        inputs,
        hidden,
        out,
        _stride(up),
        stride,
        PANEL,
        *(each.kept if isinstance(each, SparseWeight) else 0 for each in (up, down)),
        values,
        _native.threads(),
    )
    return y[:rows, :out].to(x.dtype).reshape(*x.shape[:-1], out)


def _addresses(rows: Rows) -> tuple[int | None, int | None, int | None]:
    if isinstance(rows, SparseWeight):
        return rows.values.data_ptr(), rows.index.data_ptr(), rows.pointer.data_ptr()
    return rows.data.data_ptr(), None, None


def _flat(rows: Rows) -> tuple[Any, ...]:
    """A storage as arguments of the custom op: tensors, layout or kind, shape, width."""
    if isinstance(rows, SparseWeight):
        return rows.values, rows.index, rows.pointer, rows.layout, *rows.shape, rows.width
    return rows.data, None, None, rows.kind, rows.rows, rows.cols, rows.group


def _unflat(
    data: Tensor, index: Tensor | None, pointer: Tensor | None, kind: str, rows: int, cols: int, width: int
) -> Rows:
    if index is not None and pointer is not None:
        return SparseWeight(data, index, pointer, kind, (rows, cols), width)
    return DenseRows(data, None, kind, cols, width)


@torch.library.custom_op(
    "zoo::gated_product",
    mutates_args=(),
    schema="(Tensor x, Tensor g, Tensor up, Tensor? up_index, Tensor? up_pointer, str up_kind, int up_rows, "
    "int up_cols, int up_width, Tensor down, Tensor? down_index, Tensor? down_pointer, str down_kind, "
    "int down_rows, int down_cols, int down_width, Tensor? up_bias) -> Tensor",
)
def _gated_product(x: Tensor, g: Tensor, *rest: Any) -> Tensor:
    return _forward(x, g, _unflat(*rest[:7]), _unflat(*rest[7:14]), rest[14])


@_gated_product.register_fake
def _(x: Tensor, g: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[12])


def _examples() -> Iterator[dispatch.Example]:
    up, down = torch.randn(40, 24), torch.randn(40, 20)
    kept_up, kept_down = torch.rand(40, 24) < 0.5, torch.rand(40, 20) < 0.5
    stored = (store_rows(up), store_rows(down))
    packed = (pack(up, kept_up, "bitmask"), pack(down, kept_down, "bitmask"))
    for rows in (stored, packed):
        for batch in (1, 3, 12):
            gates = torch.randn(batch, 40) * (torch.rand(batch, 40) < 0.4)
            call = functools.partial(_example_call, up=rows[0], down=rows[1], g=gates)
            yield dispatch.Example(call, (torch.randn(batch, 24),))


def _example_call(x: Tensor, g: Tensor, up: Rows, down: Rows) -> Tensor:
    return gated_product(x, g, up, down)


dispatch.register("gated_product", plan=plan, examples=_examples)
