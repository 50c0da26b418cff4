"""gather_linear and gather_linear_rows: every storage against fp64, the skipped rows really skipped,
refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.dense_rows import KINDS, DenseRows, store_rows
from zoo.shared.ops.gather_linear import gather_linear, gather_linear_rows

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")
BACKENDS = ("native", "reference", "dense")


def close(y: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= tolerance * scale).all()


@needs_native
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    batch=st.integers(0, 11),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_backends_agree(kind, inputs, outputs, batch, sparsity, bias, seed) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs)
    by_input, by_output = store_rows(weight.t(), kind, 16), store_rows(weight, kind, 16)
    b = torch.randn(outputs) if bias else None
    x = torch.randn(batch, inputs) * (torch.rand(batch, inputs) >= sparsity)
    active = torch.rand(batch, outputs) >= sparsity
    expected = x.double() @ by_input.dense().double() + (0 if b is None else b)
    rows = x.double() @ by_output.dense().double().t() + (0 if b is None else b)
    # The dense product of a half-precision weight is torch's own, in that precision.
    tolerance = {"bfloat16": 5e-2, "float16": 5e-3}.get(kind, 2e-6)
    for name in BACKENDS:
        with ops.backend(name):
            close(gather_linear(x, by_input, b), expected, tolerance if name == "dense" else 2e-6)
            close(gather_linear_rows(x, by_output, active, b), torch.where(active, rows, 0.0))


@needs_native
def test_inactive_rows_are_not_touched() -> None:
    weight = torch.randn(20, 30)
    weight[:, 7] = torch.nan  # an input that is never active
    x = torch.randn(2, 30)
    x[:, 7] = 0
    active = torch.ones(2, 20, dtype=torch.bool)
    active[:, 3] = False
    spoilt = torch.randn(20, 30)
    spoilt[3] = torch.nan
    with ops.backend("native"):
        assert gather_linear(x, store_rows(weight.t())).isfinite().all()
        y = gather_linear_rows(x, store_rows(spoilt), active)
    assert y.isfinite().all() and y[:, 3].eq(0).all()


@needs_native
def test_non_finite_input_is_kept() -> None:
    x = torch.zeros(1, 30)
    x[0, 4] = torch.nan
    with ops.backend("native"):
        assert gather_linear(x, store_rows(torch.ones(30, 20))).isnan().all()


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(kind: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(600, 500), torch.randn(3, 500).relu()  # work enough for several threads
    active = torch.rand(3, 600) < 0.5
    found = []
    with ops.backend("native"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            by_input = gather_linear(x, store_rows(weight.t(), kind))
            found.append((by_input, gather_linear_rows(x, store_rows(weight, kind), active)))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert torch.equal(found[0][0], other[0]) and torch.equal(found[0][1], other[1])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantisation_error_is_half_a_step(kind: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, 100)
    weight[2, :64] = 0  # a group of zeros
    stored = store_rows(weight, kind)
    step = stored.scales.float().repeat_interleave(64, 1)[:, :100]
    most = 127 if kind == "int8" else 7
    # fp16 rounds the scale itself by up to 2^-11, of most steps.
    assert ((stored.dense() - weight).abs() <= step * (0.5 + most * 2**-10)).all()
    assert stored.nbytes < weight.numel() * (1.5 if kind == "int8" else 0.9)


def test_gradients() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 16, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    x = torch.randn(3, 16).relu().requires_grad_()
    active = torch.rand(3, 5) < 0.5
    data = torch.nn.functional.pad(weight.t(), (0, 11)).contiguous()
    gather_linear(x, DenseRows(data, None, "float32", 5), bias).square().sum().backward()
    ours = [t.grad.clone() for t in (x, weight, bias)]
    for t in (x, weight, bias):
        t.grad = None
    torch.nn.functional.linear(x, weight, bias).square().sum().backward()
    for grad, tensor in zip(ours, (x, weight, bias), strict=True):
        close(grad, tensor.grad.double())
        tensor.grad = None
    gather_linear_rows(x, DenseRows(weight, None, "float32", 16), active, bias).square().sum().backward()
    ours = [t.grad.clone() for t in (x, weight, bias)]
    for t in (x, weight, bias):
        t.grad = None
    torch.where(active, torch.nn.functional.linear(x, weight, bias), 0).square().sum().backward()
    for grad, tensor in zip(ours, (x, weight, bias), strict=True):
        close(grad, tensor.grad.double())


@pytest.mark.alone  # a dataclass is made in what is traced, and the hook wraps its constructor
def test_compile_and_export() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.data = torch.nn.Buffer(torch.randn(16, 16))

        def forward(self, x):
            weight = DenseRows(self.data, None, "float32", 16)
            return gather_linear_rows(gather_linear(x, weight), weight, x > 0)

    layer, x = Layer(), torch.randn(2, 16)
    expected = layer(x)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)


def test_refusals() -> None:
    weight = store_rows(torch.randn(8, 16))
    with pytest.raises(OpError, match="does not end in the 8 inputs"):
        gather_linear(torch.randn(2, 16), weight)
    with pytest.raises(OpError, match=r"active must be bool \(2, 8\)"):
        gather_linear_rows(torch.randn(2, 16), weight, torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(OpError, match="multiple of 16"):
        store_rows(torch.randn(8, 16), "int4", group=8)
    with pytest.raises(OpError, match="kinds are"):
        store_rows(torch.randn(8, 16), "int3")
    with pytest.raises(OpError, match="padded to a multiple of 16"):
        DenseRows(torch.randn(8, 15), None, "float32", 15)
    with pytest.raises(OpError, match="has fp16 scales"):
        DenseRows(torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 2).half(), "int8", 64)
