"""sparse_linear: every layout, backend and batch against fp64; gradients; refusals; compile and export."""

from __future__ import annotations

import copy
import mmap
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.layout import OVERREAD, VALUE_TYPES
from zoo.shared.ops.memory import PAGE, on_huge_pages
from zoo.shared.ops.modules import SparseLinear
from zoo.shared.ops.sparse_linear import reference, sparse_linear
from zoo.shared.ops.weights import SparseWeight, pack

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")
LAYOUTS = ("bitmask", "csr", "rows4", "columns4", "columns8", "columns16")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def example(
    rows: int, cols: int, sparsity: float, layout: str, dtype: torch.dtype = torch.float32
) -> SparseWeight:
    weight = torch.randn(rows, cols)
    return pack(weight.to(dtype), torch.rand(rows, cols) >= sparsity, layout)


def exact(x: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
    return x.double() @ weight.to_dense().double().t()


def close(y: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= TOLERANCE[dtype] * scale).all()


@needs_native
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(LAYOUTS),
    rows=st.integers(0, 40),
    cols=st.integers(0, 40),
    batch=st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 31, 33, 70]),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
    bias=st.booleans(),
)
def test_backends_agree_on_any_shape(layout, rows, cols, batch, sparsity, dtype, seed, bias) -> None:
    torch.manual_seed(seed)
    if layout.startswith("columns"):
        cols *= int(layout[7:])
    weight = example(rows, cols, sparsity, layout, dtype)
    x, b = torch.randn(batch, cols), torch.randn(rows) if bias else None
    expected = exact(x, weight) + (0 if b is None else b)
    for name in ("native", "reference", "dense"):
        with ops.backend(name):
            close(sparse_linear(x, weight, b), expected)
    with ops.backend("native"):
        close(
            sparse_linear(x.to(dtype), weight, b),
            expected,
            torch.bfloat16 if dtype == torch.bfloat16 else torch.float16,
        )


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 4, 40])
def test_several_panels_and_threads_bit_for_bit(layout: str, batch: int) -> None:
    torch.manual_seed(0)
    weight = example(421, 4992, 0.5, layout)  # work enough for several threads, in any layout
    x = torch.randn(batch, 4992)
    results = []
    with ops.backend("native"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sparse_linear(x, weight))
    torch.set_num_threads(1)
    close(results[0], exact(x, weight))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_native
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "cols", "sparsity"), [(37, 4993, 0.8), (5, 4097, 1.0), (64, 600, 0.0)])
def test_narrow_panels_change_no_bit(rows: int, cols: int, sparsity: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = example(rows, cols, sparsity, "csr", dtype)
    x = torch.randn(115, cols)
    with ops.backend("native"):
        first, second = sparse_linear(x, weight), sparse_linear(x, weight)  # narrow from the second call on
        close(first, exact(x, weight))
        assert torch.equal(first, second)
        weight.values.mul_(2)
        assert torch.equal(sparse_linear(x, weight), 2 * first)
        assert torch.equal(sparse_linear(x, weight), 2 * first)


def test_large_weights_lie_on_huge_pages_unchanged() -> None:
    tensor = torch.randn(2200, 1000)
    copy = on_huge_pages(tensor)
    assert torch.equal(copy, tensor) and copy.is_contiguous()
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert copy.data_ptr() % PAGE == 0
    small = torch.randn(3)
    assert on_huge_pages(small) is small


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_keeps_every_value(layout: str) -> None:
    weight, mask = torch.randn(20, 48), torch.rand(20, 48) >= 0.7
    mask[3] = False  # an empty row
    packed = pack(weight, mask, layout)
    dense = packed.to_dense()
    assert torch.equal(dense, weight * mask)
    rows, cols = packed.coordinates()
    assert torch.equal(dense[rows, cols], packed.values[: packed.kept])
    assert torch.equal(packed.values[packed.kept :], torch.zeros(OVERREAD))


def test_layout_follows_the_mask() -> None:
    weight = torch.ones(16, 32)
    assert pack(weight, torch.rand(16, 32) < 0.6).layout == "bitmask"
    assert pack(weight, torch.rand(16, 32) < 0.1).layout == "csr"
    assert pack(weight, (torch.rand(4, 32) < 0.5).repeat_interleave(4, 0)).layout == "rows4"
    assert pack(weight, (torch.rand(16, 4) < 0.5).repeat_interleave(8, 1)).layout == "columns"
    weight[0, 0] = torch.inf
    assert pack(weight, torch.rand(16, 32) < 0.6).layout == "csr"


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_non_finite_input_reaches_kept_weights_only(layout: str, batch: int, bad: float) -> None:
    torch.manual_seed(1)
    weight = example(24, 64, 0.6, layout)
    x = torch.randn(batch, 64)
    x[0, 10] = bad
    met = weight.to_dense()[:, 10] != 0
    for name in ("native", "reference"):
        with ops.backend(name):
            y = sparse_linear(x, weight)
        assert not y[0, met].isfinite().any()
        if layout in ("bitmask", "csr"):  # the zeros inside a kept block are stored, and do meet it
            assert y[0, ~met].isfinite().all()
        assert y[1:].isfinite().all()


@needs_native
@pytest.mark.parametrize("dtype", VALUE_TYPES)
@pytest.mark.parametrize("batch", [1, 4])
def test_bits_keep_infinite_numbers_in_their_place(dtype: torch.dtype, batch: int) -> None:
    weight, x = torch.randn(9, 200), torch.randn(batch, 200)
    mask = torch.rand(9, 200) < 0.5
    mask[2, 7] = mask[5, 150] = True
    weight[2, 7], weight[5, 150] = torch.inf, torch.nan
    x[batch - 1, 64] = torch.inf
    mask[:, 64], mask[3, 64] = False, True  # which row 3 alone meets
    packed = pack(weight.to(dtype), mask, "bitmask")
    with ops.backend("native"):
        y = sparse_linear(x, packed)
    products = packed.to_dense().double() * x.double().unsqueeze(1)
    expected = products.masked_fill(~mask, 0).sum(-1)
    torch.testing.assert_close(y.double(), expected, atol=1e-3, rtol=1e-3, equal_nan=True)


def test_the_dense_form_of_one_dtype_is_not_taken_for_another() -> None:
    weight, x = example(24, 64, 0.6, "csr"), torch.randn(2, 64)
    with ops.backend("dense"):
        sparse_linear(x.bfloat16(), weight)
        torch.testing.assert_close(sparse_linear(x, weight), x @ weight.to_dense().t())


@needs_native
@pytest.mark.parametrize("backend", ["native", "dense"])
def test_a_repeated_call_sees_what_has_changed(backend: str) -> None:
    weight, x, bias = example(24, 64, 0.6, "csr"), torch.randn(2, 64), torch.randn(24)
    with ops.backend(backend), torch.no_grad():
        first = [sparse_linear(x, weight, bias) for _ in range(3)]
        assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
        strided = x.t().contiguous().t()
        torch.testing.assert_close(sparse_linear(2 * strided, weight, 2 * bias), 2 * first[0])
        copied = copy.deepcopy(weight)
        weight.values.mul_(2)
        torch.testing.assert_close(sparse_linear(x, weight), 2 * (first[0] - bias))
        torch.testing.assert_close(sparse_linear(x, copied, bias), first[0])
        with pytest.raises(OpError, match="bias"):
            sparse_linear(x, weight, bias[:5])
    with ops.backend("native"), torch.no_grad():
        sparse_linear(x, weight)
        weight.index[0] = 64
        with pytest.raises(OpError, match="outside"):
            sparse_linear(x, weight)


@needs_native
def test_strides_and_leading_dimensions() -> None:
    weight = example(6, 10, 0.5, "csr")
    x = torch.randn(10, 3, 4).permute(1, 2, 0)
    with ops.backend("native"):
        y = sparse_linear(x, weight)
        assert y.shape == (3, 4, 6)
        close(y.reshape(-1, 6), exact(x.reshape(-1, 10), weight))
        close(sparse_linear(x[0, 0], weight), exact(x[0, 0], weight))


@pytest.mark.parametrize("layout", ["bitmask", "csr", "rows4", "columns8"])
def test_gradcheck(layout: str) -> None:
    torch.manual_seed(0)
    weight = pack(torch.randn(6, 16, dtype=torch.double), torch.rand(6, 16) < 0.5, layout)
    x = torch.randn(3, 16, dtype=torch.double, requires_grad=True)
    bias = torch.randn(6, dtype=torch.double, requires_grad=True)
    kept = weight.values[: weight.kept].clone().requires_grad_()

    def run(x, kept, bias):
        values = torch.nn.functional.pad(kept, (0, OVERREAD))
        return sparse_linear(
            x,
            SparseWeight(values, weight.index, weight.pointer, weight.layout, weight.shape, weight.width),
            bias,
        )

    assert torch.autograd.gradcheck(run, (x, kept, bias))


@needs_native
@pytest.mark.parametrize("layout", ["bitmask", "csr"])
@pytest.mark.parametrize("batch", [1, 33])
def test_native_gradients(layout: str, batch: int) -> None:
    torch.manual_seed(0)
    weight = example(30, 4200, 0.8, layout)
    found = []
    for name, threads in (("native", 1), ("native", 2), ("reference", 1)):
        torch.set_num_threads(threads)
        values = weight.values.clone().requires_grad_()
        x = torch.linspace(-1, 1, batch * 4200).reshape(batch, 4200).requires_grad_()
        packed = SparseWeight(values, weight.index, weight.pointer, weight.layout, weight.shape)
        with ops.backend(name):
            sparse_linear(x, packed).square().sum().backward()
        found.append((x.grad, values.grad))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    for ours, expected in zip(found[0], found[2], strict=True):
        close(ours, expected.double())


@pytest.mark.traced
def test_refusals() -> None:
    weight = example(8, 16, 0.5, "csr")
    with pytest.raises(OpError, match="does not end in the 16 columns"):
        sparse_linear(torch.randn(2, 15), weight)
    with pytest.raises(OpError, match="floating point"):
        ops.sparse_linear(torch.ones(2, 16, dtype=torch.int64), weight)
    with pytest.raises(OpError, match=r"bias must be \[8\]"):
        sparse_linear(torch.randn(2, 16), weight, torch.randn(7))
    with pytest.raises(OpError, match="unknown layout"):
        pack(torch.randn(4, 4), layout="ellpack")
    with pytest.raises(OpError, match="must divide"):
        pack(torch.randn(4, 12), layout="columns8")
    with pytest.raises(OpError, match="floating-point weight"):
        pack(torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(OpError, match="no backend 'vendor'"), ops.backend("vendor"):
        sparse_linear(torch.randn(2, 16).half(), weight)
    with pytest.raises(OpError, match="unknown backend"), ops.backend("cuda"):
        pass


@pytest.mark.parametrize(
    ("field", "broken", "message"),
    [
        ("index", lambda t: t.fill_(16), "outside its panel"),
        ("index", lambda t: t.fill_(-1), "outside its panel"),
        ("pointer", lambda t: t[1].fill_(-5), "never fall"),
        ("pointer", lambda t: t[-1].add_(1), "does not fit"),
        ("pointer", lambda t: t[0].fill_(1), "start at 0"),
    ],
)
def test_an_index_spoilt_in_place_is_noticed(field: str, broken, message: str) -> None:
    module = SparseLinear(example(8, 16, 0.5, "csr"))
    module(torch.randn(2, 16))
    broken(getattr(module, field))
    with pytest.raises(OpError, match=message):
        module(torch.randn(2, 16))


def test_spoilt_bits_are_noticed() -> None:
    weight = example(8, 16, 0.5, "bitmask")
    weight.index[0] ^= 1
    with pytest.raises(OpError, match="do not add up"):
        sparse_linear(torch.randn(2, 16), weight)
    bits = torch.zeros_like(weight.index)
    bits[:, 3] = 1  # column 24 of 16
    pointer = torch.arange(9, dtype=torch.int32)
    with pytest.raises(OpError, match="beyond the 16 columns"):
        SparseWeight(torch.zeros(8 + OVERREAD), bits, pointer, "bitmask", (8, 16))


@pytest.mark.parametrize("layout", ["bitmask", "csr", "rows4"])
@pytest.mark.traced
def test_compile_and_export(layout: str) -> None:
    module = SparseLinear(example(8, 16, 0.5, layout), torch.randn(8))
    x = torch.randn(3, 16, requires_grad=True)
    expected = module(x)
    expected.sum().backward()
    grad, x.grad = x.grad, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        y = compiled(x)
        y.sum().backward()
        program = torch.export.export(module, (x.detach(),))
    assert torch.equal(y, expected) and torch.equal(x.grad, grad)
    assert torch.equal(program.module()(x.detach()), expected)


def test_opcheck() -> None:
    weight = example(8, 16, 0.5, "csr")
    values = weight.values.requires_grad_()
    x = torch.randn(3, 16, requires_grad=True)
    torch.library.opcheck(
        torch.ops.zoo.sparse_linear.default,
        (x, values, weight.index, weight.pointer, None, "csr", 8, 16, 1),
    )


def test_module_round_trip() -> None:
    linear = torch.nn.Linear(16, 8)
    mask = torch.rand(8, 16) < 0.4
    module = SparseLinear.from_dense(linear, mask)
    dense = module.to_dense()
    assert torch.equal(dense.weight, linear.weight * mask)
    other = SparseLinear.from_dense(torch.nn.Linear(16, 8), mask)
    other.load_state_dict(module.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(other(x), module(x))
    close(module(x).detach(), dense(x).double())
    with pytest.raises(OpError, match="NonDynamicallyQuantizableLinear is not a plain"):
        SparseLinear.from_dense(torch.nn.MultiheadAttention(8, 2).out_proj)


def test_training_moves_kept_values_only() -> None:
    module = SparseLinear.from_dense(torch.nn.Linear(16, 8), torch.rand(8, 16) < 0.4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    before = module.weight.to_dense().detach()
    for _ in range(3):
        module(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
    after = module.weight.to_dense().detach()
    assert torch.equal(after == 0, before == 0) and not torch.equal(after, before)
    assert torch.equal(module.values[-OVERREAD:], torch.zeros(OVERREAD))


def test_explain_names_backend_and_reason() -> None:
    weight, x = example(8, 16, 0.5, "csr"), torch.randn(2, 16)
    with ops.backend("reference"):
        assert (
            str(ops.explain(ops.sparse_linear, x, weight))
            == "sparse_linear: reference, asked for by ops.backend"
        )
    assert ops.explain("sparse_linear", x, weight).backend in ("native", "dense", "reference", "vendor")
    with pytest.raises(OpError, match="unknown op 'conv9d'"):
        ops.explain("conv9d")


def test_vendor_agrees() -> None:
    weight, x, bias = example(8, 16, 0.5, "csr"), torch.randn(5, 16), torch.randn(8)
    with ops.backend("vendor"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(sparse_linear(x, weight, bias), exact(x, weight) + bias)
    close(reference(x, weight, bias), exact(x, weight) + bias)
