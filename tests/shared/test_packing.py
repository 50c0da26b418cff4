"""Packed modules give the outputs of the masked ones they replace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from shared import packing
from shared.errors import MaskError
from shared.masks import Mask, MaskSet, masks_of
from shared.packing import PackedLinear, pack


def masked(model: nn.Module, sparsity: float) -> tuple[nn.Module, MaskSet]:
    generator = torch.Generator().manual_seed(0)
    masks = MaskSet({
        name: torch.rand(p.shape, generator=generator) >= sparsity
        for name, p in model.named_parameters() if p.dim() == 2
    })
    masks.apply_(model)
    return model.eval(), masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (3,), (2, 3)])
def test_a_packed_layer_equals_the_masked_one(dtype: torch.dtype, bias: bool, batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, masks = masked(nn.Linear(13, 7, bias=bias, dtype=dtype), 0.7)
    x = torch.randn(*batch, 13, dtype=dtype)
    packed = PackedLinear(layer.weight, masks["weight"], layer.bias)
    torch.testing.assert_close(packed(x), layer(x), atol=1e-5, rtol=1e-5)
    assert packed.values.numel() == masks["weight"].kept


def test_a_layer_without_any_weight() -> None:
    layer = PackedLinear(torch.zeros(3, 4), Mask(torch.zeros(3, 4, dtype=torch.bool)), torch.ones(3))
    assert torch.equal(layer(torch.randn(2, 4)), torch.ones(2, 3))


def test_large_sparse_layers_are_replaced_and_the_others_stay() -> None:
    torch.manual_seed(0)
    model, masks = masked(nn.Sequential(nn.Linear(1000, 800), nn.ReLU(), nn.Linear(800, 10)), 0.95)
    x = torch.randn(4, 1000)
    expected = model(x)
    packed = pack(copy.deepcopy(model), masks)
    assert isinstance(packed[0], PackedLinear) and isinstance(packed[2], nn.Linear)
    assert list(masks_of(packed)) == ["2.weight"] and not packed[0].training
    torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=1e-5)


def test_a_layer_that_would_be_slower_stays() -> None:
    model, masks = masked(nn.Sequential(nn.Linear(1000, 800)), 0.5)
    assert isinstance(pack(model, masks)[0], nn.Linear)
    half, masks = masked(nn.Sequential(nn.Linear(1000, 800)).bfloat16(), 0.95)
    assert isinstance(pack(half, masks)[0], nn.Linear)


def test_tied_layers_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(800, 800), nn.Linear(800, 800))
    model[1].weight = model[0].weight
    model, masks = masked(model, 0.95)
    packed = pack(model, masks)
    assert isinstance(packed[0], nn.Linear) and packed[1].weight is packed[0].weight


def test_a_model_that_is_one_layer() -> None:
    layer, masks = masked(nn.Linear(1000, 800), 0.95)
    assert isinstance(pack(layer, masks), PackedLinear)


def test_masks_of_another_model_are_refused() -> None:
    with pytest.raises(MaskError, match="shape"):
        pack(nn.Linear(3, 4), MaskSet({"weight": torch.ones(3, 3, dtype=torch.bool)}))


def test_other_types_can_be_registered(monkeypatch) -> None:
    class Mine(nn.Linear):
        pass

    monkeypatch.setattr(packing, "_CONVERTERS", dict(packing._CONVERTERS))
    packing.register_packer(Mine)(lambda own, masks: PackedLinear(own.weight, masks["weight"], own.bias))
    model, masks = masked(nn.Sequential(Mine(5, 4), nn.Linear(4, 3)), 0.5)
    assert isinstance(pack(model, masks)[0], PackedLinear)
