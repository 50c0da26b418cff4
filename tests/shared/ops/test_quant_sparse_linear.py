"""quant_sparse_linear: four-bit groups against their dequantised form; refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.quant_sparse_linear import QuantGroups, quant_sparse_linear, quantise_groups

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")


def example(rows: int = 9, cols: int = 128, group: int = 16, density: float = 0.5) -> QuantGroups:
    return quantise_groups(torch.randn(rows, cols), torch.rand(rows, cols // group) < density, group)


@needs_native
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 33])
def test_backends_agree(group: int, density: float, batch: int) -> None:
    torch.manual_seed(0)
    weight, bias = example(11, 192, group, density), torch.randn(11)
    x = torch.randn(batch, 192)
    expected = x.double() @ weight.to_dense().double().t() + bias
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
    for name in ("native", "reference", "dense"):
        with ops.backend(name):
            y = quant_sparse_linear(x, weight, bias)
        assert y.shape == expected.shape and ((y.double() - expected).abs() <= 2e-6 * scale).all()


@needs_native
def test_threads_do_not_change_a_bit() -> None:
    torch.manual_seed(0)
    weight, x = example(800, 256), torch.randn(7, 256)  # work enough for several threads
    with ops.backend("native"):
        one = quant_sparse_linear(x, weight)
        torch.set_num_threads(2)
        two = quant_sparse_linear(x, weight)
        torch.set_num_threads(1)
    assert torch.equal(one, two)


@needs_native
@pytest.mark.parametrize("backend", ["native", "dense"])
def test_a_repeated_call_sees_what_has_changed(backend: str) -> None:
    torch.manual_seed(0)
    weight, x, bias = example(11, 192), torch.randn(2, 192), torch.randn(11)
    with ops.backend(backend), torch.no_grad():
        first = [quant_sparse_linear(x, weight, bias) for _ in range(3)]
        assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
        strided = x.t().contiguous().t()
        torch.testing.assert_close(quant_sparse_linear(2 * strided, weight, 2 * bias), 2 * first[0])
        copied = copy.deepcopy(weight)
        weight.scales.mul_(2)
        torch.testing.assert_close(quant_sparse_linear(x, weight), 2 * (first[0] - bias))
        torch.testing.assert_close(quant_sparse_linear(x, copied, bias), first[0])
        with pytest.raises(OpError, match="bias"):
            quant_sparse_linear(x, weight, bias[:5])
        weight.columns[0] = 12
        with pytest.raises(OpError, match="outside"):
            quant_sparse_linear(x, weight)


def test_the_dense_form_belongs_to_all_parts() -> None:
    torch.manual_seed(0)
    weight, x = example(11, 192), torch.randn(2, 192)
    doubled = replace(weight, scales=weight.scales * 2)  # the same codes
    with ops.backend("dense"), torch.no_grad():
        y = quant_sparse_linear(x, weight)
        torch.testing.assert_close(quant_sparse_linear(x, doubled), 2 * y)
        half = quant_sparse_linear(x.bfloat16(), weight)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, atol=0.05, rtol=0.05)


def test_rounding_and_special_groups() -> None:
    weight = torch.randn(4, 64)
    weight[0, :16] = 0
    weight[1, :16] = 3.0  # constant, away from zero
    weight[2, :16] = torch.rand(16) + 5  # positive
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[3] = False
    packed = quantise_groups(weight, keep)
    dense = packed.to_dense()
    assert dense[0, :16].eq(0).all() and dense[3].eq(0).all()
    assert torch.allclose(dense[1, :16], torch.tensor(3.0), rtol=2e-3)
    # Half a step, and what fp16 does to the scale over fifteen steps.
    step = packed.scales.float().reshape(3, 4).repeat_interleave(16, 1)
    assert ((dense[:3] - weight[:3]).abs() <= step * (0.5 + 0.5 + 15 * 2**-10)).all()
    assert packed.nbytes == 12 * (8 + 2 + 1 + 2) + 5 * 4


def test_gradient_of_x() -> None:
    weight, x = example(), torch.randn(3, 128, requires_grad=True)
    bias = torch.randn(9, requires_grad=True)
    quant_sparse_linear(x, weight, bias).square().sum().backward()
    found = (x.grad, bias.grad)
    x.grad = bias.grad = None
    torch.nn.functional.linear(x, weight.to_dense(), bias).square().sum().backward()
    assert torch.allclose(found[0], x.grad, rtol=1e-4, atol=1e-3)
    assert torch.allclose(found[1], bias.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.traced
def test_compile() -> None:
    weight, x = example(), torch.randn(3, 128)
    compiled = torch.compile(lambda x: quant_sparse_linear(x, weight), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), quant_sparse_linear(x, weight))


def test_refusals() -> None:
    weight = example()
    with pytest.raises(OpError, match="does not end in the 128 inputs"):
        quant_sparse_linear(torch.randn(2, 127), weight)
    with pytest.raises(OpError, match="multiple of 16"):
        quantise_groups(torch.randn(4, 24), torch.ones(4, 3, dtype=torch.bool), 8)
    with pytest.raises(OpError, match="lies outside the 8 groups"):
        replace(weight, columns=weight.columns + 8)
    with pytest.raises(OpError, match="zero point"):
        replace(weight, zeros=weight.zeros + 16)
    with pytest.raises(OpError, match="scales must be contiguous"):
        replace(weight, scales=weight.scales.float())
    weight.pointer[1] = 10_000
    with pytest.raises(OpError, match="never fall"):
        quant_sparse_linear(torch.randn(2, 128), weight)
