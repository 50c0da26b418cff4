"""Two sparse copies of one weight: the three products, the masks, and the way back to plain layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.shared.errors import MaskError, PatternError
from zoo.shared.learned.constraints import decaying_ste, finish_bidirectional, make_bidirectional
from zoo.shared.masks import masks_of
from zoo.shared.masks.patterns import NM


@pytest.mark.parametrize("layer", [nn.Linear(16, 8), nn.Conv2d(16, 8, 3, stride=2, padding=1)])
def test_each_product_uses_its_own_mask(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    make_bidirectional(model, ["0.weight"], 2, 8)
    x = torch.randn(*((5, 16) if isinstance(layer, nn.Linear) else (5, 16, 6, 6)), requires_grad=True)
    y = model(x)
    grad = torch.randn_like(y)
    y.backward(grad)

    keep_in, keep_out = (NM(2, 8, dim).keep(weight.abs(), 0) for dim in (1, 0))
    assert not torch.equal(keep_in, keep_out)

    def dense(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs, w = x.detach().clone().requires_grad_(), w.clone().requires_grad_()
        if isinstance(layer, nn.Linear):
            out = nn.functional.linear(inputs, w, bias)
        else:
            out = nn.functional.conv2d(inputs, w, bias, 2, 1)
        out.backward(grad)
        return out.detach(), inputs.grad, w.grad

    torch.testing.assert_close(y.detach(), dense(weight * keep_in)[0])
    torch.testing.assert_close(x.grad, dense(weight * keep_out)[1])
    torch.testing.assert_close(layer.weight.grad, dense(weight)[2])


def test_finishing_leaves_plain_layers_with_the_forward_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    names = [name for name, _ in model.named_parameters()]
    x = torch.randn(4, 16)
    make_bidirectional(model, ["0.weight", "2.weight"], 2, 8)
    before = model(x)
    masks = finish_bidirectional(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model[0]) is nn.Linear and masks_of(model).equal(masks)
    assert {str(mask.pattern) for mask in masks.values()} == {str(NM(2, 8, 1))} and masks.sparsity() == 0.75
    torch.testing.assert_close(model(x), before)


def test_both_axes_must_divide():
    model = nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12))
    with pytest.raises(PatternError, match="0.weight"):
        make_bidirectional(model, ["0.weight"], 2, 8)
    with pytest.raises(MaskError, match="1.weight"):
        make_bidirectional(model, ["1.weight"], 2, 4)


def test_a_restricted_decay_lets_the_gradient_fade():
    weight = torch.randn(6, requires_grad=True)
    keep = weight.detach() > 0
    for restrict, factor in ((False, 1.0), (True, 0.25)):
        weight.grad = None
        decaying_ste(weight, keep, 0.25, restrict).sum().backward()
        assert torch.equal(weight.grad, torch.where(keep, 1.0, factor))
