"""Convolutions whose output sites are given: the dense convolution at those sites, and nothing elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.rulebook import conv_rulebook_onto, geometry
from zoo.shared.ops.sparse_conv import sparse_conv
from zoo.shared.ops.sparse_tensor import SparseConvTensor


@pytest.fixture(params=["reference", "native"])
def backend(request, monkeypatch):
    if request.param == "native" and not _native.available():
        pytest.skip("no native library on this machine")
    if request.param == "reference":
        monkeypatch.setattr(_native, "available", lambda: False)
    with ops.backend(request.param):
        yield


def some_sites(shape: tuple[int, ...], share: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(2, *shape, generator=generator) < share).nonzero().int()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 2, 1, 1), (4, 4, 0, 1), (7, 2, 3, 1), (3, 1, 2, 2), (1, 2, 0, 1)],
)
def test_equals_the_dense_convolution_at_the_given_sites(backend, kernel, stride, padding, dilation):
    torch.manual_seed(0)
    shape = (12, 8)
    indices = some_sites(shape, 0.3, 0)
    out_shape = geometry(2, kernel, stride, padding, dilation).out_shape(shape)
    onto = some_sites(out_shape, 0.5, 1)
    onto = onto[torch.randperm(len(onto))]  # in any order
    features = torch.randn(len(indices), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, kernel, kernel, 3, dtype=torch.float64, requires_grad=True)
    x = SparseConvTensor(features, indices, shape, 2)
    rulebook = conv_rulebook_onto(indices, shape, 2, onto, kernel, stride, padding, dilation)
    sparse = sparse_conv(x, weight, rulebook=rulebook).features
    grid = functional.conv2d(x.dense(), weight.movedim(-1, 1), None, stride, padding, dilation)
    dense = grid.movedim(1, -1)[tuple(onto.long().unbind(1))]
    torch.testing.assert_close(sparse, dense)
    seeds = torch.randn_like(dense)
    for first, second in zip(
        torch.autograd.grad(sparse, (features, weight), seeds),
        torch.autograd.grad(dense, (features, weight), seeds),
        strict=True,
    ):
        torch.testing.assert_close(first, second)


def test_sites_off_the_output_grid_are_refused():
    indices = torch.tensor([[0, 1, 1]], dtype=torch.int32)
    with pytest.raises(OpError, match="outside"):
        conv_rulebook_onto(indices, (8, 8), 1, torch.tensor([[0, 5, 0]], dtype=torch.int32), 3, 2, 1)
