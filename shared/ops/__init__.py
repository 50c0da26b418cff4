"""Sparse operations: how zeros are skipped.

One file per operation, each with a `reference` that defines it in plain PyTorch and faster backends beside it;
`dispatch.py` says how a backend is chosen.

    with ops.backend("native"):          # force one
        y = ops.sparse_linear(x, weight)
    print(ops.explain(ops.sparse_linear, x, weight))

Nothing heavy is imported before an operation is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "backend": "dispatch",
    "explain": "dispatch",
    "calibrate": "dispatch",
    "available": "_native",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
