"""The products behind a gate against their definition, for every storage, batch and dtype."""

from __future__ import annotations

import pytest
import torch

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops._native import available
from zoo.shared.ops.gated_product import gated_product, plan, reference
from zoo.shared.ops.weights import pack

native = pytest.mark.skipif(not available(), reason="no native library")


def stored(matrix: torch.Tensor, kind: str, packed: bool):
    if packed:
        return pack(matrix.to(getattr(torch, kind)), torch.rand(matrix.shape) < 0.5, "bitmask")
    return ops.store_rows(matrix, kind)


def problem(batch=(3,), inputs=40, hidden=90, out=70, kind="float32", packed=False, share=0.4, seed=0):
    torch.manual_seed(seed)
    up = stored(torch.randn(hidden, inputs), kind, packed)
    down = stored(torch.randn(hidden, out), kind, packed)
    x = torch.randn(*batch, inputs)
    g = torch.randn(*batch, hidden) * (torch.rand(*batch, hidden) < share)
    return x, g, up, down


def dense(x, g, up, down, bias=None):
    matrices = [m.to_dense() if hasattr(m, "to_dense") else m.dense() for m in (up, down)]
    u = x.double() @ matrices[0].double().t()
    u = u if bias is None else u + bias.double()
    return (g.double() * u) @ matrices[1].double()


@native
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("batch", [(1,), (2,), (3,), (1, 4), (8,)])
def test_native_is_the_definition(packed, kind, batch):
    x, g, up, down = problem(batch, kind=kind, packed=packed)
    bias = torch.randn(g.shape[-1])
    for b in (None, bias):
        with ops.backend("native"):
            y = gated_product(x, g, up, down, b)
        torch.testing.assert_close(y.double(), dense(x, g, up, down, b), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            reference(x, g, up, down, b).double(), dense(x, g, up, down, b), atol=1e-4, rtol=1e-4
        )


@native
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("inputs", "hidden", "out"), [(2048, 300, 2048), (4200, 33, 64), (24, 5000, 4200), (1, 1, 1)]
)
def test_panels_tails_and_unequal_widths(packed, inputs, hidden, out):
    x, g, up, down = problem((2,), inputs, hidden, out, packed=packed)
    with ops.backend("native"):
        y = gated_product(x, g, up, down)
    torch.testing.assert_close(y.double(), dense(x, g, up, down), atol=2e-3, rtol=1e-4)


@native
@pytest.mark.parametrize("packed", [False, True])
def test_threads_do_not_change_a_bit(packed):
    x, g, up, down = problem((1,), 256, 1000, 256, packed=packed)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with ops.backend("native"):
                found.append(gated_product(x, g, up, down))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@native
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_channel_and_all_channels(share):
    x, g, up, down = problem((1,), share=share)
    with ops.backend("native"):
        y = gated_product(x, g, up, down)
    torch.testing.assert_close(y.double(), dense(x, g, up, down), atol=1e-4, rtol=1e-4)


@native
def test_a_closed_gate_hides_an_infinite_weight_and_a_nan_gate_shows():
    x, g, up, down = problem((2,))
    closed = int((g == 0).all(0).nonzero()[0])
    up.data[closed] = float("inf")
    with ops.backend("native"):
        assert torch.isfinite(gated_product(x, g, up, down)).all()
        g[0, closed] = float("nan")
        y = gated_product(x, g, up, down)
    assert torch.isnan(y[0]).all() and torch.isfinite(y[1]).all()


def test_infinite_x_on_packed_weights_and_large_batches_take_the_dense_path():
    x, g, up, down = problem((2,), packed=True)
    x[0, 3] = float("inf")
    y = gated_product(x, g, up, down)
    torch.testing.assert_close(y[1].double(), dense(x[1:], g[1:], up, down)[0], atol=1e-3, rtol=1e-4)
    x, g, up, down = problem((5, 9))
    assert plan(x, g, up, down).backend == "dense"
    y = gated_product(x, g, up, down)
    torch.testing.assert_close(y.double(), dense(x, g, up, down), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_result_has_the_dtype_of_x(dtype):
    x, g, up, down = problem((2,), kind="bfloat16")
    y = gated_product(x.to(dtype), g.to(dtype), up, down)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), dense(x, g, up, down), atol=0.5, rtol=0.05)


def test_gradients_take_the_dense_path():
    x, g, up, down = problem((2,))
    x.requires_grad_(), g.requires_grad_()
    gated_product(x, g, up, down).sum().backward()
    expected = torch.autograd.grad(dense(x, g, up, down).sum(), (x, g))
    torch.testing.assert_close(x.grad, expected[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(g.grad, expected[1], atol=1e-3, rtol=1e-3)


@pytest.mark.traced
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_op(packed):
    x, g, up, down = problem((1,), packed=packed)
    compiled = torch.compile(
        lambda a, b: gated_product(a, b, up, down) + 1, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, g), gated_product(x, g, up, down) + 1)


@pytest.mark.traced
def test_refusals():
    x, g, up, down = problem((2,))
    with pytest.raises(OpError, match="does not end in the 40 inputs"):
        gated_product(x[:, :3], g, up, down)
    with pytest.raises(OpError, match="g must be"):
        gated_product(x, g[:1], up, down)
    with pytest.raises(OpError, match="store W_down.t"):
        gated_product(x, g, up, ops.store_rows(torch.randn(70, 90)))
    with pytest.raises(OpError, match="both must be"):
        gated_product(x, g, up, ops.store_rows(torch.randn(90, 70), "int8"))
    with pytest.raises(OpError, match="one floating-point dtype"):
        gated_product(x, g.double(), up, down)
    with pytest.raises(OpError, match="up_bias must be"):
        gated_product(x, g, up, down, torch.zeros(3))
