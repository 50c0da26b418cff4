"""sparse_conv1x1: map sizes with every kind of tail, layouts and memory formats, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.sparse_conv1x1 import pack, reference, sparse_conv1x1
from zoo.shared.ops.sparse_linear import sparse_linear

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")


def dense_conv(x: torch.Tensor, weight, bias: torch.Tensor) -> torch.Tensor:
    kernel = weight.to_dense().double().reshape(*weight.shape, *[1] * (x.dim() - 2))
    convolve = torch.nn.functional.conv1d if x.dim() == 3 else torch.nn.functional.conv2d
    return convolve(x.double(), kernel, bias.double())


@needs_native
@pytest.mark.parametrize("layout", ["bitmask", "csr", "rows4", "columns4"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4), (7, 7), (5, 13), (14, 14)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_maps_of_any_size(layout: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = pack(torch.randn(30, 72).to(dtype), torch.rand(30, 72) < 0.3, layout)
    bias, x = torch.randn(30), torch.randn(2, 72, *size)
    expected = dense_conv(x, weight, bias)
    for name in ("auto", "native", "reference", "dense"):
        if name == "native" and layout == "columns4" and size != (1, 1) and size != (3, 5):
            continue
        with ops.backend(name):
            for maps in (x, x.to(memory_format=torch.channels_last)):
                y = sparse_conv1x1(maps, weight, bias)
                assert ((y.double() - expected).abs() <= 2e-6 * expected.abs().max()).all()
    assert torch.allclose(reference(x, weight, bias).double(), expected, atol=1e-4)


@needs_native
def test_threads_do_not_change_a_bit() -> None:
    weight = pack(torch.randn(137, 150), torch.rand(137, 150) < 0.3)
    x = torch.randn(1, 150, 15, 17)  # work enough for several threads
    with ops.backend("native"):
        one = sparse_conv1x1(x, weight)
        torch.set_num_threads(2)
        two = sparse_conv1x1(x, weight)
        torch.set_num_threads(1)
    assert torch.equal(one, two)


@needs_native
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", ["csr", "bitmask", "rows4"])
@pytest.mark.parametrize(
    ("rows", "cols", "size"), [(37, 129, (7, 7)), (61, 300, (14, 14)), (10, 4200, (3, 11)), (130, 260, (71,))]
)
def test_panels_change_no_bit(rows: int, cols: int, size: tuple[int, ...], layout: str, relu: bool) -> None:
    torch.manual_seed(0)
    weight, bias = pack(torch.randn(rows, cols), torch.rand(rows, cols) < 0.2, layout), torch.randn(rows)
    x = torch.randn(3, cols, *size)
    expected = dense_conv(x, weight, bias)
    expected = expected.relu() if relu else expected
    with ops.backend("native"), torch.no_grad():
        # Narrow panels from the second call on, and no checks from the third.
        calls = [sparse_conv1x1(x, weight, bias, relu=relu) for _ in range(4)]
        torch.set_num_threads(3)
        calls += [sparse_conv1x1(x, weight, bias, relu=relu) for _ in range(2)]
        torch.set_num_threads(1)
        assert ((calls[0].double() - expected).abs() <= 2e-6 * expected.abs().max()).all()
        assert all(torch.equal(calls[0], call) for call in calls[1:])
        assert torch.equal(sparse_conv1x1(x, weight, bias).relu(), calls[0].relu())
        weight.values.mul_(2)
        assert torch.equal(sparse_conv1x1(x, weight, 2 * bias, relu=relu), 2 * calls[0])
        assert torch.equal(sparse_conv1x1(x, weight, 2 * bias, relu=relu), 2 * calls[0])
        if len(size) == 1:  # the same shape as rows of features, for another op on the same weight
            rows_of_x = torch.randn(3, cols, cols)
            y, maps = sparse_linear(rows_of_x, weight), sparse_conv1x1(rows_of_x, weight)
            for _ in range(2):
                assert torch.equal(sparse_linear(rows_of_x, weight), y)
                assert torch.equal(sparse_conv1x1(rows_of_x, weight), maps)


@pytest.mark.parametrize("layout", ["csr", "rows4"])
def test_gradients(layout: str) -> None:
    torch.manual_seed(0)
    weight = pack(torch.randn(6, 8), torch.rand(6, 8) < 0.5, layout)
    weight.values.requires_grad_()
    x, bias = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(6, requires_grad=True)
    leaves = (x, weight.values, bias)
    ours = torch.autograd.grad(sparse_conv1x1(x, weight, bias).square().sum(), leaves)
    dense = torch.nn.functional.conv2d(x, weight.to_dense()[:, :, None, None], bias)
    for a, b in zip(ours, torch.autograd.grad(dense.square().sum(), leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.traced
def test_compile_and_empty_batch() -> None:
    weight = pack(torch.randn(6, 8), torch.rand(6, 8) < 0.5)
    compiled = torch.compile(lambda x: sparse_conv1x1(x, weight), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(compiled(x), sparse_conv1x1(x, weight))
    assert sparse_conv1x1(x[:0], weight).shape == (0, 6, 5, 5)


def test_refusals() -> None:
    weight = pack(torch.randn(6, 8), torch.rand(6, 8) < 0.5)
    with pytest.raises(OpError, match=r"is not \[batch, 8, \*map\]"):
        sparse_conv1x1(torch.randn(2, 7, 5, 5), weight)
    with pytest.raises(OpError, match=r"must be \[batch, channels"):
        sparse_conv1x1(torch.randn(2, 8), weight)
    with pytest.raises(OpError, match=r"bias must be \[6\]"):
        sparse_conv1x1(torch.randn(2, 8, 5, 5), weight, torch.randn(5))
