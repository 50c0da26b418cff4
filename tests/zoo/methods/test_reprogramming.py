"""Reprogramming: the greedy map, the frame, frozen sources, calibration by hand, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError, DataError
from zoo.methods.conformance import plain_network, quarter_images
from zoo.methods.reprogramming import Probe, Prompt, calibration_error, class_map, train_probe, train_prompt
from zoo.shared.train import Job, Recipe


def test_the_map_takes_the_largest_count_first():
    # counts of (source, target): (0, 0): 3, (0, 1): 2, (1, 0): 2, (2, 1): 1
    predicted = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    labels = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1])
    assert class_map(predicted, labels, 3, 2).tolist() == [0, 2]
    with pytest.raises(ConfigError, match="3 target classes cannot be read from 2"):
        class_map(predicted, labels, 2, 3)
    with pytest.raises(DataError, match="target class 1 has no sample"):
        class_map(predicted, labels * 0, 3, 2)


class Pixels(nn.Module):
    """Logits that are the mean of each channel's corner, and of its middle."""

    def forward(self, x):
        return torch.stack([x[:, 0, 0, 0], x[:, 0, 2, 2]], 1)


def test_the_frame_begins_grey_and_the_image_is_in_its_middle():
    prompt = Prompt(Pixels(), 4, 1, torch.tensor([0.5]), torch.tensor([0.25]), 2)
    found = prompt(torch.full((1, 1, 2, 2), 0.75))
    assert found[0].tolist() == [0.0, 1.0]
    found[:, 0].sum().backward()
    assert prompt.border.grad[0, 0, 0] == 1.0  # sigmoid'(0) / 0.25
    assert prompt.border.grad[0, 1:3, 1:3].abs().sum() == 0
    prompt.places = torch.tensor([1, 0])
    assert prompt(torch.full((1, 1, 2, 2), 0.75))[0].tolist() == [1.0, 0.0]
    with pytest.raises(ConfigError, match="not larger than images of 4x4"):
        prompt(torch.zeros(1, 1, 4, 4))


def test_calibration_is_weighed_by_the_samples_of_a_bin():
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.55, 0.45], [0.45, 0.55]]).log()
    # two sure of 0.9, one right: |1 - 1.8|; two sure of 0.55, both right: |2 - 1.1|; over 4
    found = calibration_error(logits, torch.tensor([0, 1, 0, 1]))
    assert found == pytest.approx((0.8 + 0.9) / 4, abs=1e-5)
    assert calibration_error(torch.tensor([[50.0, 0.0]]), torch.tensor([0])) == pytest.approx(0.0, abs=1e-6)


def test_sources_stay_bit_for_bit_and_in_eval_mode():
    x, y = quarter_images(32)
    net = plain_network(0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    recipe = Recipe(epochs=2, lr=0.05, batch=16, optimizer="adam", weight_decay=0.0)
    small, labels = (x.sigmoid()[:, :, 2:6, 2:6], y % 2)
    job = Job([(small[:16], labels[:16]), (small[16:], labels[16:])], recipe=recipe)
    prompt = Prompt(net, 8, 3, torch.zeros(3), torch.ones(3), 2)
    trained = train_prompt(prompt, small, labels, job)
    assert bool((trained.border != 0).any()) and len(set(trained.places.tolist())) == 2
    probe = train_probe(Probe(net, 2, 0), job.replace(batches=[(x, labels)]))
    assert probe(x).shape == (32, 2)
    for made in (trained, probe):
        assert not made.train().net.training
        same = {name.removeprefix("net."): value for name, value in made.state_dict().items()}
        assert all(
            torch.equal(same[n], v) for n, v in before.items() if same[n].shape == v.shape and "11" not in n
        )
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
