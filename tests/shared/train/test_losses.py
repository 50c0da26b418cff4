"""Distillation losses against numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zoo.shared.errors import TrainingError
from zoo.shared.train import Distillation, output_kl
from zoo.shared.train.losses import feature_loss, normalised_feature_loss


def test_output_divergence_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    # KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 log 3/2 + 1/4 log 1/2, and 0; the other direction is another number
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert output_kl(student, teacher).item() == pytest.approx(first / 2)
    # T = 2 with logits twice as large: the same distributions, four times the loss
    assert output_kl(student, 2 * teacher, 2.0).item() == pytest.approx(4 * first / 2)


def test_feature_losses_by_hand() -> None:
    student, teacher = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 4.0])
    assert feature_loss(student, teacher).item() == pytest.approx((4 + 9) / 2)
    assert normalised_feature_loss(student, teacher).item() == pytest.approx(13 / 25)


def make(scale: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity())
    model[0].weight.data = scale * torch.eye(2)
    return model


def test_terms_add_up_and_no_hook_stays() -> None:
    student, teacher = make(1.0), make(3.0)
    x = torch.tensor([[1.0, 2.0]])
    distil = Distillation(teacher, task=2.0, output=0.5, feature=0.25, normalised=4.0, features={"0": "0"})
    total = distil(lambda m, b: m(b).sum(), student, x)
    expected = 2.0 * 3 + 0.5 * output_kl(x, 3 * x) + 0.25 * (4 + 16) / 2 + 4.0 * (4 + 16) / 45
    assert total.item() == pytest.approx(float(expected))
    total.backward()
    assert teacher[0].weight.grad is None and student[0].weight.grad is not None
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_refusals() -> None:
    with pytest.raises(TrainingError, match="features to distil need modules"):
        Distillation(make(1.0), feature=1.0)
    with pytest.raises(TrainingError, match="weight of output .* received -1"):
        Distillation(make(1.0), output=-1.0)
    with pytest.raises(TrainingError, match="no module 'head'"):
        Distillation(make(1.0), feature=1.0, features={"head": "0"})(
            lambda m, b: m(b).sum(), make(1.0), torch.ones(1, 2)
        )
    with pytest.raises(TrainingError, match="called it 2 times"):
        Distillation(make(1.0), output=1.0)(lambda m, b: m(b).sum() + m(b).sum(), make(1.0), torch.ones(1, 2))
    wide = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.raises(TrainingError, match=r"'0' \(1, 2\) and '0' \(1, 3\) differ in shape"):
        Distillation(wide, feature=1.0, features={"0": "0"})(
            lambda m, b: m(b).sum(), make(1.0), torch.ones(1, 2)
        )
