"""Dense and sparse peers of the linear benchmarks, on weights that are rotated so that no cache holds
them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import mkldnn

from shared.bench import Rotation
from shared.bench.machine import last_level_cache

warnings.filterwarnings("ignore", message="Sparse CSR tensor support")


def layers(rows: int, cols: int, most_bytes: int = 3 << 30) -> list[Tensor]:
    """Random weights [rows, cols], together about three times the last-level cache, at least two."""
    each = rows * cols * 4
    count = max(2, min(3 * last_level_cache() // each + 1, most_bytes // each))
    return [torch.randn(rows, cols) for _ in range(count)]


def in_turn(make: Callable[[int], Callable[[], object]], count: int) -> Callable[[], object]:
    """A function that calls the `count` functions that `make` returns, one after the other."""
    turns = Rotation(make, 1, count - 1)
    return lambda: turns.next()()


def dense_peers(weights: list[Tensor], x: Tensor) -> dict[str, Callable[[], object]]:
    """torch's dense products: MKL, and oneDNN with its own packed weights (fp32; the faster at small
    batches)."""
    peers = {
        "torch dense": in_turn(lambda i: lambda: torch.nn.functional.linear(x, weights[i]), len(weights)),
    }
    if x.dtype == torch.float32:
        modules = []
        for weight in weights:
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            modules.append(mkldnn.to_mkldnn(linear.eval()))
        peers["oneDNN dense"] = in_turn(lambda i: lambda: modules[i](x.to_mkldnn()).to_dense(), len(weights))
        arrays, columns = [weight.numpy() for weight in weights], x.numpy().T
        peers["OpenBLAS dense"] = in_turn(lambda i: lambda: arrays[i] @ columns, len(weights))
    return peers


def csr_peers(weights: list[Tensor], x: Tensor) -> dict[str, Callable[[], object]]:
    """torch's CSR product (MKL) with 32-bit indices, given x as [in, batch] without paying for the
    transposition."""
    matrices = []
    for weight in weights:
        csr = weight.to_sparse_csr()
        rows, columns_of = csr.crow_indices().int(), csr.col_indices().int()
        matrices.append(torch.sparse_csr_tensor(rows, columns_of, csr.values(), csr.shape))
    columns = x.t().contiguous()
    return {"torch CSR int32": in_turn(lambda i: lambda: matrices[i] @ columns, len(matrices))}
