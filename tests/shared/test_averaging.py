"""Averages of networks of one mask, and the statistics of norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zoo.shared.errors import MaskError
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.averaging import average_models, recalibrate_norms


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_the_average_is_the_mean_and_keeps_the_mask():
    members = [net(0), net(1), net(2)]
    masks = sparsify(members[0], sparsity=0.5)
    for member in members[1:]:
        masks.apply_(member)
        set_masks(member, masks)
    members[1][1].num_batches_tracked.fill_(7)
    soup = average_models(members)
    for name, value in soup.state_dict().items():
        stack = [member.state_dict()[name] for member in members]
        expected = torch.stack(stack).mean(0) if value.is_floating_point() else stack[0]
        assert torch.equal(value, expected)
    assert masks_of(soup).equal(masks) and not masks.lost_zeros(soup)
    assert torch.equal(members[0][0].weight, copy.deepcopy(members[0])[0].weight)


def test_members_of_other_masks_and_shapes_are_refused():
    first, second = net(0), net(1)
    with pytest.raises(MaskError, match="at least two"):
        average_models([first])
    sparsify(first, sparsity=0.5)
    with pytest.raises(MaskError, match="other masks"):
        average_models([first, second])
    sparsify(second, sparsity=0.5)
    with pytest.raises(MaskError, match="union"):
        average_models([first, second])
    with pytest.raises(MaskError, match="other tensors"):
        average_models([first, nn.Linear(6, 8)])


def test_norms_take_the_mean_over_the_batches():
    model = net()
    x = torch.randn(40, 6) * 3 + 1
    model.train()
    model[0].eval()
    weights = copy.deepcopy(model.state_dict())
    assert recalibrate_norms(model, [x[:20], x[20:]]) == 1
    hidden = model[0](x)
    expected = torch.stack([hidden[:20].var(0), hidden[20:].var(0)]).mean(0)
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0).detach())
    torch.testing.assert_close(model[1].running_var, expected.detach())
    assert model[1].momentum == 0.1 and model.training and not model[0].training
    assert torch.equal(model[3].weight, weights["3.weight"])
    with pytest.raises(MaskError, match="no batches"):
        recalibrate_norms(model, [])
    assert recalibrate_norms(nn.Linear(2, 2), []) == 0
    assert isinstance(masks_of(model) or MaskSet({}), MaskSet)
