"""sparse_conv2d against torch's convolution: kernels, strides, paddings, layouts, threads, gradients,
refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import SparseConv2d, _native, pack, sparse_conv2d
from zoo.shared.ops.sparse_conv2d import geometry, reference

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")


def dense(x, weight, bias, kernel, stride, padding, relu, residual):
    """The same by torch, in double precision."""
    maps = weight.to_dense().double().reshape(weight.shape[0], -1, kernel, kernel)
    y = functional.conv2d(x.double(), maps, bias.double(), stride, padding)
    y = y if residual is None else y + residual
    return y if not relu else y.relu() if relu == 1 else functional.relu6(y)


@needs_native
@given(
    st.sampled_from(["csr", "rows4", "bitmask"]),
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 21),
    st.tuples(st.integers(1, 31), st.integers(1, 31)),
    st.sampled_from([1, 2, 3, 3, 3, 5, 7]),
    st.integers(1, 4),
    st.integers(0, 5),
    st.sampled_from([0, 1, 6]),
    st.booleans(),
    st.integers(0, 99),
)
def test_it_is_the_convolution(
    layout, batch, channels, rows, size, kernel, stride, padding, relu, added, seed
) -> None:
    torch.manual_seed(seed)
    if min(size) + 2 * padding < kernel:
        return
    cols = channels * kernel**2
    weight = pack(torch.randn(rows, cols), torch.rand(rows, cols) < 0.3, layout)
    x, bias = torch.randn(batch, channels, *size), torch.randn(rows)
    form = geometry(*size, kernel, stride, padding)
    residual = torch.randn(batch, rows, form.out_height, form.out_width) if added else None
    options = {"kernel": kernel, "stride": stride, "padding": padding, "relu": relu, "residual": residual}
    expected = dense(x, weight, bias, **options)
    close = {"atol": 3e-6 * float(expected.abs().amax()) + 1e-6, "rtol": 0}
    with ops.backend("native"):
        for _ in range(2):  # as it is found, and as it is remembered
            torch.testing.assert_close(sparse_conv2d(x, weight, bias, **options).double(), expected, **close)
    torch.testing.assert_close(reference(x, weight, bias, **options).double(), expected, **close)


@needs_native
@pytest.mark.parametrize("layout", ["csr", "rows4"])
def test_threads_do_not_change_a_bit_and_what_changes_is_seen(layout: str) -> None:
    torch.manual_seed(0)
    weight = pack(torch.randn(66, 70 * 9), torch.rand(66, 70 * 9) < 0.3, layout)
    for batch in (1, 9):  # shared by rows of the weight, and by pieces
        x, options = torch.randn(batch, 70, 15, 17), {"kernel": 3, "padding": 1}
        with ops.backend("native"), torch.no_grad():
            one = sparse_conv2d(x, weight, **options)
            torch.set_num_threads(3)
            assert torch.equal(sparse_conv2d(x, weight, **options), one)
            torch.set_num_threads(1)
            weight.values.mul_(2)
            assert torch.equal(sparse_conv2d(x, weight, **options), 2 * one)


@needs_native
def test_zeros_do_not_meet_what_is_not_finite() -> None:
    weight = pack(torch.ones(2, 18), torch.arange(36).reshape(2, 18) % 9 == 4)  # the middle of each kernel
    x = torch.randn(1, 2, 6, 7)
    x[0, 0, 2, 3], x[0, 1, 5, 6] = torch.inf, torch.nan
    for name in ("native", "dense", "reference"):
        with ops.backend(name):
            y = sparse_conv2d(x, weight, kernel=3, padding=1, relu=6)
        assert y[0, :, 2, 3].tolist() == [6.0, 6.0] and bool(y[0, :, 5, 6].isnan().all())
        assert torch.isfinite(y).sum() == y.numel() - 2


@pytest.mark.parametrize("layout", ["csr", "rows4", "bitmask"])
def test_gradients(layout: str) -> None:
    torch.manual_seed(0)
    weight = pack(torch.randn(6, 36), torch.rand(6, 36) < 0.5, layout)
    weight.values.requires_grad_()
    x, bias = torch.randn(2, 4, 7, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    residual = torch.randn(2, 6, 4, 3, requires_grad=True)
    leaves, form = (x, weight.values, bias, residual), {"kernel": 3, "stride": 2, "padding": 1}
    ours = sparse_conv2d(x, weight, bias, **form, relu=1, residual=residual)
    maps = weight.to_dense().reshape(6, 4, 3, 3)
    theirs = (functional.conv2d(x, maps, bias, 2, 1) + residual).relu()
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(theirs.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@pytest.mark.traced
def test_compile_and_empty_batch() -> None:
    weight = pack(torch.randn(6, 72), torch.rand(6, 72) < 0.5)
    form = {"kernel": 3, "stride": 2, "padding": 1}
    compiled = torch.compile(
        lambda x: sparse_conv2d(x, weight, **form, relu=1), backend="aot_eager", fullgraph=True
    )
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(compiled(x), sparse_conv2d(x, weight, **form, relu=1))
    assert sparse_conv2d(x[:0], weight, **form).shape == (0, 6, 3, 3)


@pytest.mark.traced
@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ((2, 7, 5, 5), {}, r"is not \[batch, 8, height, width\]"),
        ((2, 8, 5), {}, r"is not \[batch, 8, height, width\]"),
        ((2, 8, 5, 5), {"bias": torch.ones(5)}, r"bias must be \[6\]"),
        ((2, 8, 5, 5), {"stride": 0}, "kernel and stride must be positive"),
        ((2, 8, 2, 5), {}, r"a kernel of 3 does not fit into a map of \(2, 5\)"),
        ((2, 8, 5, 5), {"residual": torch.ones(2, 6, 5, 5)}, r"residual must be \(2, 6, 3, 3\)"),
    ],
)
def test_refusals(x, options, message) -> None:
    weight = pack(torch.ones(6, 72), torch.rand(6, 72) < 0.5)
    with pytest.raises(OpError, match=message):
        sparse_conv2d(torch.ones(x), weight, options.pop("bias", None), kernel=3, **options)


def test_a_module_spreads_a_shortcut_as_torch_does() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(3, 4, 3, 2, 1).requires_grad_(False)
    keep = torch.rand(4, 3, 3, 3) < 0.4
    plain.weight.mul_(keep)
    packed = SparseConv2d.from_convolution(plain, keep).requires_grad_(False)
    x = torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(packed(x), plain(x))
    for shortcut in (torch.randn(2, 4, 3, 4), torch.randn(4, 1, 1)):
        torch.testing.assert_close(packed(x, shortcut), plain(x) + shortcut)
    with pytest.raises(OpError, match="not a plain convolution"):
        SparseConv2d.from_convolution(torch.nn.Conv2d(4, 4, 3, groups=2))
