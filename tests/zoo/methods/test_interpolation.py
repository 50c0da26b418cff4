"""Interpolation: sharpness and barriers of known losses by hand, pruned changes, ends that are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.methods.interpolation import barriers, between, check_ends, mended, sharpness, stragglers
from zoo.shared.errors import BudgetError


class Weights(nn.Module):
    """Two layers of one row."""

    def __init__(self, one: list[float], two: list[float]) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.tensor(one)), nn.Parameter(torch.tensor(two))


def state(one: list[float], two: list[float]) -> dict[str, torch.Tensor]:
    return {"one": torch.tensor(one), "two": torch.tensor(two)}


def test_the_line_by_hand():
    first, last = state([0.0, 4.0], [1.0]), state([2.0, 0.0], [5.0])
    assert between(first, last, 0.25)["one"].tolist() == [0.5, 3.0]
    part = between(first, last, 0.25, ("one",))
    assert part["one"].tolist() == [0.5, 3.0] and part["two"].tolist() == [5.0]


def test_sharpness_is_the_largest_rise_within_a_share_of_each_weight():
    model = Weights([2.0, -3.0], [1.0])
    # of w1 - 2 w2 + 10 w3: 0.1 (2 + 2 * 3 + 10 * 1)
    loss = lambda m: m.one[0] - 2 * m.one[1] + 10 * m.two[0]  # noqa: E731
    assert sharpness(model, loss, 0.1, 4) == pytest.approx(1.8, abs=1e-5)
    assert sharpness(model, loss, 0.1, 4, ["one"]) == pytest.approx(0.8, abs=1e-5)
    assert model.one.tolist() == [2.0, -3.0]
    assert sharpness(model, lambda m: -m.two.square().sum(), 0.1, 4) > 0  # a fall of |w| is a rise of this


def test_the_layer_with_a_hill_on_its_line_is_the_straggler():
    model, first, last = Weights([0.0], [0.0]), state([-1.0], [-1.0]), state([1.0], [1.0])
    # one: 1 - w^2 has its hill of 1 in the middle; two is straight
    found = barriers(model, first, last, ["one", "two"], lambda m: (1 - m.one.square() + 2 * m.two).sum(), 3)
    assert found == pytest.approx({"one": 1.0, "two": 0.0}, abs=1e-6)
    assert stragglers(found, 1) == ["one"]


def test_only_the_largest_changes_of_stragglers_stay():
    first, last = state([1.0, 1.0, 1.0, 1.0], [0.0]), state([1.5, -4.0, 2.0, 1.1], [7.0])
    made = mended(first, last, ["one"], 0.5)
    assert made["one"].tolist() == [1.0, -4.0, 2.0, 1.0] and made["two"].tolist() == [7.0]
    with pytest.raises(BudgetError):
        mended(first, last, ["one"], 1.0)


def test_ends_that_no_line_joins_are_refused():
    model = Weights([0.0], [0.0])
    check_ends(model, state([1.0], [1.0]), state([2.0], [2.0]))
    with pytest.raises(ConfigError, match="'one' differs"):
        check_ends(model, state([1.0, 2.0], [1.0]), state([2.0], [2.0]))
    with pytest.raises(ConfigError, match="'two' differs"):
        check_ends(model, state([1.0], [1.0]), {"one": torch.ones(1)})
    norm = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(ConfigError, match="one end only"):
        check_ends(norm, norm.state_dict(), norm.state_dict())
