"""y = x W^T + b with a sparse W: the zeros are neither stored nor multiplied.

    weight = pack(linear.weight, mask)
    y = sparse_linear(x, weight, linear.bias)

A dropped weight takes no part in the sum: an infinite or NaN x meets only the weights that are kept.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch, triton
from ._cache import DerivedCache
from .derived import Derived
from .layout import LAYOUTS, OVERREAD, PANEL, VALUE_TYPES, columns_of_bits
from .memory import on_huge_pages
from .settled import dense_run, native_run
from .weights import SparseWeight, pack

__all__ = ["SparseWeight", "pack", "plan", "reference", "sparse_linear"]


def sparse_linear(
    x: Float[Tensor, "*batch in"], weight: SparseWeight, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """y = x W^T + bias.

    Sums are in fp32 for fp32, bf16 and fp16 values; the result has the dtype of x. Gradients reach x,
    `weight.values` (kept weights only) and the bias. For fixed inputs the native result does not depend on
    the number of threads, bit for bit.

    Args:
        x: fp32, bf16, fp16 (or fp64, which only the reference takes); any strides.
        weight: from `pack`.

    Raises:
        OpError: shapes, dtypes or devices that do not fit, or a backend that cannot run this.
    """
    if dispatch.direct(x, weight.values, bias):
        run = weight.settled.find(x, bias, weight.shape[0])
        if run is not None:
            return run(x, bias)
        weight.check()
        return _forward(x, weight, bias)
    return _sparse_linear(
        x, weight.values, weight.index, weight.pointer, bias, weight.layout, *weight.shape, weight.width
    )


def reference(
    x: Float[Tensor, "*batch in"], weight: SparseWeight, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """The definition: each kept weight times its x, summed per row (in fp32; in fp64 for fp64)."""
    flat, wide = x.reshape(-1, x.shape[-1]), _accumulator(x, weight.values)
    rows, cols = weight.coordinates()
    rows = rows.clamp(max=weight.shape[0])  # the padding rows of 4x1 blocks, cut off below
    values = weight.values[: weight.kept].to(wide)
    step = max(1, _REFERENCE_PRODUCTS // max(1, weight.kept))
    parts = [
        flat.new_zeros(part.shape[0], weight.shape[0] + 1, dtype=wide).index_add(
            1, rows, part.to(wide)[:, cols] * values
        )
        for part in flat.split(step)
    ]
    y = torch.cat(parts)[:, : weight.shape[0]]
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def plan(
    x: Float[Tensor, "*batch in"], weight: SparseWeight, bias: Float[Tensor, " out"] | None = None
) -> dispatch.Plan:
    """The backend that `sparse_linear` would run these arguments on."""
    _check(x, weight, bias)
    return _plan(x, weight)


_REFERENCE_PRODUCTS = 1 << 24  # products that the reference holds at a time
# A larger batch runs a bitmask weight by its columns, which are then kept (2 bytes per entry).
_EXPAND_BATCH = 4
# A Triton product of a sparser bitmask weight goes by its columns, too.
_EXPAND_DENSITY = 0.25
# A large batch meets a part of x that outgrows the nearest caches unless panels are narrow; from this batch
# on a second copy of the weight pays (benchmarks/sparse_linear.py: 1.1 to 1.6 times as fast at batch 64).
NARROW, NARROW_BATCH = 256, 48
_dense, _csr, _columns = Derived(), Derived(), Derived()
_narrow = DerivedCache[list[tuple[Tensor, Tensor, Tensor] | None]](capacity=1024)


def _accumulator(x: Tensor, values: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, values.dtype) else torch.float32


def _check(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> None:
    rows, cols = weight.shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise OpError(f"x {tuple(x.shape)} does not end in the {cols} columns of the weight {weight.shape}")
    if not x.dtype.is_floating_point:
        raise OpError(f"x must be floating point, received {x.dtype}")
    if x.device != weight.values.device:
        raise OpError(f"x is on {x.device}, the weight on {weight.values.device}: move one of them")
    if bias is not None and (bias.shape != (rows,) or bias.device != x.device):
        raise OpError(f"bias must be [{rows}] on {x.device}, received {tuple(bias.shape)} on {bias.device}")


def _plan(x: Tensor, weight: SparseWeight) -> dispatch.Plan:
    return dispatch.choose("sparse_linear", x.device, *case(x, weight))


def case(x: Tensor, weight: SparseWeight) -> tuple[tuple[str, ...], str, tuple[float, ...]]:
    """Backends offered, and the kind and sizes by which measured cases are looked up: weights, batch,
    density."""
    rows, cols = weight.shape
    wide = torch.float64 in (x.dtype, weight.values.dtype)
    offered: tuple[str, ...] = ("dense", "reference", "vendor")
    if not wide:
        offered = ("native", *offered)
    if weight.values.dtype != x.dtype or x.dtype not in (torch.float32, torch.float64):
        offered = offered[:-1]  # torch's CSR product takes one dtype for all, and fp32 or fp64 only
    if weight.layout in ("bitmask", "csr"):
        offered = (*offered, *triton.offered(x))
    kind = f"{weight.layout}{weight.width} {str(weight.values.dtype).removeprefix('torch.')}"
    if x.dtype != weight.values.dtype:
        kind += f" x {str(x.dtype).removeprefix('torch.')}"
    batch = max(1, x.numel() // max(1, cols))
    return offered, kind, (float(max(1, rows * cols)), float(batch), max(weight.density, 1e-4))


def _forward(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    if x.numel() == 0 or weight.kept == 0:
        y = x.new_zeros(*x.shape[:-1], weight.shape[0])
        return y if bias is None else y + bias.to(y.dtype)
    call = ("sparse_linear", x.dtype, x.numel())
    backend = dispatch.recall(weight.plans, call, lambda: _plan(x, weight))
    if backend == "native":
        return _native_forward(x, weight, bias)
    if backend == "dense":
        run = dense_run(_dense_form(weight, x.dtype))
        weight.settled.keep(x, run, weight.values)
        return run(x, bias)
    if backend == "vendor":
        matrix = _csr.get(weight.values, lambda: _torch_csr(weight))
        y = (matrix @ x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], weight.shape[0])
        return y.contiguous() if bias is None else y + bias
    if backend == "triton":
        return _triton_forward(x, weight, bias)
    return reference(x, weight, bias)


def _dense_form(weight: SparseWeight, dtype: torch.dtype) -> Tensor:
    forms: dict[torch.dtype, Tensor] = _dense.get(weight.values, dict)
    if dtype not in forms:
        forms[dtype] = on_huge_pages(weight.to_dense().to(dtype))
    return forms[dtype]


def _torch_csr(weight: SparseWeight) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        dense = weight.to_dense().to_sparse_csr()
    # With 32-bit indices MKL is up to 2.6 times as fast as with torch's default of 64.
    return torch.sparse_csr_tensor(
        dense.crow_indices().int(),
        dense.col_indices().int(),
        dense.values(),
        size=dense.shape,
        check_invariants=False,
    )


def csr_index(weight: SparseWeight) -> tuple[str, Tensor]:
    """Layout and index of a weight that kernels without a bitmask loop take; the values keep their
    order."""
    if weight.layout != "bitmask":
        return weight.layout, weight.index
    return "csr", _columns.get(weight.index, lambda: columns_of_bits(weight.index))


def _native_forward(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> Tensor:
    cols = weight.shape[1]
    batch = x.numel() // cols
    layout, index = weight.layout, weight.index
    if layout == "bitmask" and batch > _EXPAND_BATCH:
        layout, index = csr_index(weight)
    form = (weight.values, index, weight.pointer, PANEL)
    kind = (LAYOUTS.index(layout), weight.width, VALUE_TYPES.index(weight.values.dtype))
    y_shape = (*x.shape[:-1], weight.shape[0])
    narrow = layout == "csr" and batch >= NARROW_BATCH and cols > 2 * NARROW
    if narrow:
        form = narrow_form(*form[:3], weight.shape, NARROW)
    function = _native.function("zoo_sparse_linear", "ppppppiiiiiiii")
    run = native_run(function, form[:3], y_shape, (batch, *weight.shape, form[3], *kind))
    if not narrow:
        weight.settled.keep(x, run, weight.values, weight.index, weight.pointer)
    return run(x, bias)


def _triton_forward(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> Tensor:
    from .triton import bitmask, csr

    rows, flat = weight.shape[0], x.reshape(-1, x.shape[-1]).contiguous()
    batch, multiply, index = flat.shape[0], csr.multiply, weight.index
    if weight.layout == "bitmask":
        if weight.density >= _EXPAND_DENSITY and batch <= bitmask.MOST_PLAIN_BATCH:
            multiply = bitmask.multiply
        elif batch > bitmask.MOST_PLAIN_BATCH and bool(torch.isfinite(flat).all()):
            multiply = bitmask.multiply_wide
        else:
            index = csr_index(weight)[1]
    y = multiply(flat, weight.values, index, weight.pointer, rows, bias)
    return y.reshape(*x.shape[:-1], rows)


def narrow_form(
    values: Tensor, index: Tensor, pointer: Tensor, shape: tuple[int, int], panel: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """A csr weight in panels of so many columns, and their columns; as it is when its values are met for the
    first time.

    A step of training changes the values, and putting them in another order costs as much as it saves.
    """
    seen = _narrow.get((values, index, pointer), (shape, panel), list[tuple[Tensor, Tensor, Tensor] | None])
    if not seen:
        seen.append(None)
        return values, index, pointer, PANEL
    form = seen[0]
    if form is None:
        form = seen[0] = _make_narrow(values, index, pointer, shape, panel)
    return *form, panel


def _make_narrow(
    values: Tensor, index: Tensor, pointer: Tensor, shape: tuple[int, int], panel: int
) -> tuple[Tensor, Tensor, Tensor]:
    segments = -(-shape[1] // panel) * shape[0]
    form = (torch.empty_like(values), torch.empty_like(index), pointer.new_empty(segments + 1))
    places = [tensor.data_ptr() for tensor in (values, index, pointer, *form)]
    _native.function("zoo_csr_narrow", "ppppppiiiii")(*places, *shape, PANEL, panel, values.element_size())
    return form


def _backward(
    grad: Tensor, x: Tensor, weight: SparseWeight, need_x: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the stored values; an empty tensor where one is not needed."""
    rows, cols = weight.shape
    flat, flat_grad = x.reshape(-1, cols), grad.reshape(-1, rows)
    wide = _accumulator(x, weight.values)
    if (
        x.device.type == "cpu"
        and weight.layout in ("csr", "bitmask")
        and _plan(x, weight).backend == "native"
    ):
        grad_x, grad_values = _native_backward(flat_grad.float(), flat.float(), weight, need_x, need_values)
    else:
        dense = weight.to_dense().to(wide)
        grad_x = flat_grad.to(wide) @ dense if need_x else flat.new_empty(0)
        grad_values = flat.new_empty(0)
        if need_values:
            at_rows, at_cols = weight.coordinates()
            grad_dense = flat_grad.to(wide).t() @ flat.to(wide)
            # The padding rows of 4x1 blocks have no gradient.
            grad_dense = torch.nn.functional.pad(grad_dense, (0, 0, 0, -rows % 4))
            grad_values = torch.nn.functional.pad(grad_dense[at_rows, at_cols], (0, OVERREAD))
    return grad_x.to(x.dtype).reshape(x.shape if need_x else 0), grad_values.to(weight.values.dtype)


def _native_backward(
    grad: Tensor, flat: Tensor, weight: SparseWeight, need_x: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    grad, flat = grad.contiguous(), flat.contiguous()
    _, index = csr_index(weight)
    grad_x = torch.empty(flat.shape if need_x else 0)
    grad_values = torch.zeros(weight.values.shape if need_values else 0)
    _native.function("zoo_sparse_linear_backward", "pppppppiiiiii")(
        flat.data_ptr(),
        grad.data_ptr(),
        weight.values.data_ptr(),
        index.data_ptr(),
        weight.pointer.data_ptr(),
        grad_x.data_ptr() if need_x else None,
        grad_values.data_ptr() if need_values else None,
        flat.shape[0],
        *weight.shape,
        PANEL,
        VALUE_TYPES.index(weight.values.dtype),
        _native.threads(),
    )
    return grad_x, grad_values


@torch.library.custom_op(
    "zoo::sparse_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor index, Tensor pointer, Tensor? bias, str layout, int rows, "
    "int cols, int width) -> Tensor",
)
def _sparse_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    pointer: Tensor,
    bias: Tensor | None,
    layout: str,
    rows: int,
    cols: int,
    width: int,
) -> Tensor:
    return _forward(x, SparseWeight(values, index, pointer, layout, (rows, cols), width), bias)


@_sparse_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    pointer: Tensor,
    bias: Tensor | None,
    layout: str,
    rows: int,
    cols: int,
    width: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op(
    "zoo::sparse_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor values, Tensor index, Tensor pointer, str layout, int rows, "
    "int cols, int width, bool need_x, bool need_values) -> (Tensor, Tensor)",
)
def _sparse_linear_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    index: Tensor,
    pointer: Tensor,
    layout: str,
    rows: int,
    cols: int,
    width: int,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    weight = SparseWeight(values, index, pointer, layout, (rows, cols), width)
    return _backward(grad, x, weight, need_x, need_values)


@_sparse_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    index: Tensor,
    pointer: Tensor,
    layout: str,
    rows: int,
    cols: int,
    width: int,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), values.new_empty(values.shape if need_values else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, pointer, bias, *form = inputs
    ctx.save_for_backward(x, values, index, pointer)
    ctx.form, ctx.bias_dtype = form, None if bias is None else bias.dtype


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_values, *_, need_bias = ctx.needs_input_grad[:5]
    grad_x = grad_values = grad_bias = None
    if need_x or need_values:
        grad_x, grad_values = _sparse_linear_backward(
            grad.contiguous(), *ctx.saved_tensors, *ctx.form, need_x, need_values
        )
    if need_bias:
        grad_bias = (
            grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if grad.dim() > 1 else grad.to(ctx.bias_dtype)
        )
    return (
        grad_x if need_x else None,
        grad_values if need_values else None,
        None,
        None,
        grad_bias,
        *[None] * 4,
    )


_sparse_linear.register_autograd(_autograd, setup_context=_setup_context)

# Layouts that are measured, each at densities at which `pack` chooses it.
_EXAMPLES = {
    "bitmask": (0.8, 0.5, 0.35),
    "csr": (0.3, 0.2, 0.1, 0.05),
    "rows4": (0.5, 0.3, 0.1),
    "columns4": (0.5, 0.3, 0.1),
    "columns8": (0.5, 0.3, 0.1),
    "columns16": (0.5, 0.3, 0.1),
    "2:4": (0.5,),
    "1:4": (0.25,),
}
# Types of the values and of x that are measured, and batches.
_TYPES = (
    (torch.float32, torch.float32, (1, 8, 64)),
    (torch.bfloat16, torch.bfloat16, (1, 16)),
    (torch.float16, torch.float32, (1, 16)),
    (torch.float16, torch.float16, (1, 16)),
)
_PRODUCTS = 1 << 18  # entries of x in a large batch: small layers meet a graph's nodes, or an image's patches


def calibrate(quick: bool) -> list[dispatch.Entry]:
    """Measure layouts x densities x dtypes x sizes x batches on this machine, for `dispatch.calibrate`."""
    entries = []
    for layout, densities in _EXAMPLES.items():
        unstructured = layout in ("bitmask", "csr")
        for side in (1024,) if quick else (128, 512, 1024, 4096) if unstructured else (256, 512, 2048):
            for density in densities:
                weight = _example(side, density, layout)
                for stored, given, batches in _TYPES[: 1 if quick else None]:
                    typed = weight.to(stored)
                    wide = (_PRODUCTS // side,) if unstructured and side < 4096 else ()
                    for batch in (*batches, *wide):
                        x = torch.randn(batch, side).to(given)
                        run = functools.partial(sparse_linear, x, typed)
                        run(), run()  # forms of the weight are made once
                        entries.append(dispatch.measure("sparse_linear", run, *case(x, typed), quick=quick))
    return entries


def _example(side: int, density: float, layout: str) -> SparseWeight:
    if ":" in layout:
        n, m = map(int, layout.split(":"))
        mask = (torch.rand(side, side // m, m).argsort(-1) < n).reshape(side, side)
        return replace(pack(torch.randn(side, side), mask, "bitmask"), width=8 * n // m)
    width = int(layout.removeprefix("columns")) if layout.startswith("columns") else 1
    height = 4 if layout == "rows4" else 1
    mask = torch.rand(side // height, side // width) < density
    mask = mask.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return pack(torch.randn(side, side), mask, layout)


dispatch.register("sparse_linear", plan=plan, calibrate=calibrate)
