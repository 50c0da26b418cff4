"""Norm, rotation and attention of one token: the kernels against the definition, by hand, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.one_token import attend, normalise, rotate

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    with ops.backend(backend):
        x = torch.tensor([3.0, -1.0, 2.0, 0.0])  # mean square 3.5
        found = normalise(x, torch.tensor([1.0, 2.0, 1.0, 1.0]), 0.5)
        torch.testing.assert_close(found, torch.tensor([1.5, -1.0, 1.0, 0.0]))
        quarter = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
        q, k = rotate(torch.tensor([1.0, 2.0, 5.0, 7.0]), torch.tensor([3.0, 4.0]), *quarter)
        assert q.tolist() == [-2.0, 1.0, -7.0, 5.0] and k.tolist() == [-4.0, 3.0]
        keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        values = torch.tensor([[[8.0, 0.0], [0.0, 4.0]]])
        found = attend(torch.tensor([2 * math.log(3), 0.0, 0.0, 0.0]), keys, values, 0.5)
        torch.testing.assert_close(found, torch.tensor([6.0, 1.0, 4.0, 2.0]))  # shares 3:1 and 1:1


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernels_are_the_definition(dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for heads, kv_heads, head, count in (
            (1, 1, 2, 1),
            (4, 2, 6, 3),
            (6, 2, 26, 17),
            (8, 8, 32, 64),
            (32, 8, 64, 200),
        ):
            q = torch.randn(heads * head, generator=generator).to(dtype)
            k = torch.randn(kv_heads * head, generator=generator).to(dtype)
            scale = torch.rand(heads * head, generator=generator).to(dtype)
            angle = 3 * torch.rand(head // 2, generator=generator).repeat(2)
            turn = angle.cos().to(dtype), angle.sin().to(dtype)
            # As transformers' caches have them: a view whose tokens lie apart.
            cache = torch.randn(2, count, kv_heads, head, generator=generator).to(dtype).transpose(1, 2)
            results = []
            for backend in ("reference", "native"):
                with ops.backend(backend):
                    results.append([normalise(q, scale, 1e-5), *rotate(q, k, *turn), attend(q, *cache, 0.2)])
            assert all(each.dtype == dtype for each in results[1])
            close = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(results[1], results[0], **close)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_seen(backend: str, value: float) -> None:
    with ops.backend(backend):
        x = torch.tensor([1.0, value, 2.0, 3.0])
        assert normalise(x, torch.ones(4), 1e-5)[1].isnan()
        turned, other = rotate(x, torch.ones(2), torch.full((2,), 0.5), torch.full((2,), 0.5))
        assert not turned[:2].isfinite().any() and turned[2:].isfinite().all() and other.isfinite().all()
        keys, values = torch.ones(1, 2, 2), torch.ones(1, 2, 2)
        found = attend(torch.tensor([value, 1.0, 1.0, 1.0]), keys, values, 1.0)
        assert found[:2].isnan().all() and found[2:].isfinite().all()
        values[0, 1, 0] = value
        assert not attend(torch.ones(2), keys, values, 1.0)[0].isfinite()


@pytest.mark.traced
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused(backend: str) -> None:
    x, pair = torch.ones(4), torch.ones(2)
    cache = torch.ones(2, 1, 3, 2)
    with ops.backend(backend):
        for call, text in (
            (lambda: normalise(x, pair, 1e-5), r"must be \[2\]"),
            (lambda: normalise(x.double(), x.double(), 1e-5), "float64"),
            (lambda: normalise(x.view(1, 4), x, 1e-5), "vector"),
            (lambda: rotate(x, x, torch.ones(3), torch.ones(3)), "even length"),
            (lambda: rotate(x, x, pair, x), "even length"),
            (lambda: rotate(torch.ones(5), x, pair, pair), "5 queries"),
            (lambda: attend(torch.ones(5), *cache, 1.0), r"q \[5\]"),
            (lambda: attend(x, cache[0], cache[1, :, :2], 1.0), "both the same"),
            (lambda: attend(x, cache[0], cache[1].half(), 1.0), "float16"),
            (lambda: attend(x, cache[0, :, :0], cache[1, :, :0], 1.0), "does not divide"),
        ):
            with pytest.raises(OpError, match=text):
                call()
