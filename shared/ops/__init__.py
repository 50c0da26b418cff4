"""Sparse operations: how zeros are skipped.

One file per operation, each with a `reference` that defines it in plain PyTorch and faster backends beside
it; `dispatch.py` says how a backend is chosen.

    with ops.backend("native"):          # force one
        y = ops.sparse_linear(x, weight)
    print(ops.explain(ops.sparse_linear, x, weight))

An operation has the name of its file, and `ops.sparse_linear` is the function; the rest of the file is
reached by `from shared.ops.sparse_linear import ...`. The native library is loaded at the first call that
may use it.
"""

from __future__ import annotations

from shared.ops._native import available
from shared.ops.dense_rows import DenseRows, store_rows
from shared.ops.depthwise_conv import depthwise_conv
from shared.ops.dispatch import backend, calibrate, explain
from shared.ops.gather_linear import gather_linear, gather_linear_rows
from shared.ops.modules import DepthwiseConv, SparseConv1x1, SparseLinear
from shared.ops.nm_linear import NMWeight, nm_linear, pack_nm
from shared.ops.quant_sparse_linear import QuantGroups, quant_sparse_linear, quantise_groups
from shared.ops.sparse_conv1x1 import sparse_conv1x1
from shared.ops.sparse_linear import sparse_linear
from shared.ops.weights import SparseWeight, pack

__all__ = [
    "DenseRows",
    "DepthwiseConv",
    "NMWeight",
    "QuantGroups",
    "SparseConv1x1",
    "SparseLinear",
    "SparseWeight",
    "available",
    "backend",
    "calibrate",
    "depthwise_conv",
    "explain",
    "gather_linear",
    "gather_linear_rows",
    "nm_linear",
    "pack",
    "pack_nm",
    "quant_sparse_linear",
    "quantise_groups",
    "sparse_conv1x1",
    "sparse_linear",
    "store_rows",
]
