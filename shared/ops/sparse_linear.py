"""y = x W^T + b with a sparse W: the zeros are neither stored nor multiplied.

    weight = pack(linear.weight, mask)
    y = sparse_linear(x, weight, linear.bias)

A dropped weight takes no part in the sum: an infinite or NaN x meets only the weights that are kept.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch, triton
from .cache import Derived, Run, dense_run, native_run, owned_run
from .dense_linear import fastest_product
from .layout import LAYOUTS, OVERREAD, PANEL, VALUE_TYPES, block_of
from .weights import SparseWeight, pack, whole_blocks

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
        run = weight.calls.find(x, bias, weight.shape[0])
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
    flat, wide = x.reshape(x.shape[:-1].numel(), x.shape[-1]), _accumulator(x, weight.values)
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
_csr = Derived[Tensor]()
Parts = tuple[Tensor, Tensor, Tensor]  # values, index, pointer
_narrow = Derived[Parts](1024)


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


def case(x: Tensor, weight: SparseWeight) -> tuple[tuple[str, ...], str, tuple[float, ...], int]:
    """Backends offered, the kind and sizes by which measured cases are looked up (weights, batch, density),
    and the bytes that a copy is looked up by."""
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
    copied = sum(part.nbytes for part in weight.content)
    return offered, kind, (float(max(1, rows * cols)), float(batch), max(weight.density, 1e-4)), copied


def _forward(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    backend = _plan(x, weight).backend
    if x.numel() == 0 or weight.kept == 0:
        y = x.new_zeros(*x.shape[:-1], weight.shape[0])
        return y if bias is None else y + bias.to(y.dtype)
    if backend == "native":
        return _native_forward(x, weight, bias)
    if backend == "dense":
        run = weight.expanded_run(x, _dense_run)
        weight.calls.keep(x, run, weight.parts)
        return run(x, bias)
    if backend == "vendor":
        return _vendor_forward(x, weight, bias)
    if backend == "triton":  # a check of the index would wait for the device: once per shape and address
        weight.calls.keep(x, owned_run(weight, _triton_forward), weight.parts)
        return _triton_forward(x, weight, bias)
    return reference(x, weight, bias)


def _dense_run(weight: SparseWeight, dense: Tensor) -> Run:
    # A stored zero that met an infinite x made a NaN of it, which is not in the sum.
    return dense_run(weight, dense, _without_zeros)


def _without_zeros(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> Tensor:
    """The product by a backend that multiplies kept weights only."""
    narrow = torch.float64 not in (x.dtype, weight.values.dtype)
    if narrow and x.device.type == "cpu" and _native.available():
        return _native_run(x, weight)(x, bias)
    return reference(x, weight, bias)


@dispatch.in_own_precision
def _vendor_forward(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> Tensor:
    matrix = _csr.get(weight.content, lambda: _torch_csr(weight))
    y = (matrix @ x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], weight.shape[0])
    y = y.contiguous() if bias is None else y + bias
    # MKL multiplies an infinite x by zeros of its own.
    return y if _native.finite(y) else _without_zeros(x, weight, bias)


def _torch_csr(weight: SparseWeight) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        dense = weight.to_dense().detach().to_sparse_csr()
    # With 32-bit indices MKL is up to 2.6 times as fast as with torch's default of 64.
    return torch.sparse_csr_tensor(
        dense.crow_indices().int(),
        dense.col_indices().int(),
        dense.values(),
        size=dense.shape,
        check_invariants=False,
    )


def _native_forward(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> Tensor:
    run = _native_run(x, weight)
    weight.calls.keep(x, run, weight.parts)
    return run(x, bias)


def _native_run(x: Tensor, weight: SparseWeight) -> Run:
    batch = x.numel() // weight.shape[1]
    by_columns = weight.layout == "bitmask" and batch > _EXPAND_BATCH
    form = (batch, x.shape[:-1])
    if weight.layout in ("bitmask", "csr") and _in_narrow_panels(weight, batch):
        return narrow_run(weight, NARROW, lambda held, parts: _linear_run(*form, held, "csr", parts, NARROW))
    if by_columns:
        return weight.by_columns_run(
            lambda held, index: _linear_run(*form, held, "csr", (held.values, index, held.pointer), PANEL)
        )
    return _linear_run(*form, weight, weight.layout, weight.parts, PANEL)


def _in_narrow_panels(weight: SparseWeight, batch: int) -> bool:
    return batch >= NARROW_BATCH and weight.shape[1] > 2 * NARROW and not weight.values.requires_grad


def _linear_run(
    batch: int,
    lead: torch.Size,
    weight: SparseWeight,
    layout: str,
    form: Parts,
    panel: int,
) -> Run:
    """The native product of a weight in this form and of x [*lead, in], which has `batch` rows."""
    y_shape = (*lead, weight.shape[0])
    kind = (LAYOUTS.index(layout), weight.width, VALUE_TYPES.index(weight.values.dtype))
    return native_run(
        "zoo_sparse_linear", form, y_shape, (batch, entries_of(weight), *weight.shape, panel, *kind)
    )


def entries_of(weight: SparseWeight) -> int:
    """Entries of the index: stored weights, or blocks of them."""
    height, width = block_of(weight.layout, weight.width)
    return weight.kept // (height * width)


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
            index = weight.by_columns()[1]
    y = multiply(flat, weight.values, index, weight.pointer, rows, bias)
    return y.reshape(*x.shape[:-1], rows)


def narrow_run(weight: SparseWeight, panel: int, make: Callable[[SparseWeight, Parts], Run]) -> Run:
    """`make(weight, parts)`, for `calls`, with the parts of csr in panels of so many columns."""
    return _narrow.run(weight, weight.content, lambda held: _make_narrow(held, panel), make, panel)


def _make_narrow(weight: SparseWeight, panel: int) -> Parts:
    weight.check()
    index = weight.by_columns()[1]
    values, pointer, shape = weight.values, weight.pointer, weight.shape
    segments = -(-shape[1] // panel) * shape[0]
    form = (torch.empty_like(values), torch.empty_like(index), pointer.new_empty(segments + 1))
    places = [tensor.data_ptr() for tensor in (values, index, pointer, *form)]
    _native.function("zoo_csr_narrow", "ppppppiiiii")(*places, *shape, PANEL, panel, values.element_size())
    return form


@dispatch.in_own_precision
def _backward(
    grad: Tensor, x: Tensor, weight: SparseWeight, need_x: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the stored values; an empty tensor where one is not needed."""
    rows, cols = weight.shape
    batch = x.shape[:-1].numel()
    flat, flat_grad = x.reshape(batch, cols), grad.reshape(batch, rows)
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
            grad_values = torch.nn.functional.pad(whole_blocks(grad_dense)[at_rows, at_cols], (0, OVERREAD))
    return grad_x.to(x.dtype).reshape(x.shape if need_x else 0), grad_values.to(weight.values.dtype)


def _native_backward(
    grad: Tensor, flat: Tensor, weight: SparseWeight, need_x: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    grad, flat = grad.contiguous(), flat.contiguous()
    _, index = weight.by_columns()
    # Without rows no kernel writes it.
    grad_x = (torch.empty if weight.shape[0] else torch.zeros)(flat.shape if need_x else 0)
    grad_values = torch.zeros(weight.values.shape if need_values else 0)
    _native.function("zoo_sparse_linear_backward", "pppppppiiiiiii")(
        flat.data_ptr(),
        grad.data_ptr(),
        weight.values.data_ptr(),
        index.data_ptr(),
        weight.pointer.data_ptr(),
        grad_x.data_ptr() if need_x else None,
        grad_values.data_ptr() if need_values else None,
        flat.shape[0],
        weight.kept,
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
        for side in (1024,) if quick else (128, 256, 512, 1024, 4096) if unstructured else (256, 512, 2048):
            for density in densities:
                weight = _example(side, density, layout)
                for stored, given, batches in _TYPES[: 1 if quick else None]:
                    typed = weight.to(stored)
                    wide = (_PRODUCTS // side,) if unstructured and side < 4096 else ()
                    for batch in (*batches, *wide):
                        x = torch.randn(batch, side).to(given)
                        run = functools.partial(sparse_linear, x, typed)
                        run(), run()  # forms of the weight are made once
                        plain = fastest_product(x, typed.expanded(given))
                        entries.append(
                            dispatch.measure("sparse_linear", run, *case(x, typed), quick=quick, plain=plain)
                        )
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


def _examples() -> Iterator[dispatch.Example]:
    for layout, density in (("bitmask", 0.5), ("csr", 0.3), ("rows4", 0.4), ("columns8", 0.4)):
        weight = pack(torch.randn(13, 568), torch.rand(13, 568) < density, layout)
        for batch in ((1,), (2, 3), (64,), (0,)):
            inputs = (torch.randn(*batch, 568), torch.randn(13))
            yield dispatch.Example(lambda x, bias, weight=weight: sparse_linear(x, weight, bias), inputs)
    empty = pack(torch.zeros(0, 5))
    yield dispatch.Example(lambda x: sparse_linear(x, empty), (torch.randn(2, 5),))
    none_kept = pack(torch.zeros(3, 5))
    yield dispatch.Example(lambda x: sparse_linear(x, none_kept), (torch.randn(2, 5),))


dispatch.register("sparse_linear", plan=plan, calibrate=calibrate, examples=_examples)
