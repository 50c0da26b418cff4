"""Turbo-VBI: messages against enumeration, the closed forms of precision and belief, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from zoo.errors import ConfigError
from zoo.methods.turbo_vbi import Belief, Noisy, TurboVBI, divergence, from_neighbours, messages


def test_messages_of_a_chain_are_its_exact_extrinsics():
    unary, p01, p11 = torch.tensor([[1.0, -0.5, 0.3, -2.0]]), 0.2, 0.7
    expected = []
    for place in range(4):
        odds = [0.0, 0.0]
        for states in itertools.product((0, 1), repeat=4):
            weight = 1.0
            for before, after in itertools.pairwise(states):
                one = p11 if before else p01
                weight *= one if after else 1 - one
            others = sum(float(unary[0, i]) * s for i, s in enumerate(states) if i != place)
            odds[states[place]] += weight * math.exp(others)
        expected.append(math.log(odds[1] / odds[0]))
    assert messages(unary, p01, p11)[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_neighbours_that_are_active_speak_for_a_weight():
    grid = torch.full((5, 5), -2.0)
    grid[2], grid[:, 2], grid[2, 2] = 3.0, 3.0, 0.0
    said = from_neighbours(grid, 0.1, 0.8)
    alone = from_neighbours(torch.full((5, 5), -2.0), 0.1, 0.8)
    assert said[2, 2] > alone[2, 2] + 1 and said[1, 1] > alone[1, 1] + 0.5
    louder = grid.clone()
    louder[2, 2] = 5.0  # its own message does not come back within its row
    assert messages(louder, 0.1, 0.8)[2, 2] == messages(grid, 0.1, 0.8)[2, 2]


def test_beliefs_follow_the_size_of_a_weight():
    start = torch.full((2,), math.log(0.2 / 0.8))
    state = Belief(start, start.clone(), torch.ones(2))
    for _ in range(2):
        state.update(torch.tensor([1.0, 1e-6]), (1.0, 0.1), (1.0, 1e-4))
    # all active: shape 1.5, rate 0.5 + 0.1; all idle: rate 5e-7 + 1e-4
    assert state.precision.tolist() == pytest.approx([1.5 / 0.6, 1.5 / 1.005e-4], rel=0.1)
    assert state.belief[0] > 2 and state.belief[1] < -2


def test_the_divergence_by_hand():
    mean, deviation = torch.tensor([2.0]), torch.tensor([0.5])
    # half of 4 (4 + 0.25) - 1 - ln 0.25 - ln 4
    assert divergence(mean, deviation, torch.tensor([4.0])).item() == pytest.approx(8.0)
    noisy = Noisy(torch.zeros(3))
    assert torch.equal(noisy.eval()(torch.ones(3)), torch.ones(3))
    assert not torch.equal(noisy.train()(torch.ones(3)), torch.ones(3))


def test_what_swaps_the_roles_is_refused(net, job):
    for options in ({"idle": 0.2}, {"p11": 1.0}, {"p01": 0.0}, {"start": 1.0}):
        with pytest.raises(ConfigError, match="idle weights must|chances between"):
            TurboVBI(0.5, **options).sparsify(net, job)
    made = TurboVBI(0.5, rounds=1).sparsify(net, job)
    assert set(made.model.state_dict()) == set(net.state_dict()) and made.masks.sparsity() == 0.5
