"""spmm and sddmm against their definition, float64 and dense algebra; gradients, threads, refusals."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.shared import ops
from zoo.shared.bench.random_graphs import rmat
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.csr import csr_from_edges, entry_rows, transposed
from zoo.shared.ops.spmm import sddmm, sddmm_reference, spmm, spmm_reference

BACKENDS = ["reference", "native"]
needs_native = pytest.mark.skipif(not _native.available(), reason="no native library on this machine")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "native" and not _native.available():
        pytest.skip("no native library on this machine")
    with ops.backend(request.param):
        yield request.param


def graph(rows: int, cols: int, entries: int, seed: int, index: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random CSR index with repeats and empty rows."""
    generator = torch.Generator().manual_seed(seed)
    entries = entries if rows and cols else 0
    edges = torch.stack(
        [
            torch.randint(max(rows, 1), (entries,), generator=generator) ** 2 % max(rows, 1),
            torch.randint(max(cols, 1), (entries,), generator=generator),
        ]
    ).to(index)
    crow, col, _ = csr_from_edges(edges, rows)
    return crow, col


def dense_of(crow: Tensor, col: Tensor, weight: Tensor, cols: int) -> Tensor:
    dense = torch.zeros(crow.numel() - 1, cols, dtype=weight.dtype)
    return dense.index_put((entry_rows(crow), col.long()), weight, accumulate=True)


widths = st.integers(0, 75) | st.sampled_from([4, 8, 16, 32, 64, 128, 130, 256, 300])
shapes = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 40), widths)


@needs_native
@given(
    shapes,
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from(["sum", "mean", "max"]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_native_equals_reference(shape, index, reduce, weighted, dtype, seed) -> None:
    rows, cols, entries, features = shape
    crow, col = graph(rows, cols, entries, seed, index)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(cols, features, generator=generator, dtype=torch.float64)
    weight = torch.randn(col.numel(), generator=generator, dtype=torch.float64) if weighted else None
    expected = spmm_reference(crow, col, x, weight, reduce=reduce)
    with ops.backend("native"):
        result = spmm(crow, col, x.to(dtype), None if weight is None else weight.to(dtype), reduce=reduce)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)


def test_reference_is_the_dense_product(backend: str) -> None:
    crow, col = graph(7, 5, 20, 0, torch.int32)
    x, weight = torch.randn(5, 11, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    dense = dense_of(crow, col, weight, 5)
    torch.testing.assert_close(spmm(crow, col, x, weight), dense @ x)
    mean = dense @ x / crow.diff().clamp(min=1)[:, None]
    torch.testing.assert_close(spmm(crow, col, x, weight, reduce="mean"), mean)
    a = torch.randn(7, 11, dtype=torch.float64)
    torch.testing.assert_close(sddmm(crow, col, a, x), (a @ x.T)[entry_rows(crow), col.long()])


def test_max_by_hand(backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1, 5, -1, nan], [3, 5, -2, 1], [2, -inf, -3, 2.0]], requires_grad=True)
    crow, col = torch.tensor([0, 3, 3, 4]), torch.tensor([2, 1, 0, 2])
    y = spmm(crow, col, x, reduce="max")
    assert torch.equal(y[1], torch.zeros(4)) and torch.equal(y[2], x[2])
    assert y[0, :3].tolist() == [3.0, 5.0, -1.0] and y[0, 3].isnan()
    y[0].backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    # The two fives tie: the first entry, which is row 1 of x, gets the gradient.
    assert x.grad.tolist() == [[0, 0, 3, 4], [1, 2, 0, 0], [0, 0, 0, 0]]


def test_nan_and_infinity_pass(backend: str) -> None:
    x = torch.tensor([[float("nan")] * 9, [float("inf")] * 9, [1.0] * 9])
    crow, col = torch.tensor([0, 1, 2, 3, 5]), torch.tensor([0, 1, 2, 1, 2])
    y = spmm(crow, col, x, torch.tensor([1.0, -2.0, 3.0, 0.0, 1.0]))
    assert y[0].isnan().all() and (y[1] == -float("inf")).all() and (y[2] == 3).all() and y[3].isnan().all()


@needs_native
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_one_and_two_threads_agree_bitwise(reduce: str) -> None:
    edges = rmat(300, 4000)
    crow, col, _ = csr_from_edges(edges.int(), 300)
    x, weight = torch.randn(300, 67), torch.randn(4000)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
            with ops.backend("native"):
                y = spmm(crow, col, a, w, reduce=reduce)
                y.backward(torch.ones_like(y) / 3)
            results.append((y.detach(), a.grad, w.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients(backend: str, reduce: str, weighted: bool) -> None:
    crow, col = graph(4, 5, 12, 1, torch.int64)
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True) if weighted else None
    inputs = (x,) if weight is None else (x, weight)

    def run(*values: Tensor) -> Tensor:
        return spmm(crow, col, *values, reduce=reduce)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    if reduce != "max":
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_gradients_of_sddmm(backend: str) -> None:
    crow, col = graph(4, 5, 12, 2, torch.int32)
    a = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def run(*values: Tensor) -> Tensor:
        return sddmm(crow, col, *values)

    assert torch.autograd.gradcheck(run, (a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (a, b), fast_mode=True)


@needs_native
@given(shapes, st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_sddmm_native_equals_reference(shape, seed) -> None:
    rows, cols, entries, features = shape
    crow, col = graph(rows, cols, entries, seed, torch.int32)
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rows, features, generator=generator), torch.randn(cols, features, generator=generator)
    with ops.backend("native"):
        result = sddmm(crow, col, a, b)
    expected = sddmm_reference(crow, col, a.double(), b.double())
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float(backend: str, dtype: torch.dtype) -> None:
    crow, col = graph(6, 6, 30, 3, torch.int32)
    x = torch.randn(6, 16).to(dtype)
    expected = spmm(crow, col, x.float()).to(dtype)
    assert torch.equal(spmm(crow, col, x), expected)
    assert sddmm(crow, col, x, x).dtype == dtype


def test_non_contiguous_inputs(backend: str) -> None:
    crow, col = graph(6, 6, 20, 4, torch.int64)
    wide = torch.randn(6, 40, dtype=torch.float64)
    weight = torch.randn(20, 2, dtype=torch.float64)
    result = spmm(crow, torch.stack([col, col], 1)[:, 0], wide.T.contiguous().T[:, ::2], weight[:, 1])
    torch.testing.assert_close(result, spmm_reference(crow, col, wide[:, ::2], weight[:, 1]))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
def test_vendor_equals_reference() -> None:
    crow, col = graph(6, 7, 20, 5, torch.int32)
    x = torch.randn(7, 16)
    for reduce in ("sum", "mean"):
        with ops.backend("vendor"):
            result = spmm(crow, col, x, reduce=reduce)
        torch.testing.assert_close(result, spmm_reference(crow, col, x, reduce=reduce))


def test_operator_registrations() -> None:
    crow, col = graph(5, 4, 9, 7, torch.int64)
    x = torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(9, requires_grad=True)
    a = torch.randn(5, 3, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for op, args in [
        (torch.ops.zoo.spmm.default, (crow, col, weight, x, True)),
        (torch.ops.zoo.spmm_transposed.default, (crow, col, weight, a, 4)),
        (torch.ops.zoo.sddmm.default, (crow, col, a, x)),
        (torch.ops.zoo.spmm_max.default, (crow, col, weight, x)),
    ]:
        torch.library.opcheck(op, args, test_utils=tests)


def test_transposed_is_kept_until_the_graph_changes() -> None:
    crow, col = graph(5, 5, 12, 8, torch.int64)
    first = transposed(crow, col, 5)
    assert transposed(crow, col, 5) is first
    col.copy_(4 - col)
    again = transposed(crow, col, 5)
    assert again is not first
    weight = torch.randn(12)
    turned = dense_of(again.crow, again.col, weight[again.order.long()], 5)
    assert torch.equal(turned, dense_of(crow, col, weight, 5).T)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"crow": torch.tensor([0, 2, 1, 4])}, "rise from 0"),
        ({"crow": torch.tensor([1, 2, 3, 4])}, "rise from 0"),
        ({"crow": torch.tensor([0, 1, 2, 3])}, "rise from 0"),
        ({"crow": torch.tensor([], dtype=torch.int64)}, "rows \\+ 1"),
        ({"col": torch.tensor([0, 1, 2, 3])}, "\\[0, 3\\)"),
        ({"col": torch.tensor([0, -1, 2, 1])}, "\\[0, 3\\)"),
        ({"col": torch.tensor([0, 1, 2, 1], dtype=torch.int32)}, "both be int32 or both int64"),
        ({"crow": torch.tensor([0.0, 1.0, 2.0, 4.0])}, "both be int32 or both int64"),
        ({"x": torch.ones(3, dtype=torch.int64)}, "floating-point matrix"),
        ({"weight": torch.ones(3)}, "4 values"),
        ({"weight": torch.ones(4, dtype=torch.float64)}, "x's dtype"),
        ({"reduce": "min"}, "sum, mean, max"),
        ({"crow": torch.zeros(4, dtype=torch.int64, device="meta")}, "one device"),
    ],
)
def test_bad_arguments_are_refused(backend: str, change: dict, message: str) -> None:
    unchecked = inspect.unwrap(spmm)  # without the shape checker of the test suite, as users have it
    arguments = {"crow": torch.tensor([0, 1, 2, 4]), "col": torch.tensor([0, 1, 2, 1]), "x": torch.ones(3, 4)}
    with pytest.raises(OpError, match=message):
        unchecked(**(arguments | change))


def test_sddmm_refuses_wrong_rows() -> None:
    with pytest.raises(OpError, match="3 rows"):
        crow, col = torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 2, 1])
        inspect.unwrap(sddmm)(crow, col, torch.ones(4, 2), torch.ones(3, 2))


def test_csr_from_edges_refuses_unknown_rows() -> None:
    with pytest.raises(OpError, match="outside \\[0, 3\\)"):
        csr_from_edges(torch.tensor([[0, 3], [0, 0]]), 3)


def test_explain_names_the_backend() -> None:
    crow, col = graph(5, 5, 12, 9, torch.int64)
    plan = ops.explain(spmm, crow, col, torch.ones(5, 3))
    assert plan.backend == ("native" if _native.available() else "vendor")


def test_a_repeated_call_sees_what_has_changed() -> None:
    torch.manual_seed(0)
    crow, col = torch.tensor([0, 2, 2, 5]).int(), torch.tensor([0, 3, 1, 1, 2]).int()
    x, weight, unchecked = torch.randn(4, 16), torch.randn(5), inspect.unwrap(spmm)
    y = spmm(crow, col, x, weight)
    assert torch.equal(spmm(crow, col, x, weight), y)
    assert torch.equal(spmm(crow, col, x, 2 * weight), 2 * y)
    assert torch.equal(spmm(crow, col, x), spmm(crow, col, x, torch.ones(5)))
    with pytest.raises(OpError, match="reduce must be one of"):
        spmm(crow, col, x, weight, reduce="least")
    with pytest.raises(OpError, match="weight must hold 5"):
        unchecked(crow, col, x, weight[:4])
    with pytest.raises(OpError, match="weight must hold 5"):
        spmm(crow, col, x, weight.double())
    with pytest.raises(OpError, match=r"columns must lie in \[0, 3\)"):
        spmm(crow, col, x[:3], weight)
    col[4] = 4
    with pytest.raises(OpError, match=r"columns must lie in \[0, 4\)"):
        spmm(crow, col, x, weight)
    col[4] = 2
    crow[1] = 9
    with pytest.raises(OpError, match="crow must rise"):
        spmm(crow, col, x, weight)
    crow[1] = 2
    assert torch.equal(spmm(crow, col, x, weight), y)
