"""Constant sparse matrices that are multiplied thousands of times: node features and (normalised)
adjacencies.

Full-batch training multiplies the same matrix twice per epoch forward (M @ W) and once backward (M^T @ G).
`SparseMatrix` keeps both the compressed rows of M and those of M^T, so that neither pass sorts or transposes
anything. The product is `zoo.shared.ops.spmm`, called where autograd is off, which is its short way.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.shared.ops.spmm import spmm


@dataclass(frozen=True)
class SparseMatrix:
    """An immutable CSR matrix together with its transpose.

    Args:
        rowptr: where each row starts in `col`, and the end, int32.
        row: row of each entry, int64.
        col: column of each entry, row by row, int32.
        value: each entry, floating point.
        t_rowptr, t_col, t_value: the same for the transpose.
        t_order: entry e of the transpose is entry `t_order[e]` of the matrix, int64.
    """

    rowptr: Int[Tensor, " rows_and_end"]
    row: Int[Tensor, " entries"]
    col: Int[Tensor, " entries"]
    value: Float[Tensor, " entries"]
    t_rowptr: Int[Tensor, " columns_and_end"]
    t_col: Int[Tensor, " entries"]
    t_value: Float[Tensor, " entries"]
    t_order: Int[Tensor, " entries"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rowptr.numel() - 1, self.t_rowptr.numel() - 1

    @property
    def entries(self) -> int:
        return self.col.numel()

    @classmethod
    def from_coo(
        cls,
        row: Int[Tensor, " entries"],
        col: Int[Tensor, " entries"],
        value: Float[Tensor, " entries"],
        shape: tuple[int, int],
    ) -> SparseMatrix:
        """Build from coordinates in any order. Duplicates are kept as separate entries, which a product adds
        up.
        """
        by_row = torch.argsort(row * shape[1] + col, stable=True)
        row, col, value = row[by_row], col[by_row], value[by_row]
        by_col = torch.argsort(col, stable=True)
        return cls(
            rowptr=_pointers(row, shape[0]),
            row=row,
            col=col.int(),
            value=value,
            t_rowptr=_pointers(col, shape[1]),
            t_col=row[by_col].int(),
            t_value=value[by_col],
            t_order=by_col,
        )

    @classmethod
    def from_dense(cls, matrix: Float[Tensor, "rows columns"]) -> SparseMatrix:
        """Build from a dense matrix, storing what is not zero."""
        row, col = matrix.nonzero(as_tuple=True)
        return cls.from_coo(row, col, matrix[row, col], (matrix.shape[0], matrix.shape[1]))

    def to(self, device: torch.device | str) -> SparseMatrix:
        """The same matrix on another device."""
        return SparseMatrix(*(getattr(self, field.name).to(device) for field in fields(self)))

    def with_value(self, value: Float[Tensor, " entries"]) -> SparseMatrix:
        """The same pattern with other values."""
        return replace(self, value=value, t_value=value[self.t_order])

    def dropout(self, p: float, training: bool) -> SparseMatrix:
        """Dropout of the entries: on a sparse matrix the dropped zeros need no random number."""
        if not training or p == 0.0:
            return self
        return self.with_value(dropout(self.value, p, training))

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The matrix written out."""
        out = self.value.new_zeros(self.shape)
        return out.index_put_((self.row, self.col.long()), self.value, accumulate=True)

    def __matmul__(self, dense: Float[Tensor, "columns width"]) -> Float[Tensor, "rows width"]:
        """M @ D; gradients flow to D only."""
        product: Tensor = _Product.apply(dense, self)
        return product

    def sum_rows(self, of_entries: Float[Tensor, "entries width"]) -> Float[Tensor, "rows width"]:
        """Sum of a vector per entry over each row; records no gradient."""
        order = torch.arange(self.entries, dtype=torch.int32, device=self.col.device)
        return rows_sum(of_entries, order, self.rowptr)

    def sum_columns(self, of_entries: Float[Tensor, "entries width"]) -> Float[Tensor, "columns width"]:
        """Sum of a vector per entry over each column; records no gradient."""
        return rows_sum(of_entries, self.t_order.int(), self.t_rowptr)

    def weighted(
        self, value: Float[Tensor, " entries"], dense: Float[Tensor, "columns width"]
    ) -> Float[Tensor, "rows width"]:
        """M' @ D where M' has this pattern and `value`; gradients flow to both (sampled dense-dense for
        `value`).
        """
        product: Tensor = _WeightedProduct.apply(value, dense, self)
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, matrix: SparseMatrix) -> Tensor:
        ctx.matrix = matrix
        return rows_sum(dense, matrix.col, matrix.rowptr, matrix.value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        m = ctx.matrix
        return rows_sum(grad.contiguous(), m.t_col, m.t_rowptr, m.t_value), None


class _WeightedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dense: Tensor, matrix: SparseMatrix) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(value, dense)
        return rows_sum(dense, matrix.col, matrix.rowptr, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        m = ctx.matrix
        value, dense = ctx.saved_tensors
        grad = grad.contiguous()
        to_value = to_dense = None
        if ctx.needs_input_grad[0]:
            to_value = (grad.index_select(0, m.row) * dense.index_select(0, m.col)).sum(1)
        if ctx.needs_input_grad[1]:
            to_dense = rows_sum(grad, m.t_col, m.t_rowptr, value[m.t_order])
        return to_value, to_dense, None


def rows_sum(
    dense: Float[Tensor, "columns width"],
    col: Int[Tensor, " entries"],
    rowptr: Int[Tensor, " rows_and_end"],
    value: Float[Tensor, " entries"] | None = None,
) -> Float[Tensor, "rows width"]:
    """out[i] = sum over the entries e of row i of value[e] * dense[col[e]]; a row without entries gives
    zeros. Records no gradient.
    """
    with torch.no_grad():
        return spmm(rowptr, col, dense, value)


def dropout(x: Float[Tensor, "*shape"], p: float, training: bool) -> Float[Tensor, "*shape"]:
    """Inverted dropout from 16 random bits an element, so that p is met to 1 / 65536.

    `torch.nn.functional.dropout` draws 64 bits for each element, which on the CPU costs more than both sparse
    products of a Cora epoch together (5 of 14 ms).
    """
    if not training or p == 0.0:
        return x
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None).view(torch.int16)[: x.numel()]
    keep = bits >= round(p * 65536) - 32768
    return x * (keep.to(x.dtype) / (1 - p)).view(x.shape)


def _pointers(sorted_ids: Tensor, count: int) -> Tensor:
    pointers = torch.zeros(count + 1, dtype=torch.int32, device=sorted_ids.device)
    pointers[1:] = torch.bincount(sorted_ids, minlength=count).cumsum(0)
    return pointers
