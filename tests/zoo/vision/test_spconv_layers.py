"""Sparse convolutions as modules, and spconv's orders of weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.errors import ConfigError
from zoo.shared.ops.sparse_tensor import SparseConvTensor
from zoo.vision.lidar.spconv_layers import SparseConv2d, SubMConv2d, SubMConv3d, load_spconv_state


def sites(channels: int, dtype: torch.dtype = torch.float32) -> SparseConvTensor:
    torch.manual_seed(0)
    places = (torch.rand(2, 7, 6) < 0.4).nonzero().int().contiguous()
    return SparseConvTensor(torch.randn(len(places), channels, dtype=dtype), places, (7, 6), 2)


def test_modules_are_the_dense_convolution_at_the_sites() -> None:
    x, layer = sites(3), SubMConv2d(3, 5, 3, indice_key="a")
    dense = F.conv2d(x.dense(), layer.weight.movedim(-1, 1), layer.bias, padding=1)
    at = x.indices.long().unbind(1)
    torch.testing.assert_close(layer(x).features, dense.movedim(1, -1)[at])
    down = SparseConv2d(3, 5, 3, stride=2, padding=1, bias=False)
    dense = F.conv2d(x.dense(), down.weight.movedim(-1, 1), stride=2, padding=1)
    torch.testing.assert_close(down(x).dense(), dense)


def test_half_features_under_autocast_are_computed_in_the_weights_precision() -> None:
    x, layer = sites(3, torch.bfloat16), SubMConv2d(3, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x).features
    expected = layer(x.replace_feature(x.features.float())).features
    assert out.dtype == torch.float32 and torch.equal(out, expected)


@pytest.mark.parametrize("kernel", [1, 3])
def test_weights_of_every_age_compute_the_same(kernel: int) -> None:
    x, layer = sites(3), nn.Sequential(SubMConv2d(3, 5, kernel))
    expected, state = layer(x).features, layer.state_dict()
    for stored in (
        state["0.weight"],
        state["0.weight"].movedim(0, -1),  # [*kernel, in, out]
        state["0.weight"].movedim(0, -2),  # [*kernel, out, in]
    ):
        fresh = nn.Sequential(SubMConv2d(3, 5, kernel))
        load_spconv_state(fresh, {**state, "0.weight": stored.contiguous()})
        assert torch.equal(fresh(x).features, expected)


def test_an_order_that_the_shape_does_not_tell_is_asked_for() -> None:
    layer = SubMConv2d(4, 4, 1)
    state = {**layer.state_dict(), "weight": layer.weight.detach().movedim(0, -1).contiguous()}
    fresh = SubMConv2d(4, 4, 1)
    with pytest.raises(ConfigError, match="fits RSCK and RSKC: say which with layout="):
        load_spconv_state(fresh, state)
    load_spconv_state(fresh, state, layout="RSCK")
    assert torch.equal(fresh.weight, layer.weight)
    with pytest.raises(ConfigError, match="has one of"):
        load_spconv_state(SubMConv3d(4, 4, 1), state)
    with pytest.raises(ConfigError, match="kernel_size has 3 numbers for 2 dimensions"):
        SubMConv2d(4, 4, (1, 1, 1))
