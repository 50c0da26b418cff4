"""Sparse matrix times sparse matrix, row by row (Gustavson), with hash or dense accumulation of each row.

The algorithm is SMASH's on a CPU: multiplications are counted, rows are handed out in chunks of equal work,
and each row is summed in a private accumulator, dense over the columns or, in very wide matrices, a hash
table. One pass counts the entries, the next computes them, so the
result is allocated once and, but for small products, nothing holds the partial ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch
from .csr import check_layout, check_values, entry_rows, transposed

# Products of at most this many multiplications (8 to 16 MB of them) are written in one pass and then packed.
_ONE_PASS = 1 << 20


class CSR(NamedTuple):
    """A sparse matrix [rows, cols] in compressed rows.

    Columns may come in any order within a row, and repeated entries count as their sum.
    """

    crow: Int[Tensor, " rows_plus_1"]
    col: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    cols: int


ACCUMULATORS = ("auto", "dense", "hash")  # in the order of `enum Accumulator` in spgemm.cpp


def spgemm(a: CSR, b: CSR, *, sort: bool = True, accumulator: str = "auto") -> CSR:
    """C = A B. Entries that cancel to zero are kept, as scipy does; so is every NaN.

    The gradients flow to the values of A and of B, at the entries that these have.

    Args:
        a: [rows, inner].
        b: [inner, cols]; indices and values of the same dtypes as a's, fp32 or fp64.
        sort: columns of C in rising order within each row; otherwise in any order.
        accumulator: how the native backend finds the place of a column in a row: "dense" by an array over all
            columns, "hash" by a table (SMASH's windows), "auto" by what is faster for the row.

    Raises:
        OpError: an unknown accumulator, inner dimensions, dtypes or devices that do not fit, an index out of
            range, or a result with more entries than the index dtype can count.
    """
    _check(a, b)
    if accumulator not in ACCUMULATORS:
        raise OpError(f"unknown accumulator {accumulator!r}: choose one of {', '.join(ACCUMULATORS)}")
    tensors = (*a[:3], *b[:3])
    run = _compute if dispatch.direct(*tensors) else _spgemm
    crow, col, values = run(*tensors, b.cols, sort, ACCUMULATORS.index(accumulator))
    return CSR(crow, col, values, b.cols)


def multiplications(a: CSR, b: CSR) -> int:
    """How many multiplications A B takes: the summed lengths of the rows of B that the entries of A name."""
    _check(a, b)
    check_values(a.crow, a.col, a.cols)
    lengths = b.crow.diff().long()
    return int(lengths[a.col.long()].sum())


def probes(a: CSR, b: CSR) -> tuple[int, int, int]:
    """What the hash tables of A B would do: lookups, slots that these look at, and the most for one lookup.

    Raises:
        OpError: as `spgemm`; an index out of range.
        NativeMissing: there is no native library, whose tables these are.
    """
    _check(a, b)
    check_values(a.crow, a.col, a.cols)
    check_values(b.crow, b.col, b.cols)
    rows, index = a.crow.numel() - 1, a.col.element_size()
    tensors = [tensor.contiguous() for tensor in (a.crow, a.col, b.crow, b.col)]
    a_crow, a_col, b_crow, b_col = (tensor.data_ptr() for tensor in tensors)
    work, counts = torch.empty(rows + 1, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
    _native.function("zoo_spgemm_work", "pppiiip")(
        a_crow, a_col, b_crow, rows, index, _native.threads(), work.data_ptr()
    )
    _native.function("zoo_spgemm_probes", "pppppiiip")(
        a_crow, a_col, b_crow, b_col, work.data_ptr(), rows, b.cols, index, counts.data_ptr()
    )
    lookups, slots, most = counts.tolist()
    return lookups, slots, most


def spgemm_reference(a: CSR, b: CSR) -> CSR:
    """The definition of `spgemm`: every product, sorted by place, summed (the outer-product formulation)."""
    crow, col, values = _reference(*a[:3], *b[:3], b.cols)
    return CSR(crow, col, values, b.cols)


def _check(a: CSR, b: CSR) -> None:
    for name, matrix in (("A", a), ("B", b)):
        check_layout(matrix.crow, matrix.col)
        values = matrix.values
        if values.shape != matrix.col.shape or values.dtype not in (torch.float32, torch.float64):
            raise OpError(
                f"the values of {name} must be fp32 or fp64, one per column ({matrix.col.numel()}). "
                f"Received: {tuple(values.shape)}, {values.dtype}."
            )
        if values.device != matrix.col.device:
            raise OpError(f"{name} has its values on {values.device}, its index on {matrix.col.device}")
        if not 0 <= matrix.cols < 2**62:
            raise OpError(f"{name} cannot have {matrix.cols} columns")
    if a.cols != b.crow.numel() - 1:
        raise OpError(f"A has {a.cols} columns and B {b.crow.numel() - 1} rows: their product is not defined")
    if a.values.dtype != b.values.dtype or a.col.dtype != b.col.dtype or a.col.device != b.col.device:
        raise OpError(
            "A and B must share dtypes and device. Received: "
            f"{a.values.dtype}, {a.col.dtype}, {a.col.device} and "
            f"{b.values.dtype}, {b.col.dtype}, {b.col.device}."
        )


def _reference(
    a_crow: Tensor,
    a_col: Tensor,
    a_values: Tensor,
    b_crow: Tensor,
    b_col: Tensor,
    b_values: Tensor,
    cols: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = a_crow.numel() - 1
    lengths = b_crow.diff().long()[a_col.long()]
    left = torch.arange(a_col.numel(), device=a_col.device).repeat_interleave(lengths)
    offset = torch.arange(left.numel(), device=left.device) - (lengths.cumsum(0) - lengths)[left]
    right = b_crow.long()[a_col.long()[left]] + offset
    place = entry_rows(a_crow)[left] * cols + b_col.long()[right]
    places, inverse = place.unique(sorted=True, return_inverse=True)
    values = a_values.new_zeros(places.numel()).index_add(0, inverse, a_values[left] * b_values[right])
    counts = torch.bincount(places // max(cols, 1), minlength=rows)
    crow = a_crow.new_zeros(rows + 1)
    crow[1:] = counts.cumsum(0)
    return crow, (places % max(cols, 1)).to(a_col.dtype), values


def _plan(crow: Tensor, col: Tensor, values: Tensor, vendor: bool) -> dispatch.Plan:
    native = ["native"] if values.device.type == "cpu" else []
    kind = f"{str(values.dtype).removeprefix('torch.')}/{str(col.dtype).removeprefix('torch.')}"
    offered = (*native, *(["vendor"] if vendor else []), "reference")
    sizes = (float(crow.numel()), float(col.numel() + 1))
    return dispatch.choose("spgemm", values.device, offered, kind, sizes)


def _explain(a: CSR, b: CSR, *, sort: bool = True, accumulator: str = "auto") -> dispatch.Plan:
    _check(a, b)
    return _plan(a.crow, a.col, a.values, True)


def _native_product(
    matrices: tuple[Tensor, ...], cols: int, sort: bool, accumulator: int
) -> tuple[Tensor, Tensor, Tensor]:
    matrices = tuple(tensor.contiguous() for tensor in matrices)
    crow, col, values = matrices[:3]
    rows, threads, index = crow.numel() - 1, _native.threads(), col.element_size()
    a_crow, a_col, _, b_crow, b_col, _ = addresses = [tensor.data_ptr() for tensor in matrices]
    starts, work = torch.zeros(rows + 1, dtype=torch.int64), torch.empty(rows + 1, dtype=torch.int64)
    counts = starts.data_ptr() + starts.element_size()
    _native.function("zoo_spgemm_work", "pppiiip")(
        a_crow, a_col, b_crow, rows, index, threads, work.data_ptr()
    )
    products = int(work[-1])

    def multiply(start: int | None, out_col: int | None, out_values: int | None, counts: int | None) -> None:
        _native.function("zoo_spgemm", "pppppppppppiiiiiii")(
            *addresses,
            work.data_ptr(),
            start,
            out_col,
            out_values,
            counts,
            rows,
            cols,
            int(sort),
            accumulator,
            values.element_size(),
            index,
            threads,
        )

    if products <= _ONE_PASS:
        multiply(None, None, None, counts)
    else:
        _native.function("zoo_spgemm_count", "pppppiiiiip")(
            a_crow, a_col, b_crow, b_col, work.data_ptr(), rows, cols, accumulator, index, threads, counts
        )
    starts.cumsum_(0)
    entries = int(starts[-1])
    _refuse_overflow(entries, col.dtype)
    out = starts.to(col.dtype), col.new_empty(entries), values.new_empty(entries)
    start, out_col, out_values = (tensor.data_ptr() for tensor in out)
    if products <= _ONE_PASS:
        _native.function("zoo_spgemm_pack", "ppppiiii")(
            work.data_ptr(), start, out_col, out_values, rows, values.element_size(), index, threads
        )
    else:
        multiply(start, out_col, out_values, None)
    return out


def _refuse_overflow(entries: int, index: torch.dtype) -> None:
    if entries > torch.iinfo(index).max:
        raise OpError(f"the product has {entries} entries, too many for {index}: use int64 indices")


def _vendor_product(matrices: tuple[Tensor, ...], cols: int) -> tuple[Tensor, Tensor, Tensor]:
    inner = matrices[3].numel() - 1
    a_crow, a_col, a_values, b_crow, b_col, b_values = matrices
    shape = (a_crow.numel() - 1, inner)
    a = torch.sparse_csr_tensor(a_crow, a_col, a_values, shape, check_invariants=False)
    b = torch.sparse_csr_tensor(b_crow, b_col, b_values, (inner, cols), check_invariants=False)
    product = a @ b
    kind = matrices[1].dtype
    crow, col, values = product.crow_indices(), product.col_indices(), product.values()
    order = (entry_rows(crow) * max(cols, 1) + col).argsort()  # which MKL leaves open
    return crow.to(kind), col[order].to(kind), values[order]


@dispatch.in_own_precision
def _compute(
    a_crow: Tensor,
    a_col: Tensor,
    a_values: Tensor,
    b_crow: Tensor,
    b_col: Tensor,
    b_values: Tensor,
    cols: int,
    sort: bool,
    accumulator: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_values(a_crow, a_col, b_crow.numel() - 1)
    check_values(b_crow, b_col, cols)
    backend = _plan(a_crow, a_col, a_values, True).backend
    matrices = (a_crow, a_col, a_values, b_crow, b_col, b_values)
    if backend == "native":
        return _native_product(matrices, cols, sort, accumulator)
    if backend == "vendor":
        return _vendor_product(matrices, cols)
    return _reference(*matrices, cols)


_spgemm = torch.library.custom_op(
    "zoo::spgemm",
    _compute,
    mutates_args=(),
    schema=(
        "(Tensor a_crow, Tensor a_col, Tensor a_values, Tensor b_crow, Tensor b_col, Tensor b_values, "
        "int cols, bool sort, int accumulator) -> (Tensor, Tensor, Tensor)"
    ),
)


@_spgemm.register_fake
def _(
    a_crow: Tensor,
    a_col: Tensor,
    a_values: Tensor,
    b_crow: Tensor,
    b_col: Tensor,
    b_values: Tensor,
    cols: int,
    sort: bool,
    accumulator: int,
) -> tuple[Tensor, Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(a_crow), a_col.new_empty(entries), a_values.new_empty(entries)


@torch.library.custom_op(
    "zoo::spgemm_sampled",
    mutates_args=(),
    schema=(
        "(Tensor crow, Tensor col, Tensor g_crow, Tensor g_col, Tensor g_values, Tensor b_crow, "
        "Tensor b_col, Tensor b_values, int cols) -> Tensor"
    ),
)
def _sampled(
    crow: Tensor,
    col: Tensor,
    g_crow: Tensor,
    g_col: Tensor,
    g_values: Tensor,
    b_crow: Tensor,
    b_col: Tensor,
    b_values: Tensor,
    cols: int,
) -> Tensor:
    """s[e] = sum over j of G[i, j] * B[k, j] for the entries e = (i, k) of a pattern: G B^T, sampled."""
    rows = crow.numel() - 1
    check_values(crow, col, b_crow.numel() - 1)
    check_values(g_crow, g_col, cols)
    check_values(b_crow, b_col, cols)
    if _plan(crow, col, g_values, False).backend == "reference":
        g = g_values.new_zeros(rows, cols)
        g = g.index_put((entry_rows(g_crow), g_col.long()), g_values, accumulate=True)
        lengths = b_crow.diff().long()[col.long()]
        entry = torch.arange(col.numel(), device=col.device).repeat_interleave(lengths)
        offset = torch.arange(entry.numel(), device=entry.device) - (lengths.cumsum(0) - lengths)[entry]
        right = b_crow.long()[col.long()[entry]] + offset
        products = g[entry_rows(crow)[entry], b_col.long()[right]] * b_values[right]
        return g_values.new_zeros(col.numel()).index_add(0, entry, products)
    tensors = [t.contiguous() for t in (crow, col, g_crow, g_col, g_values, b_crow, b_col, b_values)]
    out = g_values.new_empty(col.numel())
    _native.function("zoo_spgemm_sampled", "pppppppppiiiii")(
        *(tensor.data_ptr() for tensor in tensors),
        out.data_ptr(),
        rows,
        cols,
        g_values.element_size(),
        col.element_size(),
        _native.threads(),
    )
    return out


@_sampled.register_fake
def _(
    crow: Tensor,
    col: Tensor,
    g_crow: Tensor,
    g_col: Tensor,
    g_values: Tensor,
    b_crow: Tensor,
    b_col: Tensor,
    b_values: Tensor,
    cols: int,
) -> Tensor:
    return g_values.new_empty(col.shape[0])


@torch.library.custom_op(
    "zoo::spgemm_grad_b",
    mutates_args=(),
    schema=(
        "(Tensor a_crow, Tensor a_col, Tensor a_values, Tensor b_crow, Tensor b_col, Tensor g_crow, "
        "Tensor g_col, Tensor g_values, int cols) -> Tensor"
    ),
)
def _grad_b(
    a_crow: Tensor,
    a_col: Tensor,
    a_values: Tensor,
    b_crow: Tensor,
    b_col: Tensor,
    g_crow: Tensor,
    g_col: Tensor,
    g_values: Tensor,
    cols: int,
) -> Tensor:
    """A^T G at the entries of B, computed as (G^T A)[j, k] at the entries of B^T."""
    inner, rows = b_crow.numel() - 1, a_crow.numel() - 1
    at, bt = transposed(a_crow, a_col, inner), transposed(b_crow, b_col, cols)
    gt = transposed(g_crow, g_col, cols)
    turned = _sampled(
        bt.crow,
        bt.col,
        gt.crow,
        gt.col,
        g_values[gt.order.long()],
        at.crow,
        at.col,
        a_values[at.order.long()],
        rows,
    )
    return torch.empty_like(turned).index_copy_(0, bt.order.long(), turned)


@_grad_b.register_fake
def _(
    a_crow: Tensor,
    a_col: Tensor,
    a_values: Tensor,
    b_crow: Tensor,
    b_col: Tensor,
    g_crow: Tensor,
    g_col: Tensor,
    g_values: Tensor,
    cols: int,
) -> Tensor:
    return a_values.new_empty(b_col.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.cols = inputs[6]
    ctx.mark_non_differentiable(output[0], output[1])
    ctx.save_for_backward(*inputs[:6], output[0], output[1])


@dispatch.for_gradients()
def _backward(ctx: Any, _crow: Any, _col: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a_crow, a_col, a_values, b_crow, b_col, b_values, crow, col = ctx.saved_tensors
    grad_a = grad_b = None
    if ctx.needs_input_grad[2]:
        grad_a = _sampled(a_crow, a_col, crow, col, grad, b_crow, b_col, b_values, ctx.cols)
    if ctx.needs_input_grad[5]:
        grad_b = _grad_b(a_crow, a_col, a_values, b_crow, b_col, crow, col, grad, ctx.cols)
    return None, None, grad_a, None, None, grad_b, None, None, None


_spgemm.register_autograd(_backward, setup_context=_save)


def _examples() -> Iterator[dispatch.Example]:
    for index in (torch.int32, torch.int64):
        crow = torch.tensor([0, 2, 2, 5, 6], dtype=index)
        a_col, b_col = (
            torch.tensor([0, 3, 1, 2, 3, 0], dtype=index),
            torch.tensor([4, 0, 2, 1, 0, 4], dtype=index),
        )
        yield dispatch.Example(
            functools.partial(_example_call, crow, a_col, b_col), (torch.randn(6), torch.randn(6))
        )


def _example_call(crow: Tensor, a_col: Tensor, b_col: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return spgemm(CSR(crow, a_col, a, 4), CSR(crow, b_col, b, 5)).values


dispatch.register("spgemm", plan=_explain, examples=_examples)
