"""Convolutions and pooling on sites against dense ones: geometry, gradients, threads, refusals."""

from __future__ import annotations

import gc
import inspect
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.rulebook import _made, conv_rulebook, conv_rulebook_onto, geometry, submanifold_rulebook
from zoo.shared.ops.sparse_conv import inverse_conv, sparse_avg_pool, sparse_conv, sparse_max_pool, subm_conv
from zoo.shared.ops.sparse_tensor import SparseConvTensor

CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
needs_native = pytest.mark.skipif(not _native.available(), reason="no native library on this machine")


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native" and not _native.available():
        pytest.skip("no native library on this machine")
    with ops.backend(request.param):
        yield request.param


def random_sites(
    shape: tuple[int, ...], channels: int, share: float, seed: int = 0, dtype=torch.float64, batch: int = 2
) -> SparseConvTensor:
    """Sites in random order."""
    generator = torch.Generator().manual_seed(seed)
    indices = (torch.rand(batch, *shape, generator=generator) < share).nonzero().int()
    indices = indices[torch.randperm(len(indices), generator=generator)]
    features = torch.randn(len(indices), channels, generator=generator, dtype=torch.float64).to(dtype)
    return SparseConvTensor(features, indices, shape, batch)


def sites(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def active(x: SparseConvTensor) -> Tensor:
    return x.replace_feature(torch.ones(len(x.indices), 1, dtype=torch.float64)).dense()


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@needs_native
@given(
    shapes,
    st.floats(0, 1),
    st.integers(1, 20),
    st.integers(1, 35),
    st.sampled_from([1, 3]),
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_submanifold_is_the_dense_convolution_at_the_sites(
    shape, share, channels, out, kernel, dilation, with_bias, dtype, seed
) -> None:
    x = random_sites(shape, channels, share, seed, dtype)
    weight = torch.randn(out, *(kernel,) * len(shape), channels, dtype=dtype)
    bias = torch.randn(out, dtype=dtype) if with_bias else None
    with ops.backend("native"):
        y = subm_conv(x, weight, bias, dilation=dilation)
    dense = CONV[len(shape)](
        x.dense().double(),
        weight.movedim(-1, 1).double(),
        None if bias is None else bias.double(),
        padding=kernel // 2 * dilation,
        dilation=dilation,
    )
    torch.testing.assert_close(y.dense().double(), dense * active(x), atol=1e-4, rtol=1e-4)
    assert y.indices is x.indices and y.features.dtype == dtype


@needs_native
@given(
    shapes,
    st.floats(0, 1),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_convolution_and_pooling_are_the_dense_ones(
    shape, share, kernel, stride, padding, dilation, seed
) -> None:
    dims = len(shape)
    reach = dilation * (kernel - 1) + 1
    if any(n + 2 * padding < reach for n in shape):
        return
    x = random_sites(shape, 5, share, seed)
    weight = torch.randn(7, *(kernel,) * dims, 5, dtype=torch.float64)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    with ops.backend("native"):
        y = sparse_conv(x, weight, **options)
        largest = sparse_max_pool(x, kernel, **options)
        mean = sparse_avg_pool(x, kernel, **options)
    dense = CONV[dims](x.dense(), weight.movedim(-1, 1), **options)
    torch.testing.assert_close(y.dense(), dense)
    reached = CONV[dims](active(x), torch.ones(1, 1, *(kernel,) * dims, dtype=torch.float64), **options)
    assert torch.equal(active(y) > 0, reached > 0.5)
    keys = y.indices.long()
    assert torch.equal(keys, (reached[:, 0] > 0.5).nonzero())  # every reached site, row-major
    ones = torch.ones(5, 1, *(kernel,) * dims, dtype=torch.float64)
    sums = CONV[dims](x.dense(), ones, groups=5, **options)
    torch.testing.assert_close(mean.dense(), torch.where(reached > 0.5, sums / reached.clamp(min=0.5), 0))
    if padding <= kernel // 2 and dims == 2:
        low = torch.where(active(x) > 0, x.dense(), -1e9)
        pooled = functional.max_pool2d(low, kernel, stride, padding, dilation)
        torch.testing.assert_close(largest.dense(), torch.where(reached > 0.5, pooled, 0))


def test_room_for_the_sites_that_an_input_reaches() -> None:
    """Where stride and dilation have a common factor, all offsets of a kernel reach an output, or none."""
    for kernel, stride, dilation in itertools.product(range(1, 6), range(1, 5), range(1, 5)):
        reached = [
            sum((position - at * dilation) % stride == 0 for at in range(kernel))
            for position in range(stride)
        ]
        assert geometry(1, kernel, stride, 0, dilation).most_reached == max(reached)
    assert geometry(2, (3, 5), (2, 1), 0, (2, 3)).most_reached == 15


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_both_backends_make_the_same_rulebook(dims: int) -> None:
    x = random_sites((5, 4, 6)[:dims], 1, 0.4)
    books = []
    for name in ("reference", "native"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "reference":
                patch.setattr(_native, "available", lambda: False)
            indices = x.indices.clone()  # other memory, so that no rulebook is found
            books.append(
                [
                    submanifold_rulebook(indices, x.spatial_shape, 2, 3, 2),
                    conv_rulebook(indices, x.spatial_shape, 2, 3, 2, 1, 1),
                ]
            )
    for first, second in zip(*books, strict=True):
        assert torch.equal(first.indices, second.indices) and first.spatial_shape == second.spatial_shape
        for a, b in ((first.forward, second.forward), (first.backward, second.backward)):
            assert all(torch.equal(p, q) for p, q in zip(a[:3], b[:3], strict=True)) and a[3:] == b[3:]


@needs_native
def test_many_tiles_and_the_hash_table() -> None:
    """A grid far larger than its sites, and more sites than one tile holds."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 40, (3000, 4), generator=generator).unique(dim=0).int()
    indices[:, 0] = 0
    indices = indices.unique(dim=0).int()
    x = SparseConvTensor(torch.randn(len(indices), 6), indices, (40, 40, 40), 1)
    far = SparseConvTensor(x.features, indices.clone(), (4000, 4000, 4000), 1)
    weight = torch.randn(8, 3, 3, 3, 6)
    with ops.backend("native"):
        near, wide = subm_conv(x, weight), subm_conv(far, weight)
        assert torch.equal(near.features, wide.features)
        down, wide_down = sparse_conv(x, weight, stride=2), sparse_conv(far, weight, stride=2)
    inside = (wide_down.indices[:, 1:] < torch.tensor(down.spatial_shape)).all(1)
    assert torch.equal(wide_down.indices[inside], down.indices)
    torch.testing.assert_close(wide_down.features[inside], down.features)
    torch.testing.assert_close(
        near.dense(),
        functional.conv3d(x.dense(), weight.movedim(-1, 1), padding=1) * active(x).float(),
        atol=1e-4,
        rtol=1e-4,
    )


def test_gradients(backend: str) -> None:
    x = random_sites((3, 4), 3, 0.5)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    deep = torch.randn(3, 3, 3, 1, dtype=torch.float64, requires_grad=True)
    features = x.features.requires_grad_()
    up = torch.randn(3, 3, 3, 4, dtype=torch.float64, requires_grad=True)

    def there_and_back(f: Tensor, w: Tensor, u: Tensor) -> Tensor:
        fine = x.replace_feature(f)
        down = sparse_conv(fine, w, stride=2, padding=1)
        return inverse_conv(down, u, fine=fine, stride=2, padding=1).features

    def check(function, inputs) -> bool:
        return torch.autograd.gradcheck(function, inputs, fast_mode=True)

    assert check(lambda f, w, b: subm_conv(x.replace_feature(f), w, b).features, (features, weight, bias))
    assert check(lambda f, w: subm_conv(x.replace_feature(f), w, groups=3).features, (features, deep))
    assert check(there_and_back, (features, weight, up))
    assert check(lambda f: sparse_max_pool(x.replace_feature(f), 2).features, (features,))
    assert check(lambda f: sparse_avg_pool(x.replace_feature(f), 3, stride=2).features, (features,))


@needs_native
@pytest.mark.parametrize("channels, out", [(1, 1), (16, 16), (17, 33), (40, 7), (64, 64)])
def test_native_gradients_equal_the_reference(channels: int, out: int) -> None:
    x = random_sites((9, 9, 9), channels, 0.3, dtype=torch.float32)
    weight = torch.randn(out, 3, 3, 3, channels)
    results = []
    for name in ("reference", "native"):
        f, w = x.features.clone().requires_grad_(), weight.clone().requires_grad_()
        with ops.backend(name):
            y = subm_conv(x.replace_feature(f), w).features
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        results.append((y.detach(), f.grad, w.grad))
    for reference, native in zip(*results, strict=True):
        torch.testing.assert_close(native, reference, atol=2e-3, rtol=1e-4)


def test_inverse_is_the_transposed_convolution_at_the_sites(backend: str) -> None:
    x = random_sites((7, 6), 3, 0.4)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    back = torch.randn(5, 3, 3, 4, dtype=torch.float64)
    down = sparse_conv(x, weight, stride=2, padding=1)
    up = inverse_conv(down, back, fine=x, stride=2, padding=1)
    assert up.indices is x.indices
    dense = functional.conv_transpose2d(
        down.dense(), back.movedim(-1, 0), stride=2, padding=1, output_padding=(0, 1)
    )
    torch.testing.assert_close(up.dense(), dense * active(x))


def test_depthwise_is_the_dense_one(backend: str) -> None:
    x = random_sites((6, 7), 9, 0.5)
    weight, bias = torch.randn(9, 3, 3, 1, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    dense = functional.conv2d(x.dense(), weight.movedim(-1, 1), bias, padding=1, groups=9) * active(x)
    torch.testing.assert_close(subm_conv(x, weight, bias, groups=9).dense(), dense)
    strided = functional.conv2d(x.dense(), weight.movedim(-1, 1), padding=1, stride=2, groups=9)
    torch.testing.assert_close(sparse_conv(x, weight, stride=2, padding=1, groups=9).dense(), strided)


@needs_native
def test_any_number_of_threads_gives_the_same() -> None:
    x = random_sites((12, 12, 12), 24, 0.3, dtype=torch.float32)
    weight, deep = torch.randn(20, 3, 3, 3, 24), torch.randn(24, 3, 3, 3, 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own = SparseConvTensor(x.features.clone().requires_grad_(), x.indices.clone(), (12, 12, 12), 2)
            w, d = weight.clone().requires_grad_(), deep.clone().requires_grad_()
            with ops.backend("native"):
                y = subm_conv(sparse_max_pool(subm_conv(own, d, groups=24), 2), w)
                y.features.square().sum().backward()
            results.append((y.features.detach(), own.features.grad, w.grad, d.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_nan_and_infinity_stay_where_they_belong(backend: str) -> None:
    features = torch.tensor([[float("nan")], [1.0], [float("inf")]])
    x = SparseConvTensor(features, sites([0, 0], [0, 1], [0, 9]), (10,), 1)
    y = subm_conv(x, torch.ones(2, 3, 1)).features
    assert y[:2].isnan().all() and (y[2] == float("inf")).all()
    assert sparse_max_pool(x, 2).features[0].isnan()


@pytest.mark.parametrize("number", [0, 1])
def test_no_sites_and_one(backend: str, number: int) -> None:
    x = SparseConvTensor(torch.ones(number, 4), torch.zeros(number, 3, dtype=torch.int32), (5, 5), 1)
    weight = torch.ones(6, 3, 3, 4, requires_grad=True)
    y = subm_conv(x, weight)
    assert y.features.shape == (number, 6) and (y.features == 4).all()
    down = sparse_conv(x, weight, stride=2, padding=1)
    assert down.features.shape == (number, 6)
    back = inverse_conv(down, torch.ones(4, 3, 3, 6), fine=x, stride=2, padding=1)
    assert back.features.shape == (number, 4)
    (y.features.sum() + sparse_max_pool(x, 2).features.sum()).backward()
    assert weight.grad.shape == weight.shape


def test_rulebooks_are_shared_and_freed_with_the_sites() -> None:
    gc.collect()
    x = random_sites((6, 6), 2, 0.5)
    first = submanifold_rulebook(x.indices, (6, 6), 2, 3)
    assert submanifold_rulebook(x.indices, [6, 6], 2, (3, 3)).forward is first.forward
    assert submanifold_rulebook(x.indices, (6, 6), 2, 3, 2).forward is not first.forward
    x.indices[:2] = x.indices[:2].flip(0)  # in another order: no longer the sites that were checked
    assert submanifold_rulebook(x.indices, (6, 6), 2, 3).forward is not first.forward
    del x, first
    gc.collect()
    other = random_sites((3, 3), 2, 0.5)
    submanifold_rulebook(other.indices, (3, 3), 2, 3)
    held = len(_made)
    conv_rulebook(other.indices, (3, 3), 2, 3)
    assert len(_made) == held + 1


def test_rulebooks_of_dead_sites_are_freed() -> None:
    made, kept = [], random_sites((4, 4), 2, 0.5).indices
    submanifold_rulebook(kept, (4, 4), 2, 3)
    for _ in range(20):
        x = random_sites((6, 6), 2, 0.5)
        view = x.indices[:]  # shares its memory, and dies first
        reduced = conv_rulebook(x.indices, (6, 6), 2, 3, 2, 1)
        books = [
            submanifold_rulebook(x.indices, (6, 6), 2, 3),
            submanifold_rulebook(view, (6, 6), 2, 3),
            submanifold_rulebook(reduced.indices, (3, 3), 2, 3),
            conv_rulebook_onto(x.indices, (6, 6), 2, reduced.indices.clone(), 3, 2, 1),
            reduced,
        ]
        made += [weakref.ref(book.forward.source) for book in books]
        del view, reduced, books
    del x
    submanifold_rulebook(kept.clone(), (4, 4), 2, 3)
    submanifold_rulebook(kept.clone(), (4, 4), 2, 3)  # the sites that the rulebooks freed before had made
    assert not any(reference() is not None for reference in made)
    held = len(_made)
    submanifold_rulebook(kept, (4, 4), 2, 3)
    assert len(_made) == held


def test_foreign_tensors_come_back_in_their_type() -> None:
    """spconv's class has the same four attributes and constructor."""

    class Foreign(SimpleNamespace):
        def __init__(self, features, indices, spatial_shape, batch_size):
            super().__init__(
                features=features, indices=indices, spatial_shape=spatial_shape, batch_size=batch_size
            )

    own = random_sites((6, 6), 3, 0.5, dtype=torch.float32)
    x = Foreign(own.features, own.indices, [6, 6], 2)
    weight = torch.randn(4, 3, 3, 3)
    assert isinstance(subm_conv(x, weight), Foreign)
    down = sparse_conv(x, weight, stride=2, padding=1)
    assert isinstance(down, Foreign) and down.spatial_shape == [3, 3]
    back = inverse_conv(down, torch.randn(3, 3, 3, 4), fine=x, stride=2, padding=1)
    assert isinstance(back, Foreign) and back.indices is x.indices


def test_sites_and_features_in_any_layout(backend: str) -> None:
    x = random_sites((5, 6), 4, 0.5)
    weight = torch.randn(3, 3, 3, 4, dtype=torch.float64)
    turned = SparseConvTensor(
        x.features.T.contiguous().T, x.indices.T.contiguous().T, x.spatial_shape, x.batch_size
    )
    strange = weight.movedim(-1, 1).contiguous().movedim(1, -1)
    assert torch.equal(subm_conv(turned, strange).features, subm_conv(x, weight).features)
    down, expected = (sparse_conv(each, weight, stride=2, padding=1) for each in (turned, x))
    assert torch.equal(down.indices, expected.indices) and torch.equal(down.features, expected.features)


def test_from_dense_and_back() -> None:
    grid = torch.randn(2, 3, 4, 5) * (torch.rand(2, 1, 4, 5) < 0.5)
    x = SparseConvTensor.from_dense(grid)
    assert torch.equal(x.dense(), grid) and x.dense(channels_first=False).shape == (2, 4, 5, 3)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    "indices, message",
    [
        (sites([0, 0, 0], [0, 4, 0]), "site 1 lies at \\[0, 4, 0\\], outside"),
        (sites([0, 0, 0], [1, 0, 0]), "site 1 lies at \\[1, 0, 0\\], outside"),
        (sites([0, 0, -1], [0, 0, 0]), "site 0 lies at"),
        (sites([0, 1, 1], [0, 2, 2], [0, 1, 1]), "sites 0 and 2 are both at \\[0, 1, 1\\]"),
        (sites([0, 1, 1]).long(), "must be int32"),
        (sites([0, 1]), "\\[sites, 1 \\+ 2\\]"),
    ],
)
def test_bad_sites_are_refused(native: bool, indices: Tensor, message: str, monkeypatch) -> None:
    if native and not _native.available():
        pytest.skip("no native library on this machine")
    if not native:
        monkeypatch.setattr(_native, "available", lambda: False)
    features = torch.ones(len(indices), 2)
    x = SimpleNamespace(features=features, indices=indices, spatial_shape=[4, 4], batch_size=1)
    with pytest.raises(OpError, match=message):
        inspect.unwrap(subm_conv)(x, torch.ones(3, 3, 3, 2))


@pytest.mark.parametrize(
    "weight, options, message",
    [
        (torch.ones(3, 3, 3, 5), {}, "weight must be"),
        (torch.ones(3, 3, 2), {}, "weight must be"),
        (torch.ones(3, 3, 3, 2, dtype=torch.float64), {}, "weight is torch.float64"),
        (torch.ones(3, 2, 3, 2), {}, "odd kernel"),
        (torch.ones(3, 3, 3, 2), {"bias": torch.ones(2)}, "bias must be \\[3\\]"),
        (torch.ones(2, 3, 3, 1), {"groups": 3}, "groups must be 1 or"),
        (torch.ones(3, 3, 3, 2), {"dilation": 0}, "dilation must be 2 integers"),
    ],
)
def test_bad_weights_are_refused(weight: Tensor, options: dict, message: str) -> None:
    x = random_sites((4, 4), 2, 0.5, dtype=torch.float32)
    with pytest.raises(OpError, match=message):
        inspect.unwrap(subm_conv)(x, weight, **options)


def test_pair_lists_are_looked_at_again_after_a_change() -> None:
    x, weight = random_sites((4, 4), 2, 0.5, dtype=torch.float32), torch.ones(3, 3, 3, 2)
    rulebook = submanifold_rulebook(x.indices, (4, 4), 2, 3)
    for name, change, message in (
        ("source", lambda part: part[0].fill_(99), "pair lists name sites"),
        ("target", lambda part: part[-1].fill_(-1), "pair lists name sites"),
        ("start", lambda part: part[1].fill_(9999), "never fall"),
    ):
        part = getattr(rulebook.forward, name)
        intact = part.clone()
        y = subm_conv(x, weight, rulebook=rulebook).features
        change(part)
        with pytest.raises(OpError, match=message):
            subm_conv(x, weight, rulebook=rulebook)
        part.copy_(intact)
        assert torch.equal(subm_conv(x, weight, rulebook=rulebook).features, y)


def test_other_misuse_is_refused() -> None:
    x = random_sites((4, 4), 2, 0.5, dtype=torch.float32)
    weight = torch.ones(3, 3, 3, 2)
    with pytest.raises(OpError, match="does not fit"):
        sparse_conv(x, torch.ones(3, 5, 5, 2))
    with pytest.raises(OpError, match="not the .* output sites"):
        inverse_conv(x, torch.ones(3, 3, 3, 2), fine=x, stride=2, padding=1)
    with pytest.raises(OpError, match="the rulebook is for"):
        subm_conv(x, weight, rulebook=submanifold_rulebook(x.indices[:3], (4, 4), 2, 3))
    pairs = submanifold_rulebook(x.indices, (4, 4), 2, 3).forward
    lists = (pairs.source + 100, pairs.target, pairs.start, pairs.targets, pairs.tile)
    flat = weight.flatten(1, 2)
    with pytest.raises(OpError, match="pair lists name sites"):
        torch.ops.zoo.sparse_conv(x.features, flat, None, *lists, *pairs[:3], pairs.tile, True)


def test_operator_registrations() -> None:
    x = random_sites((4, 5), 3, 0.5, dtype=torch.float32)
    features = x.features.requires_grad_()
    book = conv_rulebook(x.indices, (4, 5), 2, 3, 2, 1)
    there, back = book.forward, book.backward
    lists = (there.source, there.target, there.start, there.targets, there.tile, *back[:3], back.tile)
    weight, deep = torch.randn(4, 9, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for op, args in [
        (torch.ops.zoo.sparse_conv.default, (features, weight, torch.randn(4), *lists, False)),
        (torch.ops.zoo.sparse_depthwise.default, (features, deep, None, *lists, False)),
        (torch.ops.zoo.sparse_max_pool.default, (features, 9, *lists)),
    ]:
        torch.library.opcheck(op, args, test_utils=tests)
