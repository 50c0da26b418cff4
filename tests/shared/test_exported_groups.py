"""Families found through torch.export: norms in functions, YOLO's block, transformers' ViT and Llama."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.llm.families import family
from zoo.shared.errors import GroupError
from zoo.shared.structure.groups import trace_groups
from zoo.shared.structure.surgery import cut

pytestmark = pytest.mark.traced


def shaken(model: nn.Module) -> nn.Module:
    """With statistics and shifts that a wrong cut would show."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return model.eval()


def halved(groups, exact=True):
    """Half of the units of each family, of the exact ones only if their outputs are to be compared."""
    chosen = {name: one for name, one in groups.items() if one.exact or not exact}
    return {name: torch.arange(one.units) >= one.units // 2 for name, one in chosen.items()}


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, as timm has it: fx walks into it and meets a function."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        return F.relu(F.batch_norm(x, mean, var, self.weight, self.bias, False, self.momentum, self.eps))


class Block(nn.Module):
    """A residual block that is dropped at random, by a function of sizes, while it trains."""

    def __init__(self, width):
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, 2 * width, 1), NormAct(2 * width)
        self.deep, self.deep_norm = (
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
            NormAct(2 * width),
        )
        self.last = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        y = self.last(self.deep_norm(self.deep(self.norm(self.first(x)))))
        return x + (y * (torch.rand(y.shape[0], 1, 1, 1) < 0.9) if self.training else y)


class C2f(nn.Module):
    """YOLOv8's block: a list of chunks grows in a loop."""

    def __init__(self, width):
        super().__init__()
        self.cv1, self.cv2 = nn.Conv2d(3, 2 * width, 1), nn.Conv2d(4 * width, 4, 1)
        self.m = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):
        y = list(F.silu(self.cv1(x)).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


def test_a_norm_is_followed_whoever_calls_it():
    torch.manual_seed(0)
    model = shaken(
        nn.Sequential(nn.Conv2d(3, 6, 3), Block(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    )
    x = torch.randn(2, 3, 8, 8)
    groups = trace_groups(model, (x,))
    assert {name: one.units for name, one in groups.items()} == {"0.weight": 6, "1.first.weight": 12}
    assert groups.reach(model) == pytest.approx(1.0, abs=0.01)  # all but the last bias
    assert len(groups["1.first.weight"].members) == 13  # two norms of four, two convolutions, the reader
    cut(model, groups, halved(groups), check=(x,))
    assert model[1].deep.groups == 6 and model[1].norm.num_features == 6 and model(x).shape == (2, 4)


def test_chunks_stay_of_equal_size():
    torch.manual_seed(0)
    model, x = shaken(C2f(4)), torch.randn(2, 3, 6, 6)
    groups = trace_groups(model, (x,))
    assert groups["cv1.weight"].units == 4 and groups["cv1.weight"].members[0].index.shape == (4, 2)
    cut(model, groups, halved(groups), check=(x,))
    assert model.cv1.weight.shape[0] == 4 and model.cv2.weight.shape[1] == 8


def test_transformers_vit_is_cut_in_heads_neurons_and_width():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "num_hidden_layers": 2}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 3, 8, 8)
    groups = trace_groups(model, (x,))
    assert groups.reach(model) == pytest.approx(1.0, abs=0.02)
    assert sorted(one.units for one in groups.values()) == [4, 4, 16, 24, 24]
    assert [one.units for one in groups.values() if not one.exact] == [16]  # the stream, under its norms
    cut(model, groups, halved(groups), check=(x,))
    first = model.vit.layers[0]
    assert tuple(first.attention.q_proj.weight.shape) == (8, 16) and tuple(first.mlp.fc1.weight.shape) == (
        12,
        16,
    )
    groups = trace_groups(model, (x,))
    cut(model, groups, halved(groups, exact=False), allow_inexact=True, check=(x,))
    assert model(x).logits.shape == (2, 3)


def test_a_llama_is_cut_in_grouped_heads_and_neurons():
    model, ids = family("llama"), torch.randint(3, 90, (2, 8))
    groups = trace_groups(model, (ids,))
    assert model.config.use_cache and sorted(one.units for one in groups.values()) == [2, 2, 64, 64]
    cut(model, groups, halved(groups), check=(ids,))
    assert model.model.layers[0].self_attn.k_proj.weight.shape[0] == 8
    assert model.generate(ids[:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= 6


class Fixed(nn.Module):
    """Splits at a size that it was made with, as Res2Net does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        one, other = torch.split(F.relu(self.a(x)), 4, 1)
        return self.c(F.relu(self.b(one + other)))


def test_families_whose_cut_does_not_run_are_left_out_with_the_reason():
    model, x = Fixed().eval(), torch.randn(2, 3, 4, 4)
    groups = trace_groups(model, (x,))
    assert list(groups) == ["b.weight"]
    assert "cannot be cut: cut: the smaller model does not run" in groups.frozen["a.weight"]
    assert 0 < groups.reach(model) < 1


def test_what_nothing_can_follow_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with pytest.raises(
        GroupError, match=r"Branching can be followed neither by torch.fx nor by torch.export"
    ):
        trace_groups(Branching(), (torch.randn(2, 3),))


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timms_norms_hide_nothing():
    from zoo.optional import import_timm

    timm = import_timm()
    model = shaken(timm.create_model("mobilenetv3_small_050", num_classes=4))
    x = torch.randn(2, 3, 32, 32)
    groups = trace_groups(model, (x,))
    assert groups.reach(model) > 0.99
    cut(model, groups, halved(groups), check=(x,))
