"""Norms folded into the convolutions before them, and those that have to stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.shared.structure.folding import fold_norms


def block(channels: int = 3) -> nn.Sequential:
    """A convolution and a norm with statistics of its own, in eval mode."""
    made = nn.Sequential(nn.Conv2d(channels, 3, 1), nn.BatchNorm2d(3))
    made.train()(torch.randn(8, channels, 4, 4) * 3 + 1)
    return made.eval()


@pytest.fixture
def image() -> torch.Tensor:
    """Two images of three channels."""
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 4)


def test_a_norm_goes_into_the_convolution_before_it(image) -> None:
    model = block()
    expected = model(image)
    assert isinstance(fold_norms(model)[1], nn.Identity)
    torch.testing.assert_close(model(image), expected)


def test_a_norm_whose_parameters_must_stay_stays(image) -> None:
    model = nn.Sequential(*block(), *block())
    expected = model(image)
    fold_norms(model, kept=("1.weight",))
    assert isinstance(model[1], nn.BatchNorm2d) and isinstance(model[3], nn.Identity)
    torch.testing.assert_close(model(image), expected)


def test_what_another_place_shares_stays(image) -> None:
    shared = block()
    model = nn.Sequential(shared[0], shared[1], nn.Sequential(nn.Conv2d(3, 3, 1).eval(), shared[1]))
    expected = model(image)
    fold_norms(model)
    torch.testing.assert_close(model(image), expected)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_a_norm_in_training_stays() -> None:
    model = block().train()
    assert isinstance(fold_norms(model)[1], nn.BatchNorm2d)
