"""Masks as values: algebra, statistics, checks against a model, and the record that a model carries."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from zoo.shared.errors import MaskError, PatternError
from zoo.shared.masks import Mask, MaskSet, masks_of, set_masks
from zoo.shared.masks.patterns import NM, Block, Group, Unstructured


def flags(text: str) -> torch.Tensor:
    return torch.tensor([character == "x" for character in text])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def half(model: nn.Module, *names: str) -> MaskSet:
    parameters = dict(model.named_parameters())
    keep = {name: torch.arange(parameters[name].numel()) % 2 == 0 for name in names}
    return MaskSet({name: Mask(keep[name].view(parameters[name].shape)) for name in names})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_counts_and_algebra():
    a, b = Mask(flags("xx..")), Mask(flags("x.x."))
    assert (a.kept, a.numel, a.sparsity, tuple(a.shape)) == (2, 4, 0.5, (4,))
    assert (a & b).equal(Mask(flags("x..."))) and (a | b).equal(Mask(flags("xxx.")))
    assert (~a).equal(Mask(flags("..xx"))) and not a.equal(b) and not a.equal(Mask(flags("xx...")))
    assert Mask(torch.zeros(0, dtype=torch.bool)).sparsity == 0


def test_algebra_keeps_a_pattern_only_where_it_still_holds():
    a, b = Mask(flags("xx.."), NM(2, 4)), Mask(flags("x.x."), NM(2, 4))
    assert (a & b).pattern == NM(2, 4) and (a | b).pattern == Unstructured()
    assert (a & Mask(flags("x..."))).pattern == NM(2, 4)
    rows = torch.tensor([[True, True], [False, False]])
    assert (~Mask(rows, Group(0))).pattern == Group(0)


def test_a_mask_that_breaks_its_pattern_cannot_be_made():
    with pytest.raises(PatternError, match="keep more than 2"):
        Mask(flags("xxx."), NM(2, 4))
    with pytest.raises(PatternError, match="part of 1 of 1 units"):
        Mask(torch.tensor([[True, False]]), Block(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_only_booleans_are_masks(dtype):
    with pytest.raises(MaskError, match="boolean tensor; received"):
        Mask(torch.ones(3, dtype=dtype))


def test_shapes_must_agree():
    with pytest.raises(MaskError, match=r"\(4,\) and \(3,\)"):
        _ = Mask(flags("xx..")) & Mask(flags("xx."))


def test_masks_need_no_model():
    edges = Mask(flags("xx.x..") & flags("xxxx.."))  # the edges of a graph
    assert MaskSet({"edges": edges, "cells": flags("x.")}).sparsity() == pytest.approx(4 / 8)


def test_sets_combine_by_name_and_missing_means_kept():
    a = MaskSet({"w": flags("xx.."), "v": flags("x.")})
    b = MaskSet({"w": flags("x.x."), "u": flags(".x")})
    assert (a & b).equal(MaskSet({"w": flags("x..."), "v": flags("x."), "u": flags(".x")}))
    assert (a | b).equal(MaskSet({"w": flags("xxx.")}))
    assert a.intersection(b, a).equal(a & b)
    assert a.iou(b) == pytest.approx(1 / 3) and a.iou(a) == 1
    assert len(a) == 2 and "w" in a and "u" not in a and list(a) == ["w", "v"]
    with pytest.raises(KeyError, match="did you mean 'w'"):
        MaskSet({"w": flags("x"), "zzz": flags("x")})["ww"]


def test_apply_zeroes_even_nan_and_reports():
    model = net()
    masks = half(model, "0.weight", "2.weight")
    with torch.no_grad():
        model[0].weight.view(-1)[1] = torch.nan
        model[0].weight.view(-1)[3] = -torch.inf
    assert set(masks.lost_zeros(model)) == {"0.weight", "2.weight"}
    masks.apply_(model)
    assert masks.lost_zeros(model) == []
    assert (model[0].weight.view(-1)[1::2] == 0).all() and (model[0].weight.view(-1)[::2] != 0).all()
    report = masks.report(model)
    assert (report.kept, report.masked_numel, report.whole_numel) == (18, 36, 44)
    assert report.masked == 0.5 and report.whole == pytest.approx(18 / 44)
    assert report.per_tensor == {"0.weight": 0.5, "2.weight": 0.5}
    assert "50.00% of 36 masked weights" in str(report)


def test_the_mask_is_the_truth_not_the_zeros():
    model = net()
    masks = half(model, "0.weight")
    masks.apply_(model)
    with torch.no_grad():
        model[0].weight.zero_()  # kept weights that happen to be zero
    assert masks.report(model).kept == 12 and masks.sparsity() == 0.5
    with masks.attach(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1)):
        model[0].bias.data += 1
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    assert (model[0].weight.view(-1)[::2] != 0).any(), "a kept weight must be free to leave zero"


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"0.weigth": torch.ones(6, 4, dtype=torch.bool)},
            "no parameter '0.weigth'; did you mean '0.weight'",
        ),
        ({"nowhere": torch.ones(1, dtype=torch.bool)}, "there are: 0.weight, 0.bias"),
        ({"0.weight": torch.ones(4, 6, dtype=torch.bool)}, r"shape \(4, 6\), the parameter \(6, 4\)"),
    ],
)
def test_masks_of_another_model_are_refused(masks, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    for use in (
        lambda m: m.check(model),
        lambda m: m.apply_(model),
        lambda m: m.attach(model),
        lambda m: m.report(model),
        lambda m: m.lost_zeros(model),
        lambda m: set_masks(model, m),
    ):
        with pytest.raises(MaskError, match=message):
            use(MaskSet(masks))
    assert masks_of(model) is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_tied_parameters_are_masked_once():
    model = Tied()
    keep = torch.arange(15).view(5, 3) % 3 == 0
    masks = MaskSet({"embed.weight": keep, "head.weight": keep})
    masks.apply_(model)
    assert masks.report(model).masked_numel == 15 == masks.report(model).whole_numel
    assert MaskSet({"head.weight": keep}).lost_zeros(model) == []
    with masks.attach(model), pytest.raises(MaskError, match="already attached"):
        MaskSet({"head.weight": keep}).attach(model)
    with pytest.raises(MaskError, match="'head.weight' and 'embed.weight' are one tied parameter"):
        MaskSet({"embed.weight": keep, "head.weight": ~keep}).check(model)


def test_the_record_survives_copies_and_stays_out_of_the_state_dict():
    model = net()
    keys = list(model.state_dict())
    masks = half(model, "0.weight")
    assert masks_of(model) is None
    set_masks(model, masks)
    assert list(model.state_dict()) == keys and [name for name, _ in model.named_buffers()] == []
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.optim.swa_utils.AveragedModel(model),
    ):
        found = masks_of(twin)
        assert found is not None and found.equal(masks)
    # A copy owns its masks, and dense models load the weights of masked ones without further ado.
    set_masks(copied := copy.deepcopy(model), None)
    assert masks_of(copied) is None and masks_of(model) is not None
    net().load_state_dict(model.state_dict(), strict=True)


def test_masks_pickle_through_torch_save_weights_only():
    masks = half(net(), "0.weight")
    buffer = io.BytesIO()
    torch.save({name: mask.keep for name, mask in masks.items()}, buffer)
    buffer.seek(0)
    assert MaskSet(torch.load(buffer, weights_only=True)).equal(masks)


def test_masks_follow_to_another_device():
    masks = half(net(), "0.weight").to("meta")
    assert masks["0.weight"].keep.device.type == "meta"
