"""separable_conv against the three convolutions it stands for: bits, threads, refusals; packed blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.masks import MaskSet
from zoo.shared.ops import DepthwiseConv, SparseConv1x1, _native, packing, separable_conv
from zoo.shared.ops.separable_conv import Depthwise, Pointwise, reference
from zoo.shared.ops.weights import pack

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")


def block(
    inputs: int, hidden: int, outputs: int, layout: str = "csr", *, expands: bool = True, **form: int
) -> tuple[Pointwise | None, Depthwise, Pointwise]:
    size = form.pop("size", 3)

    def pointwise(rows: int, cols: int, relu: int) -> Pointwise:
        kept = torch.rand(rows, cols) < 0.4
        kept[0, 0] = True
        return Pointwise(pack(torch.randn(rows, cols), kept, layout), torch.randn(rows), relu)

    first = pointwise(hidden, inputs, 6) if expands else None
    channels = hidden if expands else inputs
    between = Depthwise(torch.randn(channels, 1, size, size), torch.randn(channels), relu=6, **form)
    return first, between, pointwise(outputs, channels, 0)


@needs_native
@given(
    st.integers(1, 3),
    st.sampled_from([3, 16, 200]),
    st.sampled_from([5, 24, 200]),
    st.integers(4, 40),
    st.integers(4, 40),
    st.sampled_from([(3, 1, 1), (3, 2, 1), (3, 1, 0), (5, 2, 2), (1, 3, 0)]),
    st.sampled_from(["csr", "bitmask", "rows4"]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.integers(0, 99),
)
def test_its_bits_are_those_of_the_three(
    batch, inputs, hidden, height, width, form, layout, threads, expands, seed
) -> None:
    torch.manual_seed(seed)
    size, stride, padding = form
    three = block(inputs, hidden, 9, layout, expands=expands, size=size, stride=stride, padding=padding)
    x = torch.randn(batch, inputs, height, width)
    if min(height, width) + 2 * padding < size:
        with pytest.raises(OpError, match="does not fit into a map"):
            separable_conv(x, *three)
        return
    residual = torch.randn(batch, 9, *three[1].sizes(x)) if seed % 2 else None
    torch.set_num_threads(threads)
    try:
        with ops.backend("native"):
            found, wanted = separable_conv(x, *three, residual), reference(x, *three, residual)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found, wanted)


@needs_native
@pytest.mark.parametrize("layout", ["csr", "rows4"])
def test_wide_maps_are_cut_into_bands_and_few_bands_are_shared(layout: str) -> None:
    for side, inputs, hidden in ((61, 12, 150), (20, 12, 200)):  # many bands, and one for two threads
        three, x = block(inputs, hidden, 20, layout, padding=1), torch.randn(1, inputs, side, side)
        x[0, 1, 3, 4], x[0, 2, 5, 5] = torch.nan, torch.inf
        with ops.backend("native"):
            wanted = reference(x, *three)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found = separable_conv(x, *three)
                torch.set_num_threads(1)
                assert torch.equal(found.isnan(), wanted.isnan())
                assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@needs_native
def test_it_is_planned_as_its_parts_are() -> None:
    three, x = block(16, 64, 24, padding=1), torch.randn(1, 16, 28, 28)
    assert ops.explain(separable_conv, x, *three).backend == "native"
    assert ops.explain(separable_conv, x[..., :3, :3].contiguous(), *three).backend == "reference"  # 9 pixels
    assert ops.explain(separable_conv, x.double(), *three).backend == "reference"
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(separable_conv(last, *three), separable_conv(x, *three), atol=1e-4, rtol=1e-4)


def test_values_that_change_are_read_again_and_gradients_pass() -> None:
    three, x = block(6, 12, 5, padding=1), torch.randn(1, 6, 9, 9)
    before = separable_conv(x, *three)
    three[2].weight.values.mul_(2.0)
    three[2].bias.mul_(2.0)
    torch.testing.assert_close(separable_conv(x, *three), 2 * before, atol=1e-4, rtol=1e-4)
    x.requires_grad_()
    (found,) = torch.autograd.grad(separable_conv(x, *three).sum(), x)
    with ops.backend("reference"):
        (wanted,) = torch.autograd.grad(reference(x, *three).sum(), x)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@needs_native
def test_a_damaged_index_is_refused() -> None:
    three, x = block(6, 12, 5, padding=1), torch.randn(1, 6, 9, 9)
    separable_conv(x, *three)
    for part in (three[0], three[2]):
        held = part.weight.index.clone()
        part.weight.index[0] = 4000
        with pytest.raises(OpError):
            separable_conv(x, *three)
        part.weight.index.copy_(held)
    with pytest.raises(OpError, match="residual must be"):
        separable_conv(x, *three, torch.ones(1, 5, 8, 9))


class Residual(nn.Module):
    """An inverted residual block as MobileNet-v2 has it."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.deepen = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Conv2d(hidden, channels, 1)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.act(self.deepen(self.act(self.expand(x)))))


def packed_block() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(Residual(8, 24), Residual(8, 24)).eval()
    names = [f"{i}.{name}.weight" for i in (0, 1) for name in ("expand", "project")]
    masks = MaskSet({name: torch.rand(net.get_parameter(name).shape) < 0.3 for name in names})
    masks.apply_(net)
    packed = packing.pack(copy.deepcopy(net), masks).requires_grad_(False)
    return net.requires_grad_(False), packed, torch.randn(2, 8, 12, 12)


def test_packing_joins_the_three_and_hooks_still_see_their_parts() -> None:
    net, packed, x = packed_block()
    last = packed[0].project
    assert isinstance(last, SparseConv1x1) and last.before == (packed[0].expand, packed[0].deepen)
    torch.testing.assert_close(packed(x), net(x), atol=1e-4, rtol=1e-4)
    again = copy.deepcopy(packed)
    assert again[0].project.before == (again[0].expand, again[0].deepen)
    seen: list[type[nn.Module]] = []
    for name in ("expand", "deepen"):
        again[0].get_submodule(name).register_forward_hook(lambda module, *_: seen.append(type(module)))
    torch.testing.assert_close(again(x), packed(x), atol=1e-5, rtol=1e-5)
    assert seen == [SparseConv1x1, DepthwiseConv]
    state = packed.state_dict()
    assert not any("before" in name for name in state)
    with torch.no_grad():
        packed[0].expand.values.zero_()
        packed[0].expand.bias.zero_()
    assert not torch.allclose(packed(x), net(x), atol=1e-2)


def test_what_others_read_is_not_joined() -> None:
    class Read(Residual):
        def forward(self, x: Tensor) -> Tensor:
            wide = self.act(self.deepen(self.act(self.expand(x))))
            return self.project(wide).mean() + wide.mean()

    net = Read(8, 24).eval()
    masks = MaskSet(
        {
            f"{name}.weight": torch.rand(net.get_submodule(name).weight.shape) < 0.3
            for name in ("expand", "project")
        }
    )
    masks.apply_(net)
    packed, x = packing.pack(copy.deepcopy(net), masks).requires_grad_(False), torch.randn(1, 8, 9, 9)
    assert packed.project.before is None
    torch.testing.assert_close(packed(x), net(x), atol=1e-4, rtol=1e-4)
