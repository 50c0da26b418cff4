"""Dense products by other ways than torch's: the same values, shapes, gradients; layers that take them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from zoo.shared.errors import OpError
from zoo.shared.masks import MaskSet
from zoo.shared.ops import _native, dense_linear, packing
from zoo.shared.ops.dense_linear import WIDENED, linear, multiplies, product, row_linear, widened_linear
from zoo.shared.ops.dispatch import backend
from zoo.shared.ops.modules import WideningLinear
from zoo.shared.ops.sparse_linear import pack, reference, sparse_linear

HALVES = (torch.float16, torch.bfloat16)
needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")


@pytest.fixture(params=[True, False], ids=["halves", "no halves"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor multiplies halves."""
    known = lambda dtype: request.param or dtype not in HALVES  # noqa: E731
    monkeypatch.setattr(dense_linear, "multiplies", known)
    monkeypatch.setattr(packing, "multiplies", known)
    return bool(request.param)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("lead", [(), (0,), (1,), (WIDENED - 1,), (WIDENED,), (3, 7)])
def test_products_are_those_of_single_precision_rounded_once(
    dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*lead, 20).to(dtype),
        torch.randn(30, 20).to(dtype),
        torch.randn(30).to(dtype),
    )
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for given in (bias, None):
        expected = nn.functional.linear(x.float(), weight.float(), None if given is None else given.float())
        found = widened_linear(x, weight, given)
        assert found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(found, expected.to(dtype), **close)
        torch.testing.assert_close(linear(x, weight, given), expected.to(dtype), **close)
    torch.testing.assert_close(product(x, weight.t().contiguous()), expected.to(dtype), **close)


def test_a_processor_without_halves_multiplies_in_single_precision(processor: bool) -> None:
    """2048 + 1 is 2048 in fp16, and so is a sum that is rounded after each step; 2048 + 4 * 0.5 is 2050."""
    x = torch.full((WIDENED, 5), 0.5, dtype=torch.float16)
    x[:, 0] = 2048
    seen: list[torch.dtype] = []
    plain = nn.functional.linear

    def watched(x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        seen.append(x.dtype)
        return plain(x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", watched)
        y = widened_linear(x, torch.ones(2, 5, dtype=torch.float16))
    assert seen == ([torch.float16] if processor else [])
    assert processor or torch.equal(y, torch.full((WIDENED, 2), 2050.0, dtype=torch.float16))


@pytest.mark.parametrize("rows", [2, 3, 40, 128])
def test_prepacked_weights_multiply_as_they_are(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_linear, "PREPACKED", 1)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(37, 53), torch.randn(37), torch.randn(rows, 53)
    for given in (x, x.view(1, rows, 53), torch.randn(53, rows).t()):
        assert dense_linear.prepacks(rows, weight.shape, x.dtype, x.device)
        y = dense_linear.dense_product(given, dense_linear.prepack(weight), bias)
        torch.testing.assert_close(y, nn.functional.linear(given, weight, bias))
        torch.testing.assert_close(dense_linear.fastest_product(given, weight)(), given @ weight.t())
    packed = pack(weight, torch.rand(37, 53) < 0.5)
    x[0, 0] = torch.inf  # meets the kept weights only
    with backend("dense"):
        found = sparse_linear(x, packed, bias)
    torch.testing.assert_close(found, reference(x, packed, bias), equal_nan=True)
    packed.values.data.mul_(2)  # and the copy is made again
    x[0, 0] = 1.0
    with backend("dense"):
        torch.testing.assert_close(sparse_linear(x, packed, bias), reference(x, packed, bias))


@pytest.mark.parametrize(
    "rows,shape,dtype,expected",
    [
        (8, (1024, 1024), torch.float32, True),
        (1, (1024, 1024), torch.float32, False),
        (129, (1024, 1024), torch.float32, False),
        (8, (1024, 1023), torch.float32, False),
        (8, (1024, 1024), torch.bfloat16, False),
    ],
)
def test_which_weights_are_prepacked(rows, shape, dtype, expected) -> None:
    assert dense_linear.prepacks(rows, shape, dtype, torch.device("cpu")) == expected
    assert not dense_linear.prepacks(rows, shape, dtype, torch.device("cuda"))


def test_gradients(processor: bool) -> None:
    x = torch.randn(WIDENED, 6).half().requires_grad_()
    weight, bias = torch.randn(3, 6).half().requires_grad_(), torch.randn(3).half().requires_grad_()
    widened_linear(x, weight, bias).sum().backward()
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand_as(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(bias.grad, torch.full((3,), float(WIDENED)).half())


def test_packed_models_of_halves_widen_the_layers_that_stay(processor: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)).half().eval()
    model[2].weight = model[0].weight
    x = torch.arange(18).reshape(2, 9) % 9
    packed = packing.pack(copy.deepcopy(model), MaskSet({}))
    assert [type(layer) for layer in packed[1:]] == [nn.Linear if processor else WideningLinear] * 2
    assert packed[2].weight is packed[0].weight and list(packed.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(packed(x), model(x), rtol=1e-2, atol=1e-2)
    alone = packing.pack(nn.Linear(3, 3).half(), MaskSet({}))
    assert type(alone) is (nn.Linear if processor else WideningLinear)
    single = packing.pack(nn.Sequential(nn.Linear(3, 3)), MaskSet({}))
    assert type(single[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_widening_layer_leaves_autocast_and_errors_to_torch() -> None:
    layer = WideningLinear(nn.Linear(4, 5).half())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(32, 4)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(32, 3).half())
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(32, 4))
    with pytest.raises(OpError, match="not a plain nn.Linear"):
        WideningLinear(layer)
    assert multiplies(torch.float32)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_row_by_the_native_kernel(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, cols in ((1, 1), (3, 7), (4, 16), (9, 33), (130, 200), (64, 0), (0, 5), (700, 512)):
        weight, x, bias = (torch.randn(*size).to(dtype) for size in ((rows, cols), (cols,), (rows,)))
        for added in (None, bias):
            expected = torch.nn.functional.linear(x.double(), weight.double())
            expected = expected if added is None else expected + added.double()
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(row_linear(x, weight, added))
            torch.set_num_threads(1)
            assert torch.equal(*results) and results[0].dtype == dtype
            torch.testing.assert_close(results[0], expected.to(dtype), rtol=1e-2, atol=1e-2)
    weight, x = torch.ones(5, 20, dtype=dtype), torch.ones(20, dtype=dtype)
    weight[1, 3], weight[2, 17], x[0] = math.inf, math.nan, -0.0
    found = row_linear(x, weight)
    assert found[1] == math.inf and found[2].isnan() and found[0] == found[4] == 19


@needs_native
def test_one_row_of_halves_takes_the_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other: more rows, gradients, autocast, fp32, rows that do not lie one after another."""
    calls: list[int] = []
    monkeypatch.setattr(dense_linear, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(
        dense_linear, "row_linear", lambda x, weight, bias: calls.append(1) or weight @ x + (bias or 0)
    )
    weight, x = torch.randn(6, 8).half(), torch.randn(1, 1, 8).half()
    layer = WideningLinear(torch.nn.Linear(8, 6, bias=False).half().requires_grad_(False))
    torch.testing.assert_close(widened_linear(x, weight), torch.nn.functional.linear(x, weight))
    layer(x)
    assert len(calls) == 2 and layer(x).shape == (1, 1, 6)
    calls.clear()
    widened_linear(torch.cat([x, x]), weight)
    widened_linear(x.float(), weight.float())
    widened_linear(x, torch.randn(8, 6).half().t())
    widened_linear(x, weight.clone().requires_grad_(True))
    with torch.autocast("cpu", torch.bfloat16):
        widened_linear(x, weight)
    with backend("reference"):
        widened_linear(x, weight)
    assert not calls


@pytest.mark.traced
def test_what_does_not_fit_one_row_is_refused() -> None:
    weight, x = torch.randn(4, 3), torch.randn(3)
    for wrong, text in (
        ((torch.randn(4), weight), r"x must be \[3\]"),
        ((x, weight, torch.randn(3)), r"a bias \[4\]"),
        ((x.half(), weight), "float16"),
        ((x.double(), weight.double()), "float64"),
        ((torch.randn(4), torch.randn(3, 4).t().contiguous().t()), "contiguous"),
    ):
        with pytest.raises(OpError, match=text):
            row_linear(*wrong)
