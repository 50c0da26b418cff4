"""Dense and sparse peers of the linear benchmarks, on weights that are rotated so that no cache holds them.

Peers that are not installed are named on the screen and left out: `pip install onnx onnxruntime openvino`.
DeepSparse (end of life) and XNNPACK and libxsmm (no packages of Python) are never run.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import mkldnn

from zoo.shared.bench import Rotation
from zoo.shared.bench.machine import last_level_cache
from zoo.shared.ops.memory import on_huge_pages
from zoo.shared.ops.weights import SparseWeight

warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
Call = Callable[[], object]
T = TypeVar("T")


def layers(rows: int, cols: int, most_bytes: int = 3 << 30) -> list[Tensor]:
    """Random weights [rows, cols], together about three times the last-level cache, at least two."""
    each = rows * cols * 4
    count = max(2, min(3 * last_level_cache() // each + 1, most_bytes // each))
    return [torch.randn(rows, cols) for _ in range(count)]


def in_turn(make: Callable[[int], Call], count: int) -> Call:
    """A function that calls the `count` functions that `make` returns, one after the other."""
    turns = Rotation(make, 1, count - 1)
    return lambda: turns.next()()


def beyond_cache(items: Sequence[T], nbytes: int, copy: Callable[[T], T]) -> list[T]:
    """The items and copies of them, together three times the last-level cache: packed weights are small."""
    count = max(len(items), 3 * last_level_cache() // max(1, nbytes) + 1)
    return [items[i] if i < len(items) else copy(items[i % len(items)]) for i in range(count)]


def copy_of(weight: SparseWeight) -> SparseWeight:
    """The same packed weight in memory of its own."""
    values, index = on_huge_pages(weight.values.clone()), on_huge_pages(weight.index.clone())
    return replace(weight, values=values, index=index)


@functools.cache
def optional(name: str) -> ModuleType | None:
    """A peer's module, None where it is not installed (said once)."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed and left out", file=sys.stderr)
        return None
    print(f"{name} {getattr(module, '__version__', '')}", file=sys.stderr)
    return module


class DensePeers:
    """Other programs' dense products x W^T of some weights; what they prepare is kept between cells."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self._prepared: dict[object, list[Call]] = {}

    def of(self, x: Tensor) -> dict[str, Call]:
        """Name -> product of x with the next weight in turn.

        torch's linear (MKL); for fp32 also oneDNN with packed weights, OpenBLAS, onnxruntime and OpenVINO.
        """
        weights, functional = self.weights, torch.nn.functional
        peers: dict[str, Call] = {
            "torch dense": in_turn(lambda i: lambda: functional.linear(x, weights[i]), len(weights))
        }
        if x.dtype != torch.float32:
            return peers
        modules = self._keep("onednn", lambda w: mkldnn.to_mkldnn(_linear(w).eval()))
        peers["oneDNN dense"] = in_turn(lambda i: lambda: modules[i](x.to_mkldnn()).to_dense(), len(modules))
        array = x.numpy()
        if (control := optional("threadpoolctl")) is not None:
            control.threadpool_limits(torch.get_num_threads(), user_api="blas")
            arrays = [weight.numpy() for weight in weights]
            peers["OpenBLAS dense"] = in_turn(lambda i: lambda: arrays[i] @ array.T, len(arrays))
        if optional("onnxruntime") and optional("onnx"):
            sessions = self._keep("onnxruntime", _onnxruntime)
            peers["onnxruntime dense"] = in_turn(
                lambda i: lambda: sessions[i].run(None, {"x": array}), len(sessions)
            )
        if optional("openvino"):
            requests = self._keep(("openvino", len(x)), functools.partial(_openvino, len(x)))
            peers["OpenVINO dense"] = in_turn(lambda i: lambda: requests[i].infer([array]), len(requests))
        return peers

    def _keep(self, key: object, prepare: Callable[[Tensor], object]) -> list:
        if key not in self._prepared:
            self._prepared[key] = [prepare(weight) for weight in self.weights]
        return self._prepared[key]


def _linear(weight: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def _onnxruntime(weight: Tensor):
    import onnx
    import onnxruntime
    from onnx import helper

    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None]) for name in "xy"]
    matrix = onnx.numpy_helper.from_array(weight.t().contiguous().numpy(), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], [matrix])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _openvino(batch: int, weight: Tensor):
    import numpy
    import openvino
    from openvino import opset13

    x = opset13.parameter([batch, weight.shape[1]], numpy.float32)
    y = opset13.matmul(x, opset13.constant(weight.numpy()), False, True)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(openvino.Model([y], [x]), "CPU", options).create_infer_request()


class SparsePeers:
    """Sparse products of some fp32 weights: torch's CSR (MKL) with 32-bit indices, and scipy's."""

    def __init__(self, weights: list[Tensor]) -> None:
        parts = [weight.to_sparse_csr() for weight in weights]
        forms = [(csr.crow_indices().int(), csr.col_indices().int(), csr.values()) for csr in parts]
        self.matrices = [
            torch.sparse_csr_tensor(*form, csr.shape, check_invariants=False)
            for form, csr in zip(forms, parts, strict=True)
        ]
        self.arrays = []
        if (scipy := optional("scipy.sparse")) is not None:
            for (rows, columns, values), csr in zip(forms, parts, strict=True):
                arrays = (values.numpy(), columns.numpy(), rows.numpy())
                self.arrays.append(scipy.csr_matrix(arrays, shape=tuple(csr.shape)))

    def of(self, x: Tensor) -> dict[str, Call]:
        """Name -> product with x, which they are given as [in, batch] without paying for the transposition.

        A call that would take more than about a second is left out, and so is scipy, which has one thread,
        above batch 8: both are many times slower than a dense product there.
        """
        matrices, arrays, columns = self.matrices, self.arrays, x.t().contiguous()
        array, work = columns.numpy(), matrices[0].values().numel() * len(x)
        peers: dict[str, Call] = {}
        if work < 1e9:
            peers["torch CSR int32"] = in_turn(lambda i: lambda: matrices[i] @ columns, len(matrices))
        if arrays and len(x) <= 8:
            peers["scipy CSR"] = in_turn(lambda i: lambda: arrays[i] @ array, len(arrays))
        return peers
