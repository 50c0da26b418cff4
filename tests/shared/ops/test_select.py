"""Selection of the largest magnitudes against a sort: ties, dtypes, layouts, threads; masks in place."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.select import (
    apply_mask_,
    keep_largest_,
    largest_masks,
    threshold_and_ties,
    threshold_reference,
)

needs_native = pytest.mark.skipif(not _native.available(), reason="no native library on this machine")


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native" and not _native.available():
        pytest.skip("no native library on this machine")
    with ops.backend(request.param):
        yield request.param


def sorted_masks(tensors: list[Tensor], kept: int) -> list[Tensor]:
    """By a stable sort: the first `kept` in order of falling magnitude, then of position."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).abs()
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[flat.sort(descending=True, stable=True).indices[:kept]] = True
    parts = mask.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@needs_native
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=4),
    st.integers(0, 99),
    st.sampled_from([1, 4, 1000]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_native_equals_a_stable_sort(sizes, seed, values, dtype, share) -> None:
    """Few distinct values make many ties, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        (torch.randint(-values, values + 1, (size,), generator=generator) / -8).to(dtype) for size in sizes
    ]
    kept = round(share * sum(sizes))
    expected = sorted_masks(tensors, kept)
    with ops.backend("native"):
        masks = largest_masks(tensors, kept)
        threshold = threshold_and_ties(tensors, kept)
        projected = [tensor.clone() for tensor in tensors]
        keep_largest_(projected, kept)
    for tensor, mask, right, left in zip(tensors, masks, expected, projected, strict=True):
        assert torch.equal(mask, right)
        assert torch.equal(left, torch.where(right, tensor, 0))
    if kept:
        assert threshold == threshold_reference(tensors, kept)


def large(kind: str, size: int) -> Tensor:
    """Data beyond the size from which a sample guides the selection, some made to mislead it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator)
    if kind == "zeros":
        x[torch.rand(size, generator=generator) < 0.9] = 0
    elif kind == "steps":
        x = (x * 4).round()
    elif kind == "sorted":
        x = x.sort().values
    elif kind == "spike":  # few entries in one place: a sample hardly sees them
        x = torch.zeros(size)
        x[1000:1010] = torch.arange(10.0)
    elif kind == "scales":
        x *= torch.logspace(-30, 30, size)
    return x


@needs_native
@pytest.mark.parametrize("kind", ["normal", "zeros", "steps", "sorted", "spike", "scales", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors(kind: str, dtype: torch.dtype) -> None:
    size = 70_001
    x = (torch.ones(size) if kind == "constant" else large(kind, size)).to(dtype)
    tensors = [x[:50_000], x[50_000:50_003], x[50_003:]]
    for kept in (1, 7, 700, 35_000, 69_900, size):
        with ops.backend("native"):
            masks = largest_masks(tensors, kept)
        assert all(map(torch.equal, masks, sorted_masks(tensors, kept)))


@needs_native
def test_any_number_of_threads_gives_the_same() -> None:
    x = large("steps", 150_000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = x.clone()
            with ops.backend("native"):
                keep_largest_([y[:99_999], y[99_999:]], 40_000)
            results.append(y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert results[0].count_nonzero() == 40_000


def test_infinity_is_largest_and_nan_refused(backend: str) -> None:
    x = torch.tensor([1.0, -float("inf"), 3.0])
    assert threshold_and_ties([x], 1) == (float("inf"), 1)
    keep_largest_([x], 2)
    assert x.tolist() == [0, -float("inf"), 3]
    for size in (3, 70_000):
        bad = torch.ones(size)
        bad[1:3] = float("nan")
        with pytest.raises(OpError, match="2 entries are NaN"):
            keep_largest_([bad], 1)


def test_keeping_nothing_and_everything(backend: str) -> None:
    x = torch.randn(3, 4)
    y = x.clone()
    keep_largest_([y], 12)
    assert torch.equal(x, y)
    keep_largest_([y], 0)
    assert not y.any()
    assert threshold_and_ties([x], 0) == (float("inf"), 0)
    assert not largest_masks([x, x], 0)[1].any()


def test_order_is_row_major_whatever_the_layout(backend: str) -> None:
    base = torch.ones(4, 6)
    turned, strided = base.clone().T, torch.ones(4, 12)[:, ::2]
    keep_largest_([turned, strided], 30)
    assert turned.all() and strided.reshape(-1).tolist() == [1] * 6 + [0] * 18


def test_double_precision_runs_on_the_reference() -> None:
    x = torch.tensor([1.0, 1.0 + 1e-12, 3.0], dtype=torch.float64)
    keep_largest_([x], 2)
    assert x.tolist() == [0, 1 + 1e-12, 3]


def test_parameters_are_changed_in_place_and_noticed(backend: str) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0))
    version = weight._version
    keep_largest_([weight], 2)
    assert weight.tolist() == [0, 0, 0, 0, 4, 5] and weight._version > version and weight.grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_apply_mask(backend: str, dtype: torch.dtype) -> None:
    mask = torch.rand(37, 11) < 0.4
    tensors = [torch.randn(37, 11).to(dtype), torch.full((37, 11), float("nan"), dtype=dtype)]
    expected = [torch.where(mask, tensor, 0) for tensor in tensors]
    apply_mask_(tensors, mask)
    assert torch.equal(tensors[0], expected[0])
    assert torch.equal(tensors[1].isnan(), mask)


def test_apply_mask_on_other_layouts() -> None:
    mask, tensor = (torch.rand(5, 7) < 0.4), torch.randn(7, 5).T
    expected = torch.where(mask, tensor, 0)
    apply_mask_([tensor], mask)
    assert torch.equal(tensor, expected)


def test_compile_keeps_the_mutation() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(weight: Tensor, mask: Tensor) -> Tensor:
        torch.ops.zoo.apply_mask.default([weight], mask)
        value, ties = torch.ops.zoo.kth_magnitude.default([weight], 1)
        torch.ops.zoo.keep_largest.default([weight], 1)
        return weight.sum() + value + ties

    weight = torch.tensor([1.0, -3.0, 2.0])
    assert step(weight, torch.tensor([True, False, True])) == 5
    assert weight.tolist() == [0, 0, 2]


def test_operator_registrations() -> None:
    tests = ("test_schema", "test_faketensor")
    x = [torch.randn(4, 5), torch.randn(3)]
    for op, args in [
        (torch.ops.zoo.kth_magnitude.default, (x, 4)),
        (torch.ops.zoo.keep_largest.default, (x, 4)),
        (torch.ops.zoo.largest_masks.default, (x, 4)),
        (torch.ops.zoo.apply_mask.default, (x[:1], x[0] > 0)),
    ]:
        torch.library.opcheck(op, args, test_utils=tests)


@pytest.mark.parametrize(
    "tensors, kept, message",
    [
        ([], 0, "no tensors"),
        ([torch.ones(3)], 4, "cannot keep 4 of 3"),
        ([torch.ones(3)], -1, "cannot keep -1"),
        ([torch.ones(3), torch.ones(3, dtype=torch.float64)], 1, "one floating-point dtype"),
        ([torch.ones(3, dtype=torch.int32)], 1, "one floating-point dtype"),
    ],
)
def test_bad_arguments_are_refused(tensors: list[Tensor], kept: int, message: str) -> None:
    with pytest.raises(OpError, match=message):
        inspect.unwrap(keep_largest_)(tensors, kept)


@pytest.mark.parametrize(
    "tensor, mask, message",
    [
        (torch.ones(3), torch.ones(4, dtype=torch.bool), "mask's shape"),
        (torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.bool), "floating-point"),
        (torch.ones(3), torch.ones(3), "bool tensor"),
    ],
)
def test_bad_masks_are_refused(tensor: Tensor, mask: Tensor, message: str) -> None:
    with pytest.raises(OpError, match=message):
        inspect.unwrap(apply_mask_)([tensor], mask)
