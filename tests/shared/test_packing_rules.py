"""Which modules are packed: by what they compute and how they are used, not by their class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.shared.masks import Mask, MaskSet, set_masks
from zoo.shared.masks.patterns import NM
from zoo.shared.ops import SparseLinear
from zoo.shared.ops.packing import pack


class Own(nn.Linear):
    """A subclass that multiplies in its own way."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class InputsFirst(nn.Module):
    """transformers' Conv1D: the weight is [in, out]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Scaled(nn.Linear):
    """No linear layer at all."""

    def forward(self, x):
        return 2 * super().forward(x)


class Reader(nn.Module):
    """Takes the weight of its layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x @ self.inner.weight.T


def masked(module: nn.Module, dim: int = -1) -> tuple[nn.Module, MaskSet]:
    name, weight = next(item for item in module.named_parameters() if item[0].endswith("weight"))
    masks = MaskSet({name: Mask(NM(2, 4, dim).keep(weight.abs(), 0), NM(2, 4, dim))})
    masks.apply_(module)
    set_masks(module, masks)
    return module, masks


@pytest.mark.usefixtures("packs_all")
@pytest.mark.parametrize(
    "layer,dim",
    [(Own(8, 12), -1), (Own(8, 8, bias=False), -1), (InputsFirst(8, 12), 0), (InputsFirst(8, 8), 0)],
)
def test_what_computes_a_linear_layer_is_packed_along_its_inputs(layer, dim):
    model, masks = masked(nn.Sequential(layer), dim)
    x = torch.randn(2, 3, 8)
    wanted = model(x)
    packed = pack(model, masks)
    assert isinstance(packed[0], SparseLinear) and packed[0].width == 4  # the layout of 2:4
    torch.testing.assert_close(packed(x), wanted)


@pytest.mark.usefixtures("packs_all")
@pytest.mark.parametrize("layer", [Scaled(8, 12), Reader(), nn.MultiheadAttention(8, 2)])
def test_what_does_not_or_is_read_stays_masked_and_says_so(layer, caplog):
    model, masks = masked(nn.Sequential(layer))
    with caplog.at_level("INFO", logger="zoo"):
        packed = pack(model, masks)
    assert not any(isinstance(module, SparseLinear) for module in packed.modules())
    assert "1 of 1 masked weights stay dense, such as 0." in caplog.text
