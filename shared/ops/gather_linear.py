"""y = x W^T where x is sparse, or where only some outputs are wanted: whole rows of the weight are not
read.

The two products of a decoder with sparse activations (CHESS, CATS, TEAL), for a batch of 1 to 8 tokens:

    y = gather_linear(x, store_rows(weight.t()))                  # reads the inputs that are not zero
    y = gather_linear_rows(x, store_rows(weight), active)         # computes the outputs that are active

Finding the active inputs is part of the call. A batch uses the union of its rows' active sets.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch, triton
from .dense_linear import widened_linear
from .dense_rows import KINDS, DenseRows, store_rows

__all__ = ["DenseRows", "gather_linear", "gather_linear_rows", "plan", "plan_rows", "reference", "store_rows"]

MOST_BATCH = 8  # rows of x per pass over the weight; kMostBatch in gather_linear.cpp


def gather_linear(
    x: Float[Tensor, "*batch in"], weight: DenseRows, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """y = x W^T + bias, reading only the inputs at which some row of x is not zero.

    Args:
        x: floating point; its zeros are found here. NaN is not zero.
        weight: W^T stored input-major, `store_rows(W.t())`.

    Sums are in fp32 and do not depend on the number of threads. Gradients reach x, the bias and float data.

    Raises:
        OpError: shapes, dtypes or devices that do not fit.
    """
    if dispatch.direct(x, weight.data, bias):
        return _forward(x, weight, bias)
    return _gather_linear(x, weight.data, weight.scales, bias, weight.kind, weight.cols, weight.group)


def gather_linear_rows(
    x: Float[Tensor, "*batch in"],
    weight: DenseRows,
    active: Bool[Tensor, "*batch out"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """y = x W^T + bias at the active outputs and 0 at the others, whose rows of W are not read.

    Args:
        weight: W stored output-major, `store_rows(W)`.
        active: which outputs are wanted, for each row of x.

    Raises:
        OpError: shapes, dtypes or devices that do not fit.
    """
    if dispatch.direct(x, active, weight.data, bias):
        return _forward_rows(x, active, weight, bias)
    return _gather_linear_rows(
        x, active, weight.data, weight.scales, bias, weight.kind, weight.cols, weight.group
    )


def reference(
    x: Float[Tensor, "*batch in"], weight: DenseRows, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """The definition of `gather_linear`: the active rows of W^T, weighted by x and summed in fp32 (fp64 for
    fp64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = x.reshape(-1, x.shape[-1]).to(wide)
    active = (flat != 0).any(0).nonzero().squeeze(1)
    y = flat[:, active] @ weight.dense()[active].to(wide)
    y = y if bias is None else y + bias.to(wide)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.cols)


def reference_rows(
    x: Float[Tensor, "*batch in"],
    weight: DenseRows,
    active: Bool[Tensor, "*batch out"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """The definition of `gather_linear_rows`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat, wanted = x.reshape(-1, weight.cols).to(wide), active.reshape(-1, weight.rows)
    rows = wanted.any(0).nonzero().squeeze(1)
    y = flat.new_zeros(flat.shape[0], weight.rows)
    y[:, rows] = flat @ weight.dense()[rows].to(wide).t()
    y = y if bias is None else y + bias.to(wide)
    return torch.where(wanted, y, 0).to(x.dtype).reshape(active.shape)


def plan(
    x: Float[Tensor, "*batch in"], weight: DenseRows, bias: Float[Tensor, " out"] | None = None
) -> dispatch.Plan:
    """The backend that `gather_linear` would run these arguments on."""
    _check(x, weight, bias, weight.rows, weight.cols)
    return _plan("gather_linear", x, weight, _share(x))


def plan_rows(
    x: Float[Tensor, "*batch in"],
    weight: DenseRows,
    active: Bool[Tensor, "*batch out"],
    bias: Float[Tensor, " out"] | None = None,
) -> dispatch.Plan:
    """The backend that `gather_linear_rows` would run these arguments on."""
    _check(x, weight, bias, weight.cols, weight.rows)
    _check_active(x, weight, active)
    return _plan("gather_linear_rows", x, weight, _share(active))


def _check(x: Tensor, weight: DenseRows, bias: Tensor | None, inputs: int, outputs: int) -> None:
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise OpError(f"x {tuple(x.shape)} does not end in the {inputs} inputs of the weight")
    if not x.dtype.is_floating_point:
        raise OpError(f"x must be floating point, received {x.dtype}")
    if x.device != weight.data.device:
        raise OpError(f"x is on {x.device}, the weight on {weight.data.device}: move one of them")
    if bias is not None and (bias.shape != (outputs,) or bias.device != x.device):
        raise OpError(
            f"bias must be [{outputs}] on {x.device}, received {tuple(bias.shape)} on {bias.device}"
        )


def _check_active(x: Tensor, weight: DenseRows, active: Tensor) -> None:
    expected = (*x.shape[:-1], weight.rows)
    if active.dtype != torch.bool or active.shape != expected or active.device != x.device:
        raise OpError(
            f"active must be bool {expected} on {x.device}, received {active.dtype} {tuple(active.shape)} on "
            f"{active.device}"
        )


def _share(marks: Tensor) -> float:
    """Share of the last dimension where any row is not zero, in steps of 1/32 so that plans can be reused."""
    width = marks.shape[-1]
    if marks.numel() == 0:
        return 1 / 32
    if marks.numel() != width:
        marks = (marks.reshape(-1, width) != 0).any(0)
    return max(1, round(32 * int(torch.count_nonzero(marks)) / width)) / 32


def _plan(op: str, x: Tensor, weight: DenseRows, share: float) -> dispatch.Plan:
    return dispatch.choose(op, x.device, *case(x, weight, share))


def case(x: Tensor, weight: DenseRows, share: float) -> tuple[tuple[str, ...], str, tuple[float, ...]]:
    """Backends offered, and the kind and sizes by which measured cases are looked up: weights, batch,
    active share."""
    batch = max(1, x.numel() // max(1, x.shape[-1]))
    offered: tuple[str, ...] = ("dense", "reference")
    if x.dtype != torch.float64:
        offered = ("native", *offered) if batch <= MOST_BATCH else ("dense", "native", "reference")
    offered = (*offered, *triton.offered(x))
    return offered, weight.kind, (float(max(1, weight.rows * weight.cols)), float(batch), share)


@dispatch.in_own_precision
def _forward(x: Tensor, weight: DenseRows, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias, weight.rows, weight.cols)
    backend = _plan("gather_linear", x, weight, _share(x)).backend
    if backend == "native" and x.numel() and weight.cols:
        return _native_input(x, weight, bias)
    if backend == "dense":
        matrix = weight.dense()
        y = x.to(matrix.dtype) @ matrix if x.dtype != torch.float64 else x @ matrix.double()
        y = (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)
        # An input that is zero in every row met an infinite weight, and is not in the sum.
        return y if _native.finite(y) else reference(x, weight, bias)
    if backend == "triton":
        from .triton import gather

        return gather.gather_linear(x, weight, bias)
    return reference(x, weight, bias)


def _batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of 1, 2, 4 or 8 rows (what the kernels are built for), the last one filled up with zeros."""
    if len(tensors[0]) in (1, 2, 4, 8):
        yield tensors
        return
    for parts in zip(*(tensor.split(MOST_BATCH) for tensor in tensors), strict=True):
        rows = parts[0].shape[0]
        missing = (1 << (rows - 1).bit_length()) - rows
        yield tuple(torch.nn.functional.pad(part, (0, 0, 0, missing)) if missing else part for part in parts)


def _native_input(x: Tensor, weight: DenseRows, bias: Tensor | None) -> Tensor:
    flat = _native.plain(x.reshape(-1, weight.rows))
    outs = []
    run = _native.function("zoo_gather_linear_input", "ppppiiiiii")
    for (part,) in _batches(flat):
        out = torch.zeros(part.shape[0], weight.stride)
        if bias is not None:
            out[:, : weight.cols] = bias
        run(
            part.data_ptr(),
            weight.data.data_ptr(),
            None if weight.scales is None else weight.scales.data_ptr(),
            out.data_ptr(),
            part.shape[0],
            weight.rows,
            weight.stride,
            KINDS.index(weight.kind),
            weight.group,
            _native.threads(),
        )
        outs.append(out)
    y = outs[0] if len(outs) == 1 else torch.cat(outs)
    if y.shape != (flat.shape[0], weight.cols):
        y = y[: flat.shape[0], : weight.cols]
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.cols)


@dispatch.in_own_precision
def _forward_rows(x: Tensor, active: Tensor, weight: DenseRows, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias, weight.cols, weight.rows)
    _check_active(x, weight, active)
    backend = _plan("gather_linear_rows", x, weight, _share(active)).backend
    if backend == "native" and x.numel() and active.numel():
        return _native_rows(x, active, weight, bias)
    if backend == "dense":
        matrix = weight.dense().to(x.dtype)
        y = widened_linear(x, matrix, None if bias is None else bias.to(x.dtype))
        return torch.where(active, y, 0)
    if backend == "triton":
        from .triton import gather

        return gather.gather_linear_rows(x, weight, active, bias)
    return reference_rows(x, weight, active, bias)


def _native_rows(x: Tensor, active: Tensor, weight: DenseRows, bias: Tensor | None) -> Tensor:
    flat, wanted = _native.plain(x.reshape(-1, weight.cols)), active.reshape(-1, weight.rows).contiguous()
    outs = []
    run = _native.function("zoo_gather_linear_output", "pppppiiiiiii")
    for part, marks in _batches(flat, wanted):
        out = torch.zeros(part.shape[0], weight.rows)
        if bias is not None:
            out += bias
        run(
            part.data_ptr(),
            weight.data.data_ptr(),
            None if weight.scales is None else weight.scales.data_ptr(),
            marks.data_ptr(),
            out.data_ptr(),
            part.shape[0],
            weight.cols,
            weight.rows,
            weight.stride,
            KINDS.index(weight.kind),
            weight.group,
            _native.threads(),
        )
        outs.append(out)
    y = outs[0] if len(outs) == 1 else torch.cat(outs)
    if flat.shape[0] > 1 or bias is not None:  # otherwise the other outputs are zero already
        y = torch.where(wanted, y[: flat.shape[0]], 0)
    return y.to(x.dtype).reshape(active.shape)


@torch.library.custom_op(
    "zoo::gather_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor data, Tensor? scales, Tensor? bias, str kind, int cols, int group) -> Tensor",
)
def _gather_linear(
    x: Tensor, data: Tensor, scales: Tensor | None, bias: Tensor | None, kind: str, cols: int, group: int
) -> Tensor:
    return _forward(x, DenseRows(data, scales, kind, cols, group), bias)


@_gather_linear.register_fake
def _(
    x: Tensor, data: Tensor, scales: Tensor | None, bias: Tensor | None, kind: str, cols: int, group: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], cols)


@torch.library.custom_op(
    "zoo::gather_linear_rows",
    mutates_args=(),
    schema="(Tensor x, Tensor active, Tensor data, Tensor? scales, Tensor? bias, str kind, int cols, "
    "int group) -> Tensor",
)
def _gather_linear_rows(
    x: Tensor,
    active: Tensor,
    data: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    kind: str,
    cols: int,
    group: int,
) -> Tensor:
    return _forward_rows(x, active, DenseRows(data, scales, kind, cols, group), bias)


@_gather_linear_rows.register_fake
def _(
    x: Tensor,
    active: Tensor,
    data: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    kind: str,
    cols: int,
    group: int,
) -> Tensor:
    return x.new_empty(active.shape)


def _setup_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, data, scales, bias, *form = inputs
    ctx.save_for_backward(x, data, scales)
    ctx.form, ctx.bias_dtype = form, None if bias is None else bias.dtype


def _backward_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, data, scales = ctx.saved_tensors
    grad_x = grad_data = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ DenseRows(data, scales, *ctx.form).dense().to(grad.dtype).t()
    if ctx.needs_input_grad[1]:
        grad_data = _padded_like(data, x.reshape(-1, x.shape[-1]).t() @ grad.reshape(-1, grad.shape[-1]))
    return grad_x, grad_data, None, _bias_grad(ctx, grad, 3), None, None, None


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, active, data, scales, bias, *form = inputs
    ctx.save_for_backward(x, active, data, scales)
    ctx.form, ctx.bias_dtype = form, None if bias is None else bias.dtype


def _backward_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, active, data, scales = ctx.saved_tensors
    grad = torch.where(active, grad, 0)
    grad_x = grad_data = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ DenseRows(data, scales, *ctx.form).dense().to(grad.dtype)
    if ctx.needs_input_grad[2]:
        grad_data = _padded_like(data, grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]))
    return grad_x, None, grad_data, None, _bias_grad(ctx, grad, 4), None, None, None


def _padded_like(data: Tensor, grad: Tensor) -> Tensor:
    return torch.nn.functional.pad(grad.to(data.dtype), (0, data.shape[1] - grad.shape[1]))


def _bias_grad(ctx: Any, grad: Tensor, position: int) -> Tensor | None:
    if not ctx.needs_input_grad[position]:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)


_gather_linear.register_autograd(_backward_input, setup_context=_setup_input)
_gather_linear_rows.register_autograd(_backward_rows, setup_context=_setup_rows)


def calibrate_inputs(quick: bool) -> list[dispatch.Entry]:
    """Measure `gather_linear` on this machine, for `dispatch.calibrate`."""
    return _calibrate("gather_linear", quick)


def calibrate_rows(quick: bool) -> list[dispatch.Entry]:
    """Measure `gather_linear_rows` on this machine, for `dispatch.calibrate`."""
    return _calibrate("gather_linear_rows", quick)


def _calibrate(op: str, quick: bool) -> list[dispatch.Entry]:
    entries = []
    for kind in ("float32",) if quick else KINDS:
        for side in (1024,) if quick else (512, 4096):
            weight = store_rows(torch.randn(side, side), kind)
            dtype = getattr(torch, kind) if not weight.quantised else torch.float32
            for share in (0.1, 0.5) if quick else (0.1, 0.25, 0.5, 0.75, 1.0):
                for batch in (1,) if quick else (1, 8):
                    marks = torch.rand(side) < share
                    x = torch.randn(batch, side).to(dtype)
                    if op == "gather_linear":
                        run = functools.partial(gather_linear, x * marks, weight)
                    else:
                        run = functools.partial(gather_linear_rows, x, weight, marks.expand(batch, side))
                    entries.append(dispatch.measure(op, run, *case(x, weight, _share(marks)), quick=quick))
    return entries


# A dense product is made in the dtype of the weight.
_TOLERANCES = {"bfloat16": 0.1, "float16": 0.01, **dict.fromkeys(("float32", "int8", "int4"), 1e-4)}


def _examples() -> Iterator[dispatch.Example]:
    for kind in KINDS:
        weight = store_rows(torch.randn(33, 40), kind, 16)
        for batch in (1, 5, 9):
            x = torch.randn(batch, 33) * (torch.rand(33) < 0.5)
            call = functools.partial(gather_linear, weight=weight)
            yield dispatch.Example(call, (x,), tolerance=_TOLERANCES[kind])


def _examples_rows() -> Iterator[dispatch.Example]:
    for kind in KINDS:
        weight = store_rows(torch.randn(33, 40), kind, 16)
        for batch in (1, 5, 9):
            active = torch.rand(batch, 33) < 0.5
            call = functools.partial(gather_linear_rows, weight=weight, active=active)
            yield dispatch.Example(call, (torch.randn(batch, 40),), tolerance=_TOLERANCES[kind])


dispatch.register("gather_linear", plan=plan, calibrate=calibrate_inputs, examples=_examples)
dispatch.register("gather_linear_rows", plan=plan_rows, calibrate=calibrate_rows, examples=_examples_rows)
