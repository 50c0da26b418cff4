"""What packed convolutions take over in traced blocks, and what they must leave."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from zoo.shared.masks import MaskSet
from zoo.shared.ops import SparseConv1x1, SparseConv2d, packing
from zoo.shared.structure.folding import fold_norms
from zoo.shared.structure.fusing import followers


class Bottleneck(nn.Module):
    """As torchvision writes it: one ReLU module for three calls, sums in place."""

    def __init__(self, shortcut: bool, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, 2 if shortcut else 1, 1, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.relu = activation(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8)) if shortcut else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Twice(nn.Module):
    """What a convolution returns is used once more, and another is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.again = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv(x)
        return functional.relu(y) + y + functional.relu(self.again(x)) + self.again(y).relu()


class Optional(nn.Module):
    """An argument with a default: its forward has more than one way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, more=None):
        y = functional.relu(self.conv(x))
        return y if more is None else y + more


def packed(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model whose norms have statistics, its weights masked, and the same packed."""
    torch.manual_seed(0)
    model.train()
    for _ in range(3):
        model(torch.randn(4, 8, 10, 9))
    model.eval().requires_grad_(False)
    names = [name for name, p in model.named_parameters() if p.dim() == 4]
    masks = MaskSet({name: torch.rand(model.get_parameter(name).shape) < 0.3 for name in names})
    masks.apply_(model)
    return model, packing.pack(copy.deepcopy(model), masks)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("shortcut", [False, True])
def test_a_bottleneck_is_its_convolutions(shortcut: bool, activation: type[nn.Module]) -> None:
    model, made = packed(nn.Sequential(Bottleneck(shortcut, activation), Bottleneck(False, activation)))
    x = 5 * torch.randn(2, 8, 12, 11)
    torch.testing.assert_close(made(x), model(x), atol=1e-4, rtol=1e-4)
    block = made[0]
    assert isinstance(block, Bottleneck) and isinstance(block.conv2, SparseConv2d)
    relu = 1 if activation is nn.ReLU else 6
    last = block.downsample[0] if shortcut else block.conv3  # which adds the other
    assert [block.conv1.relu, block.conv2.relu, last.relu] == [relu] * 3
    called = []
    for module in block.modules():
        module.register_forward_hook(lambda module, *_: called.append(type(module)))
    block(x)
    assert called.count(activation) == 0 and nn.BatchNorm2d not in called
    torch.testing.assert_close(copy.deepcopy(made)(x), model(x), atol=1e-4, rtol=1e-4)


def test_what_others_use_stays() -> None:
    model, made = packed(Twice())
    x = torch.randn(2, 8, 7, 6)
    assert type(made.conv) is SparseConv2d and type(made.again) is SparseConv1x1
    assert not made.conv.relu and not made.again.relu
    torch.testing.assert_close(made(x), model(x), atol=1e-5, rtol=1e-5)


def test_optional_arguments_keep_their_ways() -> None:
    model, made = packed(nn.Sequential(Optional()))
    x, more = torch.randn(2, 8, 7, 6), torch.randn(2, 8, 7, 6)
    torch.testing.assert_close(made[0](x, more), model[0](x, more), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made(x), model(x), atol=1e-5, rtol=1e-5)
    assert not made[0].conv.relu


def test_norms_of_a_forward_go_into_convolutions() -> None:
    block = Bottleneck(True)
    assert set(followers(block)) >= {("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")}
    for _ in range(2):
        block(torch.randn(4, 8, 10, 9))
    block.eval().requires_grad_(False)
    x = torch.randn(2, 8, 10, 9)
    expected = block(x)
    folded = fold_norms(copy.deepcopy(block))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), expected, atol=1e-5, rtol=1e-5)


def test_norms_that_do_more_are_not_taken_for_norms() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.Conv2d(8, 8, 1), Activated(8)).eval()
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fold_norms(copy.deepcopy(model))(x), model(x))
