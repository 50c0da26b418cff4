"""spgemm against dense algebra and scipy: both accumulators, column order, gradients, threads, refusals."""

from __future__ import annotations

import inspect

import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.shared import ops
from zoo.shared.bench.random_graphs import rmat
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.csr import csr_from_edges, entry_rows
from zoo.shared.ops.spgemm import (
    CSR,
    _refuse_overflow,
    multiplications,
    probes,
    spgemm,
    spgemm_reference,
)

needs_native = pytest.mark.skipif(not _native.available(), reason="no native library on this machine")


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native" and not _native.available():
        pytest.skip("no native library on this machine")
    with ops.backend(request.param):
        yield request.param


def random_csr(rows: int, cols: int, entries: int, seed: int, dtype=torch.float64, index=torch.int64) -> CSR:
    """Unsorted columns, repeats and empty rows."""
    generator = torch.Generator().manual_seed(seed)
    entries = entries if rows and cols else 0
    row = torch.randint(max(rows, 1), (entries,), generator=generator) ** 2 % max(rows, 1)
    col = torch.randint(max(cols, 1), (entries,), generator=generator)
    crow, col, _ = csr_from_edges(torch.stack([row, col]).to(index), rows)
    return CSR(crow, col, torch.randn(entries, generator=generator).to(dtype), cols)


def dense_of(matrix: CSR) -> Tensor:
    dense = torch.zeros(matrix.crow.numel() - 1, matrix.cols, dtype=matrix.values.dtype)
    return dense.index_put((entry_rows(matrix.crow), matrix.col.long()), matrix.values, accumulate=True)


def scipy_of(matrix: CSR) -> scipy.sparse.csr_matrix:
    arrays = (matrix.values.numpy(), matrix.col.numpy(), matrix.crow.numpy())
    return scipy.sparse.csr_matrix(arrays, (matrix.crow.numel() - 1, matrix.cols))


def is_sorted(matrix: CSR) -> bool:
    place = entry_rows(matrix.crow) * matrix.cols + matrix.col
    return bool((place.diff() > 0).all())


size = st.integers(0, 9)


@needs_native
@given(
    size,
    size,
    size,
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(0, 99),
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_native_equals_the_dense_product(rows, inner, cols, left, right, seed, index, dtype) -> None:
    a = random_csr(rows, inner, left, seed, dtype, index)
    b = random_csr(inner, cols, right, seed + 1, dtype, index)
    with ops.backend("native"):
        c = spgemm(a, b)
    assert is_sorted(c) and c.col.dtype == index and c.values.dtype == dtype
    expected = spgemm_reference(a, b)
    assert torch.equal(c.crow, expected.crow) and torch.equal(c.col, expected.col)
    torch.testing.assert_close(dense_of(c), dense_of(a) @ dense_of(b), atol=1e-4, rtol=1e-4)


@needs_native
@pytest.mark.parametrize("cols", [300, 1 << 20, 1 << 23])  # the last is wide enough for the hash table
# Short rows in one pass and sorted by rank; long ones in two passes, sorted by flags or by digits.
@pytest.mark.parametrize("left, right", [(2000, 3000), (12_000, 30_000)])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("accumulator", ["auto", "dense", "hash"])
def test_same_pattern_and_values_as_scipy(
    cols: int, left: int, right: int, sort: bool, accumulator: str
) -> None:
    a, b = random_csr(400, 300, left, 0), random_csr(300, cols, right, 1)
    with ops.backend("native"):
        c = spgemm(a, b, sort=sort, accumulator=accumulator)
    expected = (scipy_of(a) @ scipy_of(b)).sorted_indices()
    assert is_sorted(c) or not sort
    ours = scipy_of(c).sorted_indices()
    assert (ours.indices == expected.indices).all() and (ours.indptr == expected.indptr).all()
    assert abs(ours.data - expected.data).max() < 1e-11


@needs_native
def test_probes_of_the_hash_tables_by_hand() -> None:
    """A row's table has 16 slots; the home of a column is its top four bits after the multiplication."""

    def home(column: int) -> int:
        return (column * 0x9E3779B97F4A7C15 % 2**64) >> 60

    same = [column for column in range(200) if home(column) == home(0)][:3]
    one = CSR(torch.tensor([0, 1, 1]), torch.tensor([0]), torch.ones(1), 1)
    row = CSR(torch.tensor([0, 4]), torch.tensor([*same, same[2]]), torch.ones(4), 200)
    assert probes(one, row) == (4, 1 + 2 + 3 + 3, 3)
    with pytest.raises(OpError, match="unknown accumulator 'tree': choose one of auto, dense, hash"):
        spgemm(one, row, accumulator="tree")


def test_cancelled_entries_and_nan_are_kept(backend: str) -> None:
    a = CSR(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]), torch.tensor([1.0, -1.0, 1.0]), 2)
    b = CSR(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 0]), torch.tensor([2.0, float("nan"), 2.0]), 3)
    c = spgemm(a, b)
    assert c.crow.tolist() == [0, 2, 3] and c.col.tolist() == [0, 2, 0]
    assert c.values[0] == 0 and c.values[1].isnan() and c.values[2] == 2


def test_multiplications_are_counted_in_64_bits() -> None:
    """One full column times one full row: more products than 32 bits hold, none of them computed."""
    entries = 50_000
    a = CSR(torch.arange(entries + 1).int(), torch.zeros(entries).int(), torch.ones(entries), 1)
    b = CSR(torch.tensor([0, entries]).int(), torch.arange(entries).int(), torch.ones(entries), entries)
    assert multiplications(a, b) == entries**2


def test_too_many_entries_for_the_index_are_refused() -> None:
    """Asked of the check itself: a product that large takes seconds and gigabytes."""
    _refuse_overflow(2**31, torch.int64)
    with pytest.raises(OpError, match="2147483648 entries, too many for torch.int32"):
        _refuse_overflow(2**31, torch.int32)


@needs_native
def test_any_number_of_threads_gives_the_same() -> None:
    crow, col, _ = csr_from_edges(rmat(2000, 30_000), 2000)
    values = torch.randn(30_000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            a = CSR(crow, col, values.clone().requires_grad_(), 2000)
            with ops.backend("native"):
                c = spgemm(a, a)
                c.values.square().sum().backward()
            results.append((c.crow, c.col, c.values.detach(), a.values.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_gradients(backend: str) -> None:
    a, b = random_csr(4, 5, 9, 0), random_csr(5, 6, 11, 1)
    assert torch.autograd.gradcheck(
        lambda x, y: spgemm(a._replace(values=x), b._replace(values=y)).values,
        (a.values.requires_grad_(), b.values.requires_grad_()),
    )


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
def test_vendor_agrees() -> None:
    a = CSR(torch.tensor([0, 1, 3]), torch.tensor([1, 0, 1]), torch.tensor([1.0, 2.0, 3.0]), 2)
    with ops.backend("vendor"):
        c = spgemm(a, a)
    torch.testing.assert_close(dense_of(c), dense_of(a) @ dense_of(a))


def test_operator_registrations() -> None:
    a, b = random_csr(4, 5, 9, 0, torch.float32), random_csr(5, 6, 11, 1, torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.zoo.spgemm.default, (*a[:3], *b[:3], 6, True, 0), test_utils=tests)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cols": 4}, "4 columns and B 3 rows"),
        ({"values": torch.ones(3, dtype=torch.float64)}, "share dtypes"),
        ({"values": torch.ones(2)}, "one per column"),
        ({"values": torch.ones(3, dtype=torch.float16)}, "fp32 or fp64"),
        ({"col": torch.tensor([0, 1, 3])}, "\\[0, 3\\)"),
        ({"crow": torch.tensor([0, 2, 1, 3])}, "rise from 0"),
    ],
)
def test_bad_arguments_are_refused(backend: str, change: dict, message: str) -> None:
    good = CSR(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2]), torch.ones(3), 3)
    with pytest.raises(OpError, match=message):
        inspect.unwrap(spgemm)(good._replace(**change), good)
