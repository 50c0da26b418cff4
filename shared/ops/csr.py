"""Graphs in compressed rows: made from edge lists, checked, transposed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from ..errors import OpError
from . import _native
from .cache import Derived


class Transposed(NamedTuple):
    """The transpose of a CSR matrix: entry i is entry order[i] of the matrix it came from."""

    crow: Int[Tensor, " cols_plus_1"]
    col: Int[Tensor, " entries"]
    order: Int[Tensor, " entries"]


_transposes = Derived[Transposed](capacity=32)


def csr_from_edges(
    edge_index: Int[Tensor, "2 entries"], rows: int
) -> tuple[Int[Tensor, " rows_plus_1"], Int[Tensor, " entries"], Int64[Tensor, " entries"]]:
    """Compressed rows of an edge list: edge e is an entry at row edge_index[0, e], column edge_index[1, e].

    Message passing that sums over the *sources* of a node wants targets as rows: `edge_index.flip(0)`.

    Returns:
        crow, col (of the dtype of `edge_index`) and the order: entry i of the CSR is edge order[i], so values
        of edges are brought along with `values[order]`. Within a row the edges keep their order.

    Raises:
        OpError: a row outside [0, rows).
    """
    row = edge_index[0]
    if row.numel() and (int(row.min()) < 0 or int(row.max()) >= rows):
        raise OpError(f"an edge names row {int(row.min())} or {int(row.max())}, outside [0, {rows})")
    order = row.argsort(stable=True)
    crow = row.new_zeros(rows + 1)
    crow[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return crow, edge_index[1][order].contiguous(), order


def entry_rows(crow: Int[Tensor, " rows_plus_1"]) -> Int64[Tensor, " entries"]:
    """The row of every entry."""
    rows = torch.arange(crow.numel() - 1, device=crow.device)
    return rows.repeat_interleave(crow.diff().long())


def check_layout(crow: Tensor, col: Tensor) -> None:
    """Refuse tensors that cannot be the index of a CSR matrix, whatever their values are.

    Raises:
        OpError: wrong number of dimensions, dtypes or devices, or no row pointer at all.
    """
    if crow.ndim != 1 or col.ndim != 1 or crow.numel() == 0:
        raise OpError(
            "a CSR index is crow [rows + 1] and col [entries]. "
            f"Received: crow {tuple(crow.shape)}, col {tuple(col.shape)}."
        )
    if crow.dtype not in (torch.int32, torch.int64) or crow.dtype != col.dtype:
        raise OpError(f"crow and col must both be int32 or both int64. Received: {crow.dtype}, {col.dtype}.")
    if crow.device != col.device:
        raise OpError(f"crow is on {crow.device} and col on {col.device}: move them to one device")


def check_values(crow: Tensor, col: Tensor, cols: int) -> None:
    """Refuse a CSR index that names what is not there.

    Raises:
        OpError: crow does not rise from 0 to the number of entries, or a column lies outside [0, cols).
    """
    rows, entries = crow.numel() - 1, col.numel()
    if crow.device.type == "cpu" and crow.is_contiguous() and col.is_contiguous() and _native.available():
        sizes = (rows, cols, entries, crow.element_size(), _native.threads())
        code = _native.value("zoo_csr_check", "ppiiiii")(crow.data_ptr(), col.data_ptr(), *sizes)
        bad_rows, bad_cols = code == _native.BAD_POINTER, code == _native.BAD_INDEX
    else:
        bad_rows = bool(crow[0] != 0) or bool(crow[-1] != entries) or bool((crow[1:] < crow[:-1]).any())
        bad_cols = bool(((col < 0) | (col >= cols)).any())
    if bad_rows:
        raise OpError(
            f"crow must rise from 0 to the number of entries, {entries} (csr_from_edges makes such a one). "
            f"Received: {int(crow[0])} ... {int(crow[-1])}."
        )
    if bad_cols:
        raise OpError(f"columns must lie in [0, {cols}). Received: {int(col.min())} ... {int(col.max())}.")


def transposed(crow: Tensor, col: Tensor, cols: int) -> Transposed:
    """The transposed CSR index, kept while `crow` and `col` live as they are. The caller has checked both.

    int64 indices are narrowed to int32 where they fit, which halves the memory traffic of every later use.
    """
    return _transposes.get((crow, col), lambda: _transpose(crow, col, cols), cols)


def _transpose(crow: Tensor, col: Tensor, cols: int) -> Transposed:
    if max(crow.numel(), col.numel(), cols + 1) < 2**31:
        crow, col = crow.int(), col.int()
    if crow.device.type == "cpu" and _native.available():
        crow, col = crow.contiguous(), col.contiguous()
        result = Transposed(crow.new_empty(cols + 1), torch.empty_like(col), torch.empty_like(col))
        _native.function("zoo_csr_transpose", "pppppiii")(
            crow.data_ptr(),
            col.data_ptr(),
            *(tensor.data_ptr() for tensor in result),
            crow.numel() - 1,
            cols,
            crow.element_size(),
        )
        return result
    order = col.argsort(stable=True)
    t_crow = crow.new_zeros(cols + 1)
    t_crow[1:] = torch.bincount(col, minlength=cols).cumsum(0)
    return Transposed(t_crow, entry_rows(crow)[order].to(col.dtype), order.to(col.dtype))
