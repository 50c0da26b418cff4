"""nm_linear: the four patterns against fp64, and what is no such pattern refused."""

from __future__ import annotations

import pytest
import torch

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.nm_linear import PATTERNS, nm_linear, pack_nm, reference

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")


def nm_mask(rows: int, cols: int, n: int, m: int) -> torch.Tensor:
    return (torch.rand(rows, cols // m, m).argsort(-1) < n).reshape(rows, cols)


@needs_native
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (33, 72), (3, 2064), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree(n: int, m: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(n * m)
    weight = pack_nm(torch.randn(shape).to(dtype), nm_mask(*shape, n, m), n, m)
    bias = torch.randn(shape[0])
    for batch in (1, 2, 3, 4, 5, 33):
        x = torch.randn(batch, shape[1])
        expected = x.double() @ weight.to_dense().double().t() + bias
        scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
        for name in ("native", "reference", "dense"):
            with ops.backend(name):
                assert ((nm_linear(x, weight, bias).double() - expected).abs() <= 2e-6 * scale).all()
    assert reference(x, weight, bias).shape == expected.shape


@needs_native
def test_half_a_byte_at_the_end() -> None:
    weight = pack_nm(torch.randn(3, 12), nm_mask(3, 12, 2, 4), 2, 4)
    x = torch.randn(2, 12)
    with ops.backend("native"):
        assert torch.allclose(nm_linear(x, weight), x @ weight.to_dense().t(), atol=1e-5)


def test_kept_zeros_count() -> None:
    weight = pack_nm(torch.zeros(4, 8), nm_mask(4, 8, 2, 4), 2, 4)
    assert weight.packed.kept == 16


def test_gradients_reach_the_kept_weights() -> None:
    weight = pack_nm(torch.randn(6, 16), nm_mask(6, 16, 2, 4), 2, 4)
    weight.packed.values.requires_grad_()
    x = torch.randn(5, 16, requires_grad=True)
    nm_linear(x, weight).square().sum().backward()
    dense = weight.to_dense()
    expected = torch.autograd.grad((x.detach() @ dense.t()).square().sum(), weight.packed.values)[0]
    assert torch.allclose(weight.packed.values.grad, expected, atol=1e-4)


def test_refusals() -> None:
    mask = nm_mask(4, 8, 2, 4)
    with pytest.raises(OpError, match="3:4 over 8 inputs"):
        pack_nm(torch.randn(4, 8), mask, 3, 4)
    with pytest.raises(OpError, match="2:4 over 6 inputs"):
        pack_nm(torch.randn(4, 6), mask[:, :6], 2, 4)
    mask[1, 4:] = True
    with pytest.raises(OpError, match=r"row 1 keeps 4 of inputs 4..7, not 2"):
        pack_nm(torch.randn(4, 8), mask, 2, 4)
    weight = pack_nm(torch.randn(4, 8), nm_mask(4, 8, 2, 4), 2, 4)
    weight.packed.index[1, 0] = 0b11111111
    with pytest.raises(OpError, match="do not add up"):
        nm_linear(torch.randn(1, 8), weight)
    weight = pack_nm(torch.randn(4, 16), nm_mask(4, 16, 2, 4), 2, 4)
    weight.packed.index[1, :2] = torch.tensor([0b11111111, 0])  # the row's count, unevenly spread
    with pytest.raises(OpError, match="do not keep 4 of each 8"):
        nm_linear(torch.randn(1, 16), weight)
