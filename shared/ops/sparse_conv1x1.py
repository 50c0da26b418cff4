"""Pointwise (1 x 1) convolution with sparse weights, after Fast Sparse ConvNets: y = W x over the channels.

    weight = pack(conv.weight.flatten(1), mask)        # unstructured, or blocks of 4 output channels
    (SparseByteNN) y = sparse_conv1x1(x, weight, conv.bias)

On channel-major maps (contiguous NCHW) a tile of pixels stays in registers while the kept weights pass by.
Maps that lie channels-last, and maps of fewer than 16 pixels, are rows of features already and run through
`sparse_linear`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch
from .cache import Run, native_run
from .layout import LAYOUTS, PANEL, VALUE_TYPES
from .sparse_linear import Parts, entries_of, narrow_run, sparse_linear
from .sparse_linear import reference as linear_reference
from .weights import SparseWeight, pack

__all__ = ["SparseWeight", "pack", "plan", "reference", "sparse_conv1x1"]

MIN_PIXELS = 16  # pixels that the kernel's smallest tile needs on any instruction set
# Columns of a panel of csr, of which a piece of a map fits into the nearest cache, and the pixels from which
# on a piece has three vectors on any instruction set, so that narrow panels change no bit
# (native/src/sparse_conv1x1.cpp).
NARROW, NARROW_PIXELS = 128, 33


def sparse_conv1x1(
    x: Float[Tensor, "batch in *map"],
    weight: SparseWeight,
    bias: Float[Tensor, " out"] | None = None,
    *,
    relu: int = 0,
    residual: Float[Tensor, "batch out *map"] | None = None,
) -> Float[Tensor, "batch out *map"]:
    """y[b, o] = bias[o] + sum over kept c of W[o, c] * x[b, c], at each pixel; stride 1, no padding, one
    group.

    Sums are in fp32; the result has the dtype of x and does not depend on the number of threads. Gradients
    reach x, `weight.values`, the bias and the residual. A channels-last x gives a channels-last y.

    Args:
        relu: 1 for the positive part of the result, 6 for that up to 6 (ReLU6), which the kernel takes
            before it stores.
        residual: added before that, the shortcut of a residual network.

    Raises:
        OpError: shapes, dtypes or devices that do not fit.
    """
    if x.dim() < 3:
        raise OpError(f"x must be [batch, channels, *map], received {tuple(x.shape)}")
    if _is_rows(x):
        y = sparse_linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
    elif dispatch.direct(x, weight.values, bias, residual):
        kind = ("maps", relu, None if residual is None else (residual.shape, residual.device))
        run = weight.calls.find(x, bias, weight.shape[0], kind)
        if run is None:
            weight.check()
            _check(x, weight, bias)
            run = _run(x, weight, bias, relu)
            if run is not None:
                check_residual(residual, (x.shape[0], weight.shape[0], *x.shape[2:]), x)
                weight.calls.keep(x, run, weight.parts, kind)
        if run is not None:
            return run(x, bias, residual)
        y = _plainly(x, weight, bias)
    else:
        form = (weight.layout, *weight.shape, weight.width)
        y = _sparse_conv1x1(x, weight.values, weight.index, weight.pointer, bias, *form)
    check_residual(residual, y.shape, x)
    return activated(y if residual is None else y + residual, relu)


def activated(y: Tensor, relu: int) -> Tensor:
    """What the argument `relu` of the convolutions stands for."""
    return y if not relu else y.relu() if relu == 1 else torch.nn.functional.relu6(y)


def check_residual(residual: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise OpError where it cannot be added to a result of that shape."""
    if residual is not None and (residual.shape != shape or residual.device != x.device):
        raise OpError(
            f"the residual must be {tuple(shape)} on {x.device}, received {tuple(residual.shape)} on "
            f"{residual.device}"
        )


def reference(
    x: Float[Tensor, "batch in *map"], weight: SparseWeight, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "batch out *map"]:
    """The definition: `sparse_linear`'s, over the channels of each pixel."""
    return linear_reference(x.movedim(1, -1), weight, bias).movedim(-1, 1).contiguous()


def plan(
    x: Float[Tensor, "batch in *map"], weight: SparseWeight, bias: Float[Tensor, " out"] | None = None
) -> dispatch.Plan:
    """The backend that `sparse_conv1x1` would run these arguments on."""
    _check(x, weight, bias)
    return dispatch.choose("sparse_conv1x1", x.device, *case(x, weight))


def _check(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> None:
    rows, cols = weight.shape
    if x.dim() < 3 or x.shape[1] != cols:
        raise OpError(f"x {tuple(x.shape)} is not [batch, {cols}, *map] for a weight {weight.shape}")
    if not x.dtype.is_floating_point:
        raise OpError(f"x must be floating point, received {x.dtype}")
    if x.device != weight.values.device:
        raise OpError(f"x is on {x.device}, the weight on {weight.values.device}: move one of them")
    if bias is not None and (bias.shape != (rows,) or bias.device != x.device):
        raise OpError(f"bias must be [{rows}] on {x.device}, received {tuple(bias.shape)} on {bias.device}")


def case(x: Tensor, weight: SparseWeight) -> tuple[tuple[str, ...], str, tuple[float, ...], int]:
    """Backends offered, the kind and sizes by which measured cases are looked up (weights, pixels, density),
    and the bytes that a copy is looked up by."""
    rows, cols = weight.shape
    offered: tuple[str, ...] = ("dense", "reference")
    if torch.float64 not in (x.dtype, weight.values.dtype) and weight.layout != "columns":
        offered = ("native", *offered)
    pixels = x.numel() // max(1, cols)
    kind = f"{weight.layout} {str(weight.values.dtype).removeprefix('torch.')}"
    sizes = (float(max(1, rows * cols)), float(max(1, pixels)), max(weight.density, 1e-4))
    return offered, kind, sizes, sum(part.nbytes for part in weight.content)


def _is_rows(x: Tensor) -> bool:
    """True where the channels of a pixel lie together, or there are too few pixels for the kernel."""
    pixels = math.prod(x.shape[2:])
    return pixels < MIN_PIXELS or (not x.is_contiguous() and x.movedim(1, -1).is_contiguous())


@dispatch.in_own_precision
def _forward(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> Tensor:
    run = _run(x, weight, bias, 0)
    return _plainly(x, weight, bias) if run is None else run(x, bias, None)


@dispatch.in_own_precision
def _plainly(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> Tensor:
    """By the dense product, or by the definition."""
    if plan(x, weight, bias).backend == "dense":
        y = torch.matmul(weight.expanded(x.dtype), x.flatten(2)).reshape(
            x.shape[0], weight.shape[0], *x.shape[2:]
        )
        if bias is not None:
            y += bias.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2))
        if _native.finite(y):  # else a stored zero met an infinite x, which is not in the sum
            return y
    return reference(x, weight, bias)


def _run(x: Tensor, weight: SparseWeight, bias: Tensor | None, relu: int) -> Run | None:
    """The native convolution of x, a bias and a residual; None where another backend is to be taken."""
    if plan(x, weight, bias).backend != "native" or not x.numel() or not weight.kept:
        return None
    shape = x.shape

    def make(held: SparseWeight, layout: str, parts: Parts, panel: int) -> Run:
        return _conv_run(shape, held, layout, parts, panel, relu)

    return in_form(weight, math.prod(shape[2:]), make)


# A weight, and the layout, parts and panel of the form in which the kernel reads it.
Formed = Callable[[SparseWeight, str, Parts, int], Run]


def in_form(weight: SparseWeight, pixels: int, make: Formed) -> Run:
    """`make` for the form of a weight that the kernel is fastest with on maps of so many pixels."""
    wide = weight.layout in ("csr", "bitmask") and weight.shape[1] > 3 * NARROW // 2
    if wide and pixels >= NARROW_PIXELS and not weight.values.requires_grad:
        return narrow_run(weight, NARROW, lambda held, parts: make(held, "csr", parts, NARROW))
    if weight.layout == "bitmask":
        return weight.by_columns_run(
            lambda held, index: make(held, "csr", (held.values, index, held.pointer), PANEL)
        )
    return make(weight, weight.layout, weight.parts, PANEL)


def _conv_run(
    shape: torch.Size, weight: SparseWeight, layout: str, form: Parts, panel: int, relu: int
) -> Run:
    """The native convolution of maps of this shape by a weight in this form."""
    kind = (LAYOUTS.index(layout), VALUE_TYPES.index(weight.values.dtype), relu)
    sizes = (shape[0], math.prod(shape[2:]), entries_of(weight), *weight.shape, panel, *kind)
    return native_run(
        "zoo_sparse_conv1x1", form, (shape[0], weight.shape[0], *shape[2:]), sizes, residual=True
    )


@torch.library.custom_op(
    "zoo::sparse_conv1x1",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor index, Tensor pointer, Tensor? bias, str layout, int rows, "
    "int cols, int width) -> Tensor",
)
def _sparse_conv1x1(
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


@_sparse_conv1x1.register_fake
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
    return x.new_empty(x.shape[0], rows, *x.shape[2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, pointer, bias, *form = inputs
    ctx.save_for_backward(x, values, index, pointer)
    ctx.form, ctx.bias_dtype = form, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of `sparse_linear` with the pixels as its batch."""
    need_x, need_values, *_, need_bias = ctx.needs_input_grad[:5]
    grad_x = grad_values = grad_bias = None
    if need_x or need_values:
        x, *parts = ctx.saved_tensors
        grad_x, grad_values = torch.ops.zoo.sparse_linear_backward(
            grad.movedim(1, -1).contiguous(),
            x.movedim(1, -1).contiguous(),
            *parts,
            *ctx.form,
            need_x,
            need_values,
        )
        grad_x = grad_x.movedim(-1, 1) if need_x else None
    if need_bias:
        grad_bias = grad.movedim(1, -1).flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, grad_values if need_values else None, None, None, grad_bias, *[None] * 4


_sparse_conv1x1.register_autograd(_backward, setup_context=_setup_context)


# Channels out and in, and sides of maps, as MobileNet-v1 has them at 224 pixels.
_QUICK_CASE = (256, 256, 14)
_CASES = (
    (64, 32, 112),
    (128, 64, 56),
    (128, 128, 56),
    (256, 256, 28),
    (512, 256, 14),
    (512, 512, 14),
    (1024, 1024, 7),
)


def calibrate(quick: bool) -> list[dispatch.Entry]:
    """Measure channels x maps x densities on this machine, for `dispatch.calibrate`."""
    entries = []
    for layout in ("csr", "rows4", "bitmask"):
        for rows, cols, side in (_QUICK_CASE,) if quick else _CASES:
            for density in (0.3, 0.1) if quick else (0.5, 0.3, 0.2, 0.1, 0.05):
                together = 4 if layout == "rows4" else 1
                mask = (torch.rand(rows // together, cols) < density).repeat_interleave(together, 0)
                weight = pack(torch.randn(rows, cols), mask, layout)
                for batch in (1,) if quick else (1, 8):
                    x = torch.randn(batch, cols, side, side)
                    run = functools.partial(sparse_conv1x1, x, weight)
                    plain = functools.partial(torch.matmul, weight.expanded(x.dtype), x.flatten(2))
                    entries.append(
                        dispatch.measure("sparse_conv1x1", run, *case(x, weight), quick=quick, plain=plain)
                    )
    return entries


def _examples() -> Iterator[dispatch.Example]:
    for layout in ("csr", "bitmask", "rows4"):
        weight = pack(torch.randn(8, 150), torch.rand(8, 150) < 0.3, layout)
        for size in ((2, 150, 5, 7), (1, 150, 3), (0, 150, 4, 4)):
            inputs = (torch.randn(*size), torch.randn(8))
            yield dispatch.Example(lambda x, bias, weight=weight: sparse_conv1x1(x, weight, bias), inputs)


dispatch.register("sparse_conv1x1", plan=plan, calibrate=calibrate, examples=_examples)
