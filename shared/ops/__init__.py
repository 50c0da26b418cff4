"""Sparse operations: how zeros are skipped.

One file per operation, each with a `reference` that defines it in plain PyTorch and faster backends beside
it; `dispatch.py` says how a backend is chosen.

    with ops.backend("native"):          # force one
        y = ops.sparse_linear(x, weight)
    print(ops.explain(ops.sparse_linear, x, weight))

An operation has the name of its file, and `ops.sparse_linear` is the function; the rest of the file is
reached by `from zoo.shared.ops.sparse_linear import ...`. The native library is loaded at the first call that
may use it.
"""

from __future__ import annotations

from ._native import available
from .dense_rows import DenseRows, store_rows
from .depthwise_conv import depthwise_conv
from .dispatch import backend, calibrate, explain
from .gather_linear import gather_linear, gather_linear_rows
from .modules import DepthwiseConv, SparseConv1x1, SparseConv2d, SparseLinear
from .nm_linear import NMWeight, nm_linear, pack_nm
from .quant_panel_linear import QuantPanels, quant_panel_linear
from .quant_sparse_linear import QuantGroups, quant_sparse_linear, quantise_groups
from .separable_conv import separable_conv
from .sparse_conv1x1 import sparse_conv1x1
from .sparse_conv2d import sparse_conv2d
from .sparse_linear import sparse_linear
from .weights import SparseWeight, pack

__all__ = [
    "DenseRows",
    "DepthwiseConv",
    "NMWeight",
    "QuantGroups",
    "QuantPanels",
    "SparseConv1x1",
    "SparseConv2d",
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
    "quant_panel_linear",
    "quant_sparse_linear",
    "quantise_groups",
    "separable_conv",
    "sparse_conv1x1",
    "sparse_conv2d",
    "sparse_linear",
    "store_rows",
]
