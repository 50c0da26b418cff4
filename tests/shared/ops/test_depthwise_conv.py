"""depthwise_conv against torch's convolution: sizes, strides, threads, refusals; packed networks."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.masks import MaskSet
from zoo.shared.ops import DepthwiseConv, SparseConv1x1, _native, depthwise_conv, packing
from zoo.shared.ops.modules import MaxPool

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")


@needs_native
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(4, 40),
    st.integers(4, 40),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_it_is_the_grouped_convolution(
    batch, channels, height, width, size, stride, padding, with_bias, relu, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(channels, 1, size, size, generator=generator)
    bias = torch.randn(channels, generator=generator) if with_bias else None
    if min(height, width) + 2 * padding < size:
        with pytest.raises(OpError, match="does not fit into a map"):
            depthwise_conv(x, weight, bias, stride=stride, padding=padding)
        return
    with ops.backend("native"):
        y = depthwise_conv(x, weight, bias, stride=stride, padding=padding, relu=relu)
    wide = None if bias is None else bias.double()
    expected = functional.conv2d(x.double(), weight.double(), wide, stride, padding, groups=channels)
    torch.testing.assert_close(y.double(), expected.relu() if relu else expected, atol=2e-5, rtol=1e-5)


@needs_native
def test_not_a_number_stays_and_threads_do_not_matter() -> None:
    x, weight = torch.randn(2, 30, 49, 61), torch.randn(30, 1, 3, 3)  # work enough for several threads
    x[0, 1, 4, 5], x[1, 2, 0, 0] = torch.nan, torch.inf
    with ops.backend("native"):
        one = depthwise_conv(x, weight, padding=1, relu=True)
        torch.set_num_threads(2)
        two = depthwise_conv(x, weight, padding=1, relu=True)
        torch.set_num_threads(1)
    assert torch.equal(one.isnan(), functional.conv2d(x, weight, padding=1, groups=30).isnan())
    assert one[0, 1].isnan().sum() == 9 and torch.equal(one.nan_to_num(), two.nan_to_num())


def test_gradients_and_other_layouts_are_torchs() -> None:
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(3, 1, 3, 3, requires_grad=True)
    grads = torch.autograd.grad(depthwise_conv(x, weight, stride=2, relu=True).sum(), (x, weight))
    expected = torch.autograd.grad(functional.conv2d(x, weight, stride=2, groups=3).relu().sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    last = x.detach().to(memory_format=torch.channels_last)
    assert ops.explain(depthwise_conv, last, weight).backend == "reference"
    assert ops.explain(depthwise_conv, x.double(), weight).backend == "reference"
    assert depthwise_conv(x.detach()[:0], weight.detach(), padding=1).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("x", "weight", "options", "message"),
    [
        ((1, 2, 8, 8), (2, 2, 3, 3), {}, r"\[channels, 1, size, size\]"),
        ((1, 2, 8, 8), (2, 1, 3, 5), {}, r"\[channels, 1, size, size\]"),
        ((1, 3, 8, 8), (2, 1, 3, 3), {}, r"is not \[batch, 2"),
        ((1, 2, 8, 8), (2, 1, 3, 3), {"stride": 0}, "stride must be positive"),
        ((1, 2, 8, 8), (2, 1, 3, 3), {"bias": torch.ones(3)}, r"bias must be \[2\]"),
    ],
)
@pytest.mark.traced
def test_refusals(x, weight, options, message) -> None:
    with pytest.raises(OpError, match=message):
        depthwise_conv(torch.ones(x), torch.ones(weight), **options)


def separable(channels: int = 8) -> nn.Sequential:
    def layers(inputs: int, outputs: int, size: int, groups: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, size, 1, size // 2, groups=groups, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    torch.manual_seed(0)
    net = nn.Sequential(
        *layers(3, channels, 3, 1), *layers(channels, channels, 3, channels), *layers(channels, 16, 1, 1)
    )
    for _ in range(3):
        net(torch.randn(4, 3, 12, 12))
    return net.eval()


def test_packing_folds_norms_and_takes_relus() -> None:
    net = separable()
    masks = MaskSet({"6.weight": torch.rand(16, 8, 1, 1) < 0.3})
    masks.apply_(net)
    x = torch.randn(2, 3, 12, 12)
    expected = net(x)
    packed = packing.pack(copy.deepcopy(net), masks).requires_grad_(False)
    kinds = [type(module) for module in packed]
    identity = nn.Identity
    assert kinds == [
        nn.Conv2d,
        identity,
        nn.ReLU,
        DepthwiseConv,
        identity,
        identity,
        SparseConv1x1,
        identity,
        identity,
    ]
    assert packed[3].relu and packed[6].relu
    torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=1e-5)
    for name in ("reference", "dense"):
        with ops.backend(name):
            torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=1e-5)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(packed(last), expected, atol=1e-5, rtol=1e-5)


def test_packing_leaves_norms_that_train_or_are_masked() -> None:
    net, masks = separable(), MaskSet({"6.weight": torch.rand(16, 8, 1, 1) < 0.3})
    masks.apply_(net)
    training = packing.pack(copy.deepcopy(net).train(), masks)
    assert isinstance(training[7], nn.BatchNorm2d) and isinstance(training[8], nn.ReLU)
    masked = MaskSet({**masks, "7.weight": torch.arange(16) < 12})
    masked.apply_(net)
    packed = packing.pack(copy.deepcopy(net), masked)
    assert isinstance(packed[7], nn.BatchNorm2d) and type(packed[4]) is nn.Identity
    x = torch.randn(1, 3, 12, 12)
    torch.testing.assert_close(packed(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [1, 2, 3, (3, 2), 5])
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("padding", [0, 1, (1, 0), 2])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_maxima_are_torchs(kernel, stride, padding, ceil_mode) -> None:
    pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)
    for size in ((2, 3, 9, 11), (1, 2, 12, 8), (1, 1, 5, 6)):
        x = torch.randn(size)
        x[0, 0, 2, 3] = torch.nan
        try:
            wanted = pool(x)
        except RuntimeError:
            with pytest.raises((RuntimeError, OpError)):
                MaxPool(pool)(x)
            continue
        found = MaxPool(pool)(x)
        assert found.is_contiguous() and torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
        last = MaxPool(pool)(x.to(memory_format=torch.channels_last))
        assert torch.equal(last.nan_to_num(), wanted.nan_to_num())
