"""quant_panel_linear: panels of four-bit groups against rows of them; x in eight bits; threads; damage;
refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import QuantPanels, _native, quant_panel_linear, quantise_groups
from zoo.shared.ops.quant_panel_linear import round_units

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")
SHAPES = [(9, 96), (1, 288), (256, 192), (300, 192), (513, 96), (0, 96)]


def example(rows: int = 300, cols: int = 192, group: int = 16, density: float = 0.5) -> QuantPanels:
    keep = torch.rand(rows, cols // group) < density
    return QuantPanels.of(quantise_groups(torch.randn(rows, cols), keep, group))


def test_units_are_rounded_to_eight_bits() -> None:
    x = torch.zeros(2, 32)
    x[0, :4] = torch.tensor([127.0, 1.5, 2.5, -0.4])
    x[0, 16:20] = torch.tensor([-25.4, 0.1, 0.31, 12.64])
    x[1, 0] = 2e-38
    expected = torch.zeros(2, 32)
    expected[0, :4] = torch.tensor([127.0, 2, 2, 0])
    expected[0, 16:20] = torch.tensor([-25.4, 0, 0.4, 12.6])
    expected[1, 0] = 2e-38  # too small for a step
    torch.testing.assert_close(round_units(x, 16), expected, rtol=0, atol=2e-6)
    assert round_units(x, 32)[0, 16:20].tolist() == [-25, 0, 0, 13]
    x[0, 2], x[0, 20] = float("inf"), float("nan")
    assert torch.equal(round_units(x, 16).nan_to_num(7.0), x.nan_to_num(7.0))
    assert round_units(torch.zeros(0, 32), 16).shape == (0, 32)


def test_where_things_stand_by_hand() -> None:
    """Rows 0 and 2 keep the second group of 16, row 1 the first: one block for each column of groups."""
    weight = torch.zeros(3, 32)
    weight[0, 16:] = torch.arange(16.0)
    weight[1, :16] = 15 - torch.arange(16.0)
    weight[2, 16:] = torch.arange(16.0) - 5
    keep = torch.tensor([[False, True], [True, False], [False, True]])
    panels = QuantPanels.of(quantise_groups(weight, keep))
    assert panels.masks[0, :, 0].tolist() == [0b010, 0b101] and int(panels.masks[0, :, 1:].sum()) == 0
    assert panels.pointer.tolist() == [0, 2] and panels.codes.shape == (2, 2, 8, 4)
    # Byte k of piece i: code 8 i + k in the lower half, 8 i + 4 + k in the upper one.
    assert panels.codes[1, 0, 0].tolist() == [k + 16 * (4 + k) for k in range(4)]
    assert panels.codes[1, 1, 1].tolist() == [8 + k + 16 * (12 + k) for k in range(4)]
    assert panels.codes[0, 0, 0].tolist() == [15 - k + 16 * (11 - k) for k in range(4)]
    assert panels.zeros[:, 0].tolist() == [0, 5 << 4] and panels.scales[1, :2].tolist() == [1, 1]
    for backend in ("reference", "native") if _native.available() else ("reference",):
        with ops.backend(backend):
            y = quant_panel_linear(torch.ones(32), panels, torch.tensor([0.0, 0, 1]))
        torch.testing.assert_close(y, torch.tensor([120.0, 120, 41]))


@pytest.mark.parametrize("group", [16, 32, 48, 96])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_the_rows_come_back(group: int, density: float) -> None:
    torch.manual_seed(0)
    for rows, cols in SHAPES:
        cols = cols if cols % group == 0 else 192 if 192 % group == 0 else 288
        groups = quantise_groups(torch.randn(rows, cols), torch.rand(rows, cols // group) < density, group)
        panels = QuantPanels.of(groups)
        assert all(torch.equal(*both) for both in zip(groups.parts, panels.groups().parts, strict=True))
    large = example(4096, 1024)
    assert large.nbytes < 0.9 * large.groups().nbytes


@needs_native
@pytest.mark.parametrize("group", [16, 32, 48, 64])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 7])
def test_the_product_is_that_of_rounded_units(group: int, density: float, batch: int) -> None:
    torch.manual_seed(0)
    for rows in (11, 256, 300, 0):
        cols = 2 * 3 * 64 if group == 64 else 288
        panels, bias = example(rows, cols, group, density), torch.randn(rows)
        x = torch.randn(batch, cols) * torch.rand(batch, 1)
        dense = panels.groups().to_dense().double()
        expected = round_units(x, panels.unit).double() @ dense.t() + bias
        with ops.backend("native"):
            y = quant_panel_linear(x, panels, bias)
            each = [quant_panel_linear(row[None], panels, bias) for row in x]
        scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
        assert y.shape == expected.shape and ((y.double() - expected).abs() <= 3e-6 * scale).all()
        assert torch.equal(torch.cat([y[:0], *each]), y)  # rows of x do not touch each other
        with ops.backend("reference"):
            assert ((quant_panel_linear(x, panels, bias) - expected).abs() <= 3e-6 * scale).all()
        # What rounding moves: half a step of each input.
        most = x.unflatten(-1, (-1, panels.unit)).abs().amax(-1).repeat_interleave(panels.unit, -1)
        moved = (most.double() / 254) @ dense.abs().t()
        assert ((y.double() - x.double() @ dense.t() - bias).abs() <= 1.01 * moved + 1e-5).all()


@needs_native
def test_a_unit_that_cannot_be_rounded_is_not_and_the_others_are() -> None:
    torch.manual_seed(0)
    panels, x = example(300, 192), torch.randn(6, 192)
    x[1, 3], x[2, 70], x[3] = float("inf"), float("nan"), 1e-38
    x[4, 5], x[4, 90] = -float("inf"), 1e30
    with ops.backend("native"):
        found = quant_panel_linear(x, panels)
    with ops.backend("reference"):
        expected = quant_panel_linear(x, panels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    touched = panels.groups().to_dense()[:, :16].abs().sum(1) > 0
    assert not found[1, touched].isfinite().any() and found[1, ~touched].isfinite().all()


@needs_native
@pytest.mark.parametrize("batch", [1, 7])
def test_threads_do_not_change_a_bit(batch: int) -> None:
    torch.manual_seed(0)
    panels, x = example(1000, 512), torch.randn(batch, 512)  # work enough for several threads
    with ops.backend("native"):
        one = quant_panel_linear(x, panels)
        torch.set_num_threads(3)
        three = quant_panel_linear(x, panels)
        torch.set_num_threads(1)
    assert torch.equal(one, three)


@needs_native
@pytest.mark.parametrize("backend", ["native", "dense"])
def test_a_repeated_call_sees_what_has_changed(backend: str) -> None:
    torch.manual_seed(0)
    panels, x, bias = example(11, 192), torch.randn(2, 192), torch.randn(11)
    with ops.backend(backend), torch.no_grad():
        first = [quant_panel_linear(x, panels, bias) for _ in range(3)]
        assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
        copied = copy.deepcopy(panels)
        panels.scales.mul_(2)
        torch.testing.assert_close(quant_panel_linear(x, panels), 2 * (first[0] - bias))
        torch.testing.assert_close(quant_panel_linear(x, copied, bias), first[0])
        with pytest.raises(OpError, match="bias"):
            quant_panel_linear(x, panels, bias[:5])
        panels.masks[0, 0, 31] = 1
        with pytest.raises(OpError, match="index|beyond"):
            quant_panel_linear(x, panels)


def test_gradient_is_that_of_x_itself() -> None:
    panels, x = example(9, 96), torch.randn(3, 96, requires_grad=True)
    bias = torch.randn(9, requires_grad=True)
    grad = torch.randn(3, 9)
    quant_panel_linear(x, panels, bias).backward(grad)
    torch.testing.assert_close(x.grad, grad @ panels.groups().to_dense())
    torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.traced
def test_compile() -> None:
    panels, x = example(9, 96), torch.randn(3, 96)
    compiled = torch.compile(lambda x: quant_panel_linear(x, panels), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), quant_panel_linear(x, panels))


def test_refusals() -> None:
    panels = example(300, 96)
    with pytest.raises(OpError, match="does not end in the 96 inputs"):
        quant_panel_linear(torch.randn(2, 95), panels)
    with pytest.raises(OpError, match="multiple of 16"):
        replace(panels, group=24)
    with pytest.raises(OpError, match="scales must be contiguous"):
        replace(panels, scales=panels.scales.float())
    masks = panels.masks.clone()
    masks[1, 2, 20] = 1
    with pytest.raises(OpError, match="beyond the 300 rows"):
        replace(panels, masks=masks)
    masks[1, 2, 20], masks[0, 0] = 0, 0
    with pytest.raises(OpError, match="count the blocks"):
        replace(panels, masks=masks)
    with pytest.raises(OpError, match="count the blocks"):
        replace(panels, pointer=panels.pointer + 1)
    panels.pointer[1] = 10_000
    with pytest.raises(OpError, match="pointer"):
        quant_panel_linear(torch.randn(2, 96), panels)
