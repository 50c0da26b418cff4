"""Convolution of channel-major maps with sparse weights, any square kernel, stride and padding, of one group.

    weight = pack(conv.weight.flatten(1), mask.flatten(1))   # unstructured, or blocks of 4 output channels
    y = sparse_conv2d(x, weight, conv.bias, kernel=3, stride=conv.stride[0], padding=conv.padding[0])

A piece of a map's results stays in registers while the kept weights pass by, each with an offset into what
the piece meets of x (native/src/sparse_conv2d.cpp), after the direct sparse convolutions of Escoin (Chen
2018) and Fast Sparse ConvNets (Elsen et al. 2019). 1x1 kernels with stride 1 run through `sparse_conv1x1`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.grad as conv_gradients
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch
from .cache import Derived, Run, native_run
from .layout import LAYOUTS, OVERREAD, VALUE_TYPES
from .memory import on_huge_pages
from .sparse_conv1x1 import activated, check_residual
from .sparse_linear import Parts, entries_of
from .sparse_linear import reference as linear_reference
from .weights import SparseWeight, pack, whole_blocks

__all__ = ["SparseWeight", "pack", "plan", "reference", "sparse_conv2d"]

_PANEL_FLOATS = 8192  # of the windows of a panel of channels: a usual first-level cache
_MOST_OFFSETS = 1 << 16  # floats that a 16-bit offset tells apart
_MOST_VECTORS = {16: 5, 8: 8}  # kPieceVectors of native/include/zoo/packed.hpp by floats of a vector
_windows = Derived[Parts](1024)


class Geometry(NamedTuple):
    """Sizes of a convolution of maps: see native/src/sparse_conv2d.cpp for `pitch` and `window`."""

    height: int
    width: int
    out_height: int
    out_width: int
    kernel: int
    stride: int
    padding: int
    pitch: int
    window: int

    @property
    def side(self) -> int:
        """Phases, by which columns are dealt out, in one direction."""
        return min(self.kernel, self.stride)

    @property
    def span(self) -> int:
        """Floats of the windows of a channel."""
        return self.side**2 * self.window


def sizes_after(height: int, width: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """Rows and columns of the result for maps of so many.

    Raises:
        OpError: a stride or padding that is none, a kernel larger than the padded map.
    """
    if kernel < 1 or stride < 1 or padding < 0:
        raise OpError(
            "kernel and stride must be positive and padding not negative, received "
            f"{kernel}, {stride} and {padding}"
        )
    if min(height, width) + 2 * padding < kernel:
        raise OpError(f"a kernel of {kernel} does not fit into a map of {(height, width)}")
    return (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1


def geometry(height: int, width: int, kernel: int, stride: int, padding: int) -> Geometry:
    """What the kernel works with for maps of so many rows and columns."""
    out_height, out_width = sizes_after(height, width, kernel, stride, padding)
    pitch = out_width
    for phase in range(min(kernel, stride)):  # columns from `low` to `high` of `end` are inside of x
        end = out_width + (kernel - 1 - phase) // stride
        low = min(-(-max(padding - phase, 0) // stride), end)
        high = min(-(-(width + padding - phase) // stride), end)
        pitch = max(pitch, high, end - low)
    vectors = -(-((out_height - 1) * pitch + out_width) // _lanes())
    pieces = -(-vectors // _MOST_VECTORS[_lanes()])
    held = -(-vectors // pieces) * _lanes()
    window = held + (kernel - 1) // stride * (pitch + 1)
    return Geometry(height, width, out_height, out_width, kernel, stride, padding, pitch, window)


def _lanes() -> int:
    return 16 if _native.available() and _native.isa() == "avx512" else 8


def sparse_conv2d(
    x: Float[Tensor, "batch in height width"],
    weight: SparseWeight,
    bias: Float[Tensor, " out"] | None = None,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    relu: int = 0,
    residual: Float[Tensor, "batch out out_height out_width"] | None = None,
) -> Float[Tensor, "batch out out_height out_width"]:
    """y = conv2d(x, W, bias, stride, padding) + residual, with W [out, in * kernel * kernel] packed.

    Args:
        kernel, stride, padding: equal in both directions.
        relu: 1 for the positive part of the result, 6 for that up to 6 (ReLU6).
        residual: added before that, the shortcut of a residual network.

    Returns:
        Maps of the dtype of x. Sums are in fp32 and do not depend on the number of threads. Gradients
        reach x, `weight.values`, the bias and the residual.

    Raises:
        OpError: shapes, dtypes or devices that do not fit.
    """
    options = (kernel, stride, padding)
    if x.numel() and dispatch.direct(x, weight.values, bias, residual):
        added = None if residual is None else (residual.shape, residual.device)
        key = ("conv2d", *options, relu, added)
        run = weight.calls.find(x, bias, weight.shape[0], key)
        if run is not None:
            return run(x, bias, residual)
        weight.check()
        _check(x, weight, bias, residual, *options)
        backend = dispatch.choose("sparse_conv2d", x.device, *case(x, weight, *options)).backend
        if backend == "native":
            run = _native_run(x.shape, weight, geometry(x.shape[2], x.shape[3], *options), relu)
            weight.calls.keep(x, run, weight.parts, key)
            return run(x, bias, residual)
        y = _plainly(x, weight, bias, *options, backend)
    else:
        _check(x, weight, bias, residual, *options)
        packed = (weight.layout, *weight.shape, weight.width, *options)
        y = _sparse_conv2d(x, weight.values, weight.index, weight.pointer, bias, *packed)
    return activated(y if residual is None else y + residual, relu)


@dispatch.in_own_precision
def reference(
    x: Float[Tensor, "batch in height width"],
    weight: SparseWeight,
    bias: Float[Tensor, " out"] | None = None,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    relu: int = 0,
    residual: Float[Tensor, "batch out out_height out_width"] | None = None,
) -> Float[Tensor, "batch out out_height out_width"]:
    """The definition: `sparse_linear`'s, over what each result meets of x."""
    height, width = _check(x, weight, bias, residual, kernel, stride, padding)
    met = torch.nn.functional.unfold(x, kernel, padding=padding, stride=stride)
    y = linear_reference(met.mT, weight, bias).mT
    y = y.reshape(x.shape[0], weight.shape[0], height, width).contiguous()
    return activated(y if residual is None else y + residual, relu)


def plan(
    x: Float[Tensor, "batch in height width"],
    weight: SparseWeight,
    bias: Float[Tensor, " out"] | None = None,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    relu: int = 0,
    residual: Float[Tensor, "batch out out_height out_width"] | None = None,
) -> dispatch.Plan:
    """The backend that `sparse_conv2d` would run these arguments on."""
    _check(x, weight, bias, residual, kernel, stride, padding)
    return dispatch.choose("sparse_conv2d", x.device, *case(x, weight, kernel, stride, padding))


def case(
    x: Tensor, weight: SparseWeight, kernel: int, stride: int, padding: int
) -> tuple[tuple[str, ...], str, tuple[float, ...], int]:
    """Backends offered, the kind and sizes by which measured cases are looked up (weights, results per
    channel, density), and the bytes that a copy is looked up by."""
    rows, cols = weight.shape
    offered: tuple[str, ...] = ("dense", "reference")
    wide = torch.float64 in (x.dtype, weight.values.dtype)
    form = geometry(x.shape[2], x.shape[3], kernel, stride, padding)
    if not wide and weight.layout != "columns" and form.span <= _MOST_OFFSETS:
        offered = ("native", *offered)
    kind = f"{weight.layout} {str(weight.values.dtype).removeprefix('torch.')}"
    pixels = x.shape[0] * form.out_height * form.out_width
    sizes = (float(max(1, rows * cols)), float(max(1, pixels)), max(weight.density, 1e-4))
    return offered, kind, sizes, sum(part.nbytes for part in weight.content)


def _check(
    x: Tensor,
    weight: SparseWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
) -> tuple[int, int]:
    rows, cols = weight.shape
    if x.dim() != 4 or x.shape[1] * kernel * kernel != cols:
        raise OpError(
            f"x {tuple(x.shape)} is not [batch, {cols // max(1, kernel * kernel)}, height, width] for a "
            f"weight {weight.shape} with kernels of {kernel}"
        )
    if not x.dtype.is_floating_point:
        raise OpError(f"x must be floating point, received {x.dtype}")
    if x.device != weight.values.device:
        raise OpError(f"x is on {x.device}, the weight on {weight.values.device}: move one of them")
    if bias is not None and (bias.shape != (rows,) or bias.device != x.device):
        raise OpError(f"bias must be [{rows}] on {x.device}, received {tuple(bias.shape)} on {bias.device}")
    size = sizes_after(x.shape[2], x.shape[3], kernel, stride, padding)
    check_residual(residual, (x.shape[0], rows, *size), x)
    return size


@dispatch.in_own_precision
def _forward(
    x: Tensor, weight: SparseWeight, bias: Tensor | None, kernel: int, stride: int, padding: int
) -> Tensor:
    backend = plan(x, weight, bias, kernel=kernel, stride=stride, padding=padding).backend
    if backend == "native" and x.numel() and weight.kept:
        form = geometry(x.shape[2], x.shape[3], kernel, stride, padding)
        return _native_run(x.shape, weight, form, relu=0)(x, bias, None)
    return _plainly(x, weight, bias, kernel, stride, padding, backend)


@dispatch.in_own_precision
def _plainly(
    x: Tensor,
    weight: SparseWeight,
    bias: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
    backend: str,
) -> Tensor:
    """By the dense convolution, or by the definition."""
    if backend == "dense":
        dense = weight.expanded(x.dtype).reshape(weight.shape[0], -1, kernel, kernel)
        wide = None if bias is None else bias.to(x.dtype)
        y = torch.nn.functional.conv2d(x, dense, wide, stride, padding)
        if _native.finite(y):  # else a stored zero met an infinite x, which is not in the sum
            return y
    return reference(x, weight, bias, kernel=kernel, stride=stride, padding=padding)


def _native_run(shape: torch.Size, weight: SparseWeight, form: Geometry, relu: int) -> Run:
    """The native convolution of maps of this shape: of x, a bias and a residual."""
    channels, panel = shape[1], max(1, min(shape[1], _PANEL_FLOATS // form.span))
    y_shape = (shape[0], weight.shape[0], form.out_height, form.out_width)

    def make(held: SparseWeight, parts: Parts) -> Run:
        sizes = (shape[0], channels, form.height, form.width, held.shape[0], *form[2:], panel)
        kind = (LAYOUTS.index(_window_layout(held)), VALUE_TYPES.index(held.values.dtype), relu)
        numbers = (*sizes, entries_of(held), *kind)
        return native_run("zoo_sparse_conv2d", parts, y_shape, numbers, residual=True)

    return _windows.run(
        weight, weight.content, lambda held: _in_windows(held, form, panel), make, (form, panel)
    )


def _window_layout(weight: SparseWeight) -> str:
    return "rows4" if weight.layout == "rows4" else "csr"


@torch.no_grad()
def _in_windows(weight: SparseWeight, form: Geometry, panel: int) -> Parts:
    """The weight in panels of so many channels, its index the offsets into their windows."""
    weight.check()
    height = 4 if weight.layout == "rows4" else 1
    rows, cols = (each[::height] for each in weight.coordinates())
    channel, tap = cols // form.kernel**2, cols % form.kernel**2
    down, right = tap // form.kernel, tap % form.kernel
    phase = down % form.stride * form.side + right % form.stride
    moved = down // form.stride * form.pitch + right // form.stride
    offset = channel % panel * form.span + phase * form.window + moved
    block_rows = -(-weight.shape[0] // height)
    segment = channel // panel * block_rows + rows // height
    order = segment.argsort(stable=True)
    channels = weight.shape[1] // form.kernel**2
    counts = torch.bincount(segment, minlength=-(-channels // panel) * block_rows)
    pointer = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    values = weight.values[: weight.kept].view(-1, height)[order].flatten()
    values = torch.cat([values, values.new_zeros(OVERREAD)])
    index = torch.cat([offset[order], offset.new_zeros(OVERREAD)]).to(torch.int16)
    return on_huge_pages(values), on_huge_pages(index), pointer


@torch.library.custom_op(
    "zoo::sparse_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor index, Tensor pointer, Tensor? bias, str layout, int rows, "
    "int cols, int width, int kernel, int stride, int padding) -> Tensor",
)
def _sparse_conv2d(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    pointer: Tensor,
    bias: Tensor | None,
    layout: str,
    rows: int,
    cols: int,
    width: int,
    kernel: int,
    stride: int,
    padding: int,
) -> Tensor:
    weight = SparseWeight(values, index, pointer, layout, (rows, cols), width)
    return _forward(x, weight, bias, kernel, stride, padding)


@_sparse_conv2d.register_fake
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
    kernel: int,
    stride: int,
    padding: int,
) -> Tensor:
    return x.new_empty(x.shape[0], rows, *sizes_after(x.shape[2], x.shape[3], kernel, stride, padding))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, pointer, bias, *form = inputs
    ctx.save_for_backward(x, values, index, pointer)
    ctx.form, ctx.bias_dtype = form, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Torch's gradients of the dense convolution, of which the kept weights take theirs."""
    need_x, need_values, *_, need_bias = ctx.needs_input_grad[:5]
    x, values, *parts = ctx.saved_tensors
    layout, rows, cols, width, kernel, stride, padding = ctx.form
    wide = torch.float64 if torch.float64 in (x.dtype, values.dtype) else torch.float32
    weight = SparseWeight(values, parts[0], parts[1], layout, (rows, cols), width)
    wide_grad = grad.to(wide)
    dense = weight.to_dense().to(wide).reshape(rows, -1, kernel, kernel)
    grad_x = grad_values = grad_bias = None
    if need_x:
        grad_x = conv_gradients.conv2d_input(x.shape, dense, wide_grad, stride, padding).to(x.dtype)
    if need_values:
        taken = conv_gradients.conv2d_weight(x.to(wide), dense.shape, wide_grad, stride, padding).flatten(1)
        taken = whole_blocks(taken)[weight.coordinates()]
        grad_values = torch.nn.functional.pad(taken, (0, OVERREAD)).to(values.dtype)
    if need_bias:
        grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
    return grad_x, grad_values, None, None, grad_bias, *[None] * 7


_sparse_conv2d.register_autograd(_backward, setup_context=_setup_context)


# Channels out and in, kernels, strides and sides of maps, as ResNets have them at 224 pixels.
_QUICK_CASE = (128, 128, 3, 1, 28)
_CASES = (
    (64, 64, 3, 1, 56),
    (128, 128, 3, 2, 56),
    (128, 128, 3, 1, 28),
    (256, 256, 3, 1, 14),
    (512, 512, 3, 1, 7),
    (1024, 512, 1, 2, 28),
)


def calibrate(quick: bool) -> list[dispatch.Entry]:
    """Measure channels x maps x densities on this machine, for `dispatch.calibrate`."""
    entries = []
    for layout in ("csr", "rows4", "bitmask"):
        for rows, channels, kernel, stride, side in (_QUICK_CASE,) if quick else _CASES:
            for density in (0.3, 0.1) if quick else (0.5, 0.3, 0.1):
                cols, together = channels * kernel**2, 4 if layout == "rows4" else 1
                mask = (torch.rand(rows // together, cols) < density).repeat_interleave(together, 0)
                weight = pack(torch.randn(rows, cols), mask, layout)
                for batch in (1,) if quick else (1, 8):
                    x = torch.randn(batch, channels, side, side)
                    dense, padding = weight.to_dense().reshape(rows, -1, kernel, kernel), kernel // 2
                    options: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding}
                    run = functools.partial(sparse_conv2d, x, weight, **options)
                    plain = functools.partial(
                        torch.nn.functional.conv2d, x, dense, stride=stride, padding=padding
                    )
                    entries.append(
                        dispatch.measure(
                            "sparse_conv2d", run, *case(x, weight, **options), quick=quick, plain=plain
                        )
                    )
    return entries


def _examples() -> Iterator[dispatch.Example]:
    for layout in ("csr", "bitmask", "rows4"):
        for kernel, stride, padding in ((3, 1, 1), (3, 2, 1), (1, 2, 0), (5, 3, 2)):
            cols = 6 * kernel**2
            weight = pack(torch.randn(8, cols), torch.rand(8, cols) < 0.3, layout)
            call = functools.partial(_example_call, weight, kernel, stride, padding)
            yield dispatch.Example(call, (torch.randn(2, 6, 9, 11), torch.randn(8)))


def _example_call(
    weight: SparseWeight, kernel: int, stride: int, padding: int, x: Tensor, bias: Tensor
) -> Tensor:
    return sparse_conv2d(x, weight, bias, kernel=kernel, stride=stride, padding=padding, relu=1)


dispatch.register("sparse_conv2d", plan=plan, calibrate=calibrate, examples=_examples)
