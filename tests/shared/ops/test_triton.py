"""The Triton kernels against the definitions of their ops: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.shared import ops
from zoo.shared.errors import OpError

# The package gives its functions the names of their modules.
gather_ops, gated_ops, quant_ops, sparse_ops = (
    importlib.import_module(f"zoo.shared.ops.{name}")
    for name in ("gather_linear", "gated_product", "quant_sparse_linear", "sparse_linear")
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


ALONE = "ZOO_TEST_UNCHECKED" in os.environ and (INTERPRETED or DEVICE == "cuda")


def test_in_a_process_of_its_own():
    """The interpreter must be asked for before Triton is imported, and no shape checks may wrap what Triton
    compiles."""
    if ALONE:
        pytest.skip("this is that process")
    pytest.importorskip("triton", reason="torch for CPUs comes without Triton")
    environment = {**os.environ, "ZOO_TEST_UNCHECKED": "1"}
    if DEVICE == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


runs = pytest.mark.skipif(not ALONE, reason="runs in a process of its own")


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def close(actual, expected):
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@runs
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("batch, share", [((), 0.5), ((3,), 0.2), ((2,), 0.0)])
def test_gather_linear(kind, batch, share):
    torch.manual_seed(0)
    dtype = getattr(torch, kind) if "int" not in kind else torch.float32
    weight = gather_ops.store_rows(torch.randn(70, 150) / 8, kind, group=16)
    x = (torch.randn(*batch, 70) * (torch.rand(70) < share)).to(dtype)
    bias = torch.randn(150)
    with ops.backend("triton"):
        close(gather_ops.gather_linear(x, weight, bias), gather_ops.reference(x, weight, bias))
        close(gather_ops.gather_linear(x, weight), gather_ops.reference(x, weight))


@runs
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("batch, share", [((), 0.5), ((3,), 0.2), ((2,), 0.0)])
def test_gather_linear_rows(kind, batch, share):
    torch.manual_seed(0)
    dtype = getattr(torch, kind) if "int" not in kind else torch.float32
    weight = gather_ops.store_rows(torch.randn(9, 150) / 8, kind, group=16)
    x, active = torch.randn(*batch, 150).to(dtype), torch.rand(*batch, 9) < share
    bias = torch.randn(9)
    with ops.backend("triton"):
        actual = gather_ops.gather_linear_rows(x, weight, active, bias)
        close(actual, gather_ops.reference_rows(x, weight, active, bias))
        plain = gather_ops.gather_linear_rows(x, weight, active)
    close(plain, gather_ops.reference_rows(x, weight, active))


@runs
def test_more_rows_than_a_launch_takes():
    weight = gather_ops.store_rows(torch.randn(40, 33))
    x = torch.randn(2, 5, 40) * (torch.rand(40) < 0.2)
    with ops.backend("triton"):
        close(gather_ops.gather_linear(x, weight), gather_ops.reference(x, weight))


@runs
def test_gather_linear_reads_nothing_but_the_active_rows():
    """Rows that no input names may hold anything."""
    matrix = torch.randn(40, 33)
    matrix[5] = torch.nan
    x = torch.randn(2, 40)
    x[:, 5] = 0
    weight = gather_ops.store_rows(matrix)
    with ops.backend("triton"):
        assert torch.isfinite(gather_ops.gather_linear(x, weight)).all()


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, share", [((), 0.5), ((3,), 0.1)])
def test_gated_product(dtype, batch, share):
    torch.manual_seed(0)
    up, down = (gather_ops.store_rows((torch.randn(11, size) / 8).to(dtype)) for size in (50, 90))
    x, bias = torch.randn(*batch, 50).to(dtype), torch.randn(11)
    g = torch.randn(*batch, 11).to(dtype) * (torch.rand(*batch, 11) < share)
    with ops.backend("triton"):
        close(gated_ops.gated_product(x, g, up, down, bias), gated_ops.reference(x, g, up, down, bias))
        close(gated_ops.gated_product(x, g, up, down), gated_ops.reference(x, g, up, down))


@runs
@pytest.mark.parametrize("layout", ["bitmask", "csr"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, batch, sparsity",
    [
        ((7, 100), (), 0.5),
        ((3, 2070), (3,), 0.7),
        ((7, 64), (5, 4), 0.3),
        ((5, 65), (40,), 0.9),
        ((5, 8), (2,), 1.0),
    ],
)
def test_sparse_linear(shape, batch, sparsity, dtype, layout):
    if INTERPRETED and dtype is torch.bfloat16 and batch and torch.Size(batch).numel() > 8:
        pytest.skip("the interpreter's tl.dot takes the bits of bf16 for integers")
    torch.manual_seed(0)
    mask = torch.rand(shape) >= sparsity
    weight = sparse_ops.pack((torch.randn(shape) / shape[1] ** 0.5).to(dtype), mask, layout)
    x, bias = torch.randn(*batch, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    with ops.backend("triton"):
        close(sparse_ops.sparse_linear(x, weight, bias), sparse_ops.reference(x, weight, bias))


@runs
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy, on inf * 0
@pytest.mark.parametrize("batch", [2, 20])
def test_sparse_linear_keeps_dropped_weights_from_infinite_inputs(batch):
    mask = torch.rand(20, 30) < 0.5
    mask[:, 3] = False
    weight = sparse_ops.pack(torch.randn(20, 30), mask, layout="bitmask")
    x = torch.randn(batch, 30)
    x[:, 3] = torch.inf
    with ops.backend("triton"):
        close(sparse_ops.sparse_linear(x, weight), sparse_ops.reference(x, weight))


@runs
def test_a_layout_without_kernel_is_refused():
    weight = sparse_ops.pack(torch.randn(8, 8), layout="columns4")
    with ops.backend("triton"), pytest.raises(OpError, match="no backend 'triton'"):
        sparse_ops.sparse_linear(torch.randn(8), weight)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "group, batch, share",
    [
        (16, (), 0.5),
        (32, (3,), 0.2),
        (48, (2, 5), 0.8),
        (16, (9,), 0.0),
    ],
)
def test_quant_sparse_linear(group, batch, share, dtype):
    torch.manual_seed(0)
    weight = torch.randn(7, 6 * group) / group**0.5
    packed = quant_ops.quantise_groups(weight, torch.rand(7, 6) < share, group)
    x, bias = torch.randn(*batch, 6 * group).to(dtype), torch.randn(7)
    with ops.backend("triton"):
        close(quant_ops.quant_sparse_linear(x, packed, bias), quant_ops.reference(x, packed, bias))


@runs
def test_gradients_flow_through_a_product_by_triton():
    weight = sparse_ops.pack(torch.randn(12, 20), torch.rand(12, 20) < 0.5, layout="bitmask")
    x = torch.randn(3, 20, requires_grad=True)
    with ops.backend("triton"):
        y = sparse_ops.sparse_linear(x, weight)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, weight.to_dense().sum(0).expand_as(x))
