"""Sparse matrix times dense matrix, and its adjoint, for graphs: message passing without messages in memory.

    spmm:  y[i] = reduce over entries e of row i of  weight[e] * x[col[e]]        reduce: sum, mean or max
    sddmm: s[e] = <a[row of e], b[col[e]]>

The gradient of spmm for x is spmm with the transposed graph (kept while the graph's index tensors live), that
for the edge weights is sddmm, and the other way round; so sum and mean can be differentiated any number of
times, max once.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch
from .cache import Recent
from .csr import check_layout, check_values, entry_rows, transposed

REDUCTIONS = ("sum", "mean", "max")
_HALF = (torch.float16, torch.bfloat16)
_NATIVE_TYPES = (torch.float32, torch.float64)
# Calls that ran natively before: checks of arguments and the plan take longer than a small product.
_native_calls = Recent()


def spmm(
    crow: Int[Tensor, " rows_plus_1"],
    col: Int[Tensor, " entries"],
    x: Float[Tensor, "cols features"],
    weight: Float[Tensor, " entries"] | None = None,
    *,
    reduce: str = "sum",
) -> Float[Tensor, "rows features"]:
    """y[i] = reduce of weight[e] * x[col[e]] over the entries e of row i of a CSR graph [rows, cols].

    Args:
        crow, col: row pointer and columns, int32 (faster) or int64, columns in any order, repeats allowed.
        x: features; fp16 and bf16 are computed in fp32.
        weight: one per entry, of x's dtype; all 1 by default.
        reduce: "sum"; "mean", the sum divided by the number of entries; "max", per feature, where a NaN is
            largest and the gradient goes to the first entry that attains it. An empty row gives zeros.

    Raises:
        OpError: dtypes, shapes or devices that do not fit, an index out of range, an unknown reduction.
    """
    plain = dispatch.direct(crow, col, weight, x)
    if plain and reduce in ("sum", "mean") and _call(crow, col, weight, x) in _native_calls:
        check_values(crow, col, x.shape[0])
        return _native_spmm(crow, col, weight, None, x, int(reduce == "mean"))
    check_layout(crow, col)
    _check_features(x, "x", crow)
    _check_weight(weight, x, col)
    if reduce not in REDUCTIONS:
        raise OpError(f"reduce must be one of {', '.join(REDUCTIONS)}. Received: {reduce!r}.")
    if x.dtype in _HALF:
        wide = None if weight is None else weight.float()
        return spmm(crow, col, x.float(), wide, reduce=reduce).to(x.dtype)
    if reduce == "max":
        return _spmm_max(crow, col, weight, x)[0]
    run = _product if plain else _spmm
    return run(crow, col, weight, x, reduce == "mean")


def sddmm(
    crow: Int[Tensor, " rows_plus_1"],
    col: Int[Tensor, " entries"],
    a: Float[Tensor, "rows features"],
    b: Float[Tensor, "cols features"],
) -> Float[Tensor, " entries"]:
    """s[e] = sum over f of a[row of e, f] * b[col[e], f]: a b^T sampled at the entries of a CSR graph.

    Raises:
        OpError: dtypes, shapes or devices that do not fit, or an index out of range.
    """
    check_layout(crow, col)
    _check_features(a, "a", crow)
    _check_features(b, "b", crow)
    if a.shape != (crow.numel() - 1, b.shape[1]) or a.dtype != b.dtype:
        raise OpError(
            f"a must be [{crow.numel() - 1} rows, {b.shape[1]} features] of b's dtype {b.dtype}. "
            f"Received: {tuple(a.shape)}, {a.dtype}."
        )
    dispatch.refuse_tangents(a, b)
    if a.dtype in _HALF:
        return _sddmm(crow, col, a.float(), b.float()).to(a.dtype)
    return _sddmm(crow, col, a, b)


def spmm_reference(
    crow: Int[Tensor, " rows_plus_1"],
    col: Int[Tensor, " entries"],
    x: Float[Tensor, "cols features"],
    weight: Float[Tensor, " entries"] | None = None,
    *,
    reduce: str = "sum",
) -> Float[Tensor, "rows features"]:
    """The definition of `spmm` in plain PyTorch: gather, weigh, scatter."""
    if reduce == "max":
        return _reference_max(crow, col, weight, x)[0]
    return _reference_sum(crow, col, weight, x, reduce == "mean")


def sddmm_reference(
    crow: Int[Tensor, " rows_plus_1"],
    col: Int[Tensor, " entries"],
    a: Float[Tensor, "rows features"],
    b: Float[Tensor, "cols features"],
) -> Float[Tensor, " entries"]:
    """The definition of `sddmm` in plain PyTorch."""
    return (a[entry_rows(crow)] * b[col.long()]).sum(1)


def _call(crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor) -> Hashable:
    """All that the checks and the plan of a product depend on, but for the content of the graph."""
    graph = (crow.shape, crow.dtype, crow.device, col.shape, col.dtype, col.device)
    of_weight = None if weight is None else (weight.shape, weight.dtype, weight.device)
    choice = (torch.get_num_threads(), dispatch.requested(), id(dispatch.table()))
    return graph, x.shape, x.dtype, x.device, of_weight, choice


def _check_features(x: Tensor, name: str, crow: Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise OpError(f"{name} must be a floating-point matrix. Received: {tuple(x.shape)}, {x.dtype}.")
    if x.device != crow.device:
        raise OpError(f"{name} is on {x.device} and the graph on {crow.device}: move them to one device")


def _check_weight(weight: Tensor | None, x: Tensor, col: Tensor) -> None:
    if weight is None:
        return
    if weight.shape != col.shape or weight.dtype != x.dtype or weight.device != x.device:
        raise OpError(
            f"weight must hold {col.numel()} values (one per entry) of x's dtype {x.dtype} on {x.device}. "
            f"Received: {tuple(weight.shape)}, {weight.dtype}, {weight.device}."
        )


def _reference_sum(crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor, mean: bool) -> Tensor:
    messages = x[col.long()] if weight is None else x[col.long()] * weight[:, None]
    out = x.new_zeros(crow.numel() - 1, x.shape[1]).index_add(0, entry_rows(crow), messages)
    return out * _scale_of_mean(crow, x) if mean else out


def _reference_max(crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima, and the position in its row of the first entry that attains each (-1 in an empty row)."""
    messages = x[col.long()] if weight is None else x[col.long()] * weight[:, None]
    rows = entry_rows(crow)
    index = rows[:, None].expand(-1, x.shape[1])
    out = x.new_zeros(crow.numel() - 1, x.shape[1])
    out = out.scatter_reduce(0, index, messages, "amax", include_self=False)
    attained = (messages == out[rows]) | messages.isnan()
    position = torch.arange(col.numel(), device=col.device) - crow[:-1].long()[rows]
    missing = col.numel()
    candidates = torch.where(attained, position[:, None], missing)
    arg = torch.full(out.shape, missing, device=x.device)
    arg = arg.scatter_reduce(0, index, candidates, "amin")
    return out, torch.where(arg == missing, -1, arg).int()


def _scale_of_mean(crow: Tensor, x: Tensor) -> Tensor:
    return crow.diff().clamp(min=1).to(x.dtype).reciprocal()[:, None]


def _plan(op: str, crow: Tensor, col: Tensor, x: Tensor, vendor: bool) -> dispatch.Plan:
    offered = ["native"] if x.dtype in _NATIVE_TYPES and x.device.type == "cpu" else []
    if vendor:
        offered.append("vendor")
    kind = f"{str(x.dtype).removeprefix('torch.')}/{str(crow.dtype).removeprefix('torch.')}"
    sizes = (float(crow.numel()), float(col.numel() + 1), float(x.shape[1] + 1))
    return dispatch.choose(op, x.device, (*offered, "reference"), kind, sizes)


def _explain_spmm(
    crow: Tensor, col: Tensor, x: Tensor, weight: Tensor | None = None, *, reduce: str = "sum"
) -> dispatch.Plan:
    return _plan("spmm", crow, col, x, vendor=reduce != "max")


def _explain_sddmm(crow: Tensor, col: Tensor, a: Tensor, b: Tensor) -> dispatch.Plan:
    return _plan("sddmm", crow, col, b, vendor=False)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _native_spmm(
    crow: Tensor,
    col: Tensor,
    weight: Tensor | None,
    order: Tensor | None,
    x: Tensor,
    mode: int,
    arg: Tensor | None = None,
) -> Tensor:
    """`mode` 0: sum, 1: mean, 2: max. Entry e has weight[e], or weight[order[e]] when there is an order."""
    crow, col, x = crow.contiguous(), col.contiguous(), x.contiguous()
    weight = None if weight is None else weight.contiguous()
    rows, features = crow.numel() - 1, x.shape[1]
    out = x.new_empty(rows, features)
    _native.function("zoo_spmm", "pppppppiiiiiii")(
        crow.data_ptr(),
        col.data_ptr(),
        _address(weight),
        _address(order),
        x.data_ptr(),
        out.data_ptr(),
        _address(arg),
        rows,
        features,
        col.numel(),
        mode,
        x.element_size(),
        crow.element_size(),
        _native.threads(),
    )
    return out


def _vendor_spmm(crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor, mean: bool) -> Tensor:
    values = x.new_ones(col.numel()) if weight is None else weight
    matrix = torch.sparse_csr_tensor(
        crow, col, values, (crow.numel() - 1, x.shape[0]), check_invariants=False
    )
    out = matrix @ x
    return out * _scale_of_mean(crow, x) if mean else out


@dispatch.in_own_precision
def _product(crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor, mean: bool) -> Tensor:
    check_values(crow, col, x.shape[0])
    backend = _plan("spmm", crow, col, x, vendor=True).backend
    if backend == "native":
        _native_calls.add(_call(crow, col, weight, x))
        return _native_spmm(crow, col, weight, None, x, int(mean))
    if backend == "vendor":
        y = _vendor_spmm(crow, col, weight, x, mean)
        if _native.finite(y):  # MKL multiplies an infinite x by zeros of its own
            return y
    return _reference_sum(crow, col, weight, x, mean)


_spmm = torch.library.custom_op(
    "zoo::spmm",
    _product,
    mutates_args=(),
    schema="(Tensor crow, Tensor col, Tensor? weight, Tensor x, bool mean) -> Tensor",
)


@_spmm.register_fake
def _(crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor, mean: bool) -> Tensor:
    return x.new_empty(crow.shape[0] - 1, x.shape[1])


@torch.library.custom_op(
    "zoo::spmm_transposed",
    mutates_args=(),
    schema="(Tensor crow, Tensor col, Tensor? weight, Tensor x, int cols) -> Tensor",
)
def _spmm_transposed(crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor, cols: int) -> Tensor:
    """y[j] = sum of weight[e] * x[row of e] over the entries e of column j: the graph turned around."""
    check_values(crow, col, cols)
    turned = transposed(crow, col, cols)
    if _plan("spmm", crow, col, x, vendor=False).backend == "native":
        return _native_spmm(turned.crow, turned.col, weight, turned.order, x, 0)
    moved = None if weight is None else weight[turned.order.long()]
    return _reference_sum(turned.crow, turned.col, moved, x, False)


@_spmm_transposed.register_fake
def _(crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor, cols: int) -> Tensor:
    return x.new_empty(cols, x.shape[1])


@torch.library.custom_op(
    "zoo::sddmm", mutates_args=(), schema="(Tensor crow, Tensor col, Tensor a, Tensor b) -> Tensor"
)
def _sddmm(crow: Tensor, col: Tensor, a: Tensor, b: Tensor) -> Tensor:
    check_values(crow, col, b.shape[0])
    if _plan("sddmm", crow, col, b, vendor=False).backend == "reference":
        return sddmm_reference(crow, col, a, b)
    crow, col, a, b = crow.contiguous(), col.contiguous(), a.contiguous(), b.contiguous()
    out = a.new_empty(col.numel())
    _native.function("zoo_sddmm", "pppppiiiii")(
        crow.data_ptr(),
        col.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        out.data_ptr(),
        crow.numel() - 1,
        a.shape[1],
        a.element_size(),
        crow.element_size(),
        _native.threads(),
    )
    return out


@_sddmm.register_fake
def _(crow: Tensor, col: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(col.shape[0])


def _save_spmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    crow, col, weight, x, ctx.mean = inputs
    ctx.save_for_backward(crow, col, weight, x)


@dispatch.for_gradients()
def _spmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    crow, col, weight, x = ctx.saved_tensors
    if ctx.mean:
        grad = grad * _scale_of_mean(crow, x)
    grad_weight = _sddmm(crow, col, grad, x) if ctx.needs_input_grad[2] else None
    grad_x = _spmm_transposed(crow, col, weight, grad, x.shape[0]) if ctx.needs_input_grad[3] else None
    return None, None, grad_weight, grad_x, None


def _save_transposed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    crow, col, weight, x, _ = inputs
    ctx.save_for_backward(crow, col, weight, x)


@dispatch.for_gradients()
def _transposed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    crow, col, weight, x = ctx.saved_tensors
    grad_weight = _sddmm(crow, col, x, grad) if ctx.needs_input_grad[2] else None
    grad_x = _spmm(crow, col, weight, grad, False) if ctx.needs_input_grad[3] else None
    return None, None, grad_weight, grad_x, None


def _save_sddmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@dispatch.for_gradients()
def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    crow, col, a, b = ctx.saved_tensors
    grad_a = _spmm(crow, col, grad, b, False) if ctx.needs_input_grad[2] else None
    grad_b = _spmm_transposed(crow, col, grad, a, b.shape[0]) if ctx.needs_input_grad[3] else None
    return None, None, grad_a, grad_b


_spmm.register_autograd(_spmm_backward, setup_context=_save_spmm)
_spmm_transposed.register_autograd(_transposed_backward, setup_context=_save_transposed)
_sddmm.register_autograd(_sddmm_backward, setup_context=_save_sddmm)


@torch.library.custom_op(
    "zoo::spmm_max",
    mutates_args=(),
    schema="(Tensor crow, Tensor col, Tensor? weight, Tensor x) -> (Tensor, Tensor)",
)
def _spmm_max(crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima and, int32, the position in its row of the entry that attains each (-1 in an empty row)."""
    check_values(crow, col, x.shape[0])
    if _plan("spmm", crow, col, x, vendor=False).backend == "reference":
        return _reference_max(crow, col, weight, x)
    arg = torch.empty(crow.numel() - 1, x.shape[1], dtype=torch.int32)
    return _native_spmm(crow, col, weight, None, x, 2, arg), arg


@_spmm_max.register_fake
def _(crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    out = x.new_empty(crow.shape[0] - 1, x.shape[1])
    return out, torch.empty_like(out, dtype=torch.int32)


@torch.library.custom_op(
    "zoo::spmm_max_backward",
    mutates_args=(),
    schema="(Tensor crow, Tensor col, Tensor? weight, Tensor x, Tensor arg, Tensor grad) -> (Tensor, Tensor)",
)
def _spmm_max_backward(
    crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor, arg: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients for x and for the weights (empty when there are none)."""
    check_values(crow, col, x.shape[0])
    grad_weight = x.new_empty(0 if weight is None else col.numel())
    if _plan("spmm", crow, col, x, vendor=False).backend == "reference":
        entry = (crow[:-1, None] + arg)[arg >= 0].long()
        feature = torch.arange(x.shape[1], device=x.device).expand_as(arg)[arg >= 0]
        source, flow = col.long()[entry], grad[arg >= 0]
        scaled = flow if weight is None else flow * weight[entry]
        grad_x = x.new_zeros(x.shape).index_put((source, feature), scaled, accumulate=True)
        if weight is not None:
            grad_weight = grad_weight.zero_().index_add(0, entry, flow * x[source, feature])
        return grad_x, grad_weight
    crow, col, x, grad = crow.contiguous(), col.contiguous(), x.contiguous(), grad.contiguous()
    weight = None if weight is None else weight.contiguous()
    grad_x = torch.empty_like(x)
    _native.function("zoo_spmm_max_backward", "ppppppppiiiiii")(
        crow.data_ptr(),
        col.data_ptr(),
        _address(weight),
        x.data_ptr(),
        grad.data_ptr(),
        arg.data_ptr(),
        grad_x.data_ptr(),
        0 if weight is None else grad_weight.data_ptr(),
        crow.numel() - 1,
        x.shape[0],
        x.shape[1],
        x.element_size(),
        crow.element_size(),
        _native.threads(),
    )
    return grad_x, grad_weight


@_spmm_max_backward.register_fake
def _(
    crow: Tensor, col: Tensor, weight: Tensor | None, x: Tensor, arg: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if weight is None else col.shape[0])


def _save_max(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    crow, col, weight, x = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(crow, col, weight, x, output[1])


@dispatch.for_gradients()
def _max_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    crow, col, weight, x, arg = ctx.saved_tensors
    grad_x, grad_weight = _spmm_max_backward(crow, col, weight, x, arg, grad)
    return None, None, grad_weight if ctx.needs_input_grad[2] else None, grad_x


_spmm_max.register_autograd(_max_backward, setup_context=_save_max)


def _graphs() -> Iterator[tuple[Tensor, Tensor]]:
    for index in (torch.int32, torch.int64):
        row, col = torch.randint(0, 11, (60,)).sort().values, torch.randint(0, 7, (60,))
        crow = torch.zeros(13, dtype=torch.int64)
        crow[1:] = torch.bincount(row, minlength=12).cumsum(0)
        yield crow.to(index), col.to(index)
    yield torch.zeros(4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)


def _examples() -> Iterator[dispatch.Example]:
    for crow, col in _graphs():
        for reduce in REDUCTIONS:
            inputs = (torch.randn(7, 5), torch.randn(col.numel()))
            yield dispatch.Example(functools.partial(_example_call, crow, col, reduce), inputs)


def _example_call(crow: Tensor, col: Tensor, reduce: str, x: Tensor, weight: Tensor) -> Tensor:
    return spmm(crow, col, x, weight, reduce=reduce)


def _examples_sddmm() -> Iterator[dispatch.Example]:
    for crow, col in _graphs():
        inputs = (torch.randn(crow.numel() - 1, 5), torch.randn(7, 5))
        yield dispatch.Example(functools.partial(sddmm, crow, col), inputs)


dispatch.register("spmm", plan=_explain_spmm, examples=_examples)
dispatch.register("sddmm", plan=_explain_sddmm, examples=_examples_sddmm)
