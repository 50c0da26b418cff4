"""Rows that come and go while they train: values, moments by hand, and steps after the change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.shared.errors import MaskError, OptimizerStateError
from zoo.shared.structure.resize import RowResizer


class Points(nn.Module):
    """Three points with a place each and an opacity each."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]))
        self.opacity = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))


def trained(kind=torch.optim.Adam, **options):
    """Points after one step with gradient 1, 2, 3 for the rows of place and 1 for every opacity."""
    points = Points()
    optimizer = kind(
        [{"params": [points.place], "lr": 0.1}, {"params": [points.opacity], "lr": 0.01}], **options
    )
    points.place.grad = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    points.opacity.grad = torch.ones(3)
    optimizer.step()
    return points, optimizer, RowResizer(points, ["place", "opacity"], [optimizer])


def test_dropped_rows_take_their_moments_along() -> None:
    points, adam, rows = trained()
    rows.keep(torch.tensor([True, False, True]))
    # m = 0.1 g and v = 0.001 g^2 of the rows that stay
    state = adam.state[points.place]
    assert torch.allclose(state["exp_avg"], torch.tensor([[0.1, 0.1], [0.3, 0.3]]))
    assert torch.allclose(state["exp_avg_sq"], torch.tensor([[0.001, 0.001], [0.009, 0.009]]))
    assert float(state["step"]) == 1 and len(rows) == 2
    assert torch.allclose(points.place, torch.tensor([[-0.1, -0.1], [1.9, 1.9]]))
    assert torch.allclose(points.opacity, torch.tensor([0.09, 0.29]))


def test_new_rows_start_with_zero_moments() -> None:
    points, adam, rows = trained()
    rows.clone(torch.tensor([2]))
    assert torch.equal(points.place[3], points.place[2]) and torch.equal(points.opacity[3], points.opacity[2])
    assert torch.allclose(adam.state[points.opacity]["exp_avg"], torch.tensor([0.1, 0.1, 0.1, 0.0]))
    rows.split(torch.tensor([0]), {"place": torch.full((2, 2), 7.0), "opacity": torch.tensor([0.5, 0.6])})
    assert torch.allclose(points.opacity, torch.tensor([0.19, 0.29, 0.29, 0.5, 0.6]))
    expected = torch.tensor([[0.2, 0.2], [0.3, 0.3], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert torch.allclose(adam.state[points.place]["exp_avg"], expected)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
def test_rows_that_stay_step_as_if_nothing_had_happened(kind) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    (one, first, rows), (other, second, _) = trained(kind, **options), trained(kind, **options)
    rows.keep(torch.tensor([True, True, False]))
    rows.append({"place": torch.zeros(2, 2), "opacity": torch.zeros(2)})
    for points, optimizer in ((one, first), (other, second)):
        optimizer.zero_grad()
        (points.place.sum() + (points.opacity**2).sum()).backward()
        optimizer.step()
    assert torch.allclose(one.place[:2], other.place[:2]) and torch.allclose(
        one.opacity[:2], other.opacity[:2]
    )
    assert not torch.equal(one.place[2:], torch.zeros(2, 2))  # new rows train, too
    assert [g["lr"] for g in first.param_groups] == [0.1, 0.01]
    assert first.param_groups[0]["params"][0] is one.place and len(first.state) <= 2


def test_a_set_may_become_empty_and_grow_again() -> None:
    points, _, rows = trained()
    rows.keep(torch.zeros(3, dtype=torch.bool))
    assert len(rows) == 0
    rows.append({"place": torch.ones(1, 2), "opacity": torch.ones(1)})
    assert points.place.tolist() == [[1.0, 1.0]]


def test_refusals_change_nothing() -> None:
    points, adam, rows = trained()
    before = points.place
    with pytest.raises(MaskError, match="no parameter 'colour'"):
        RowResizer(points, ["colour"])
    with pytest.raises(MaskError, match="same number of rows"):
        RowResizer(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 4)), ["0.weight", "1.weight"])
    with pytest.raises(MaskError, match="bool for each of the 3 rows"):
        rows.keep(torch.ones(2, dtype=torch.bool))
    with pytest.raises(MaskError, match="needed for"):
        rows.append({"place": torch.ones(1, 2)})
    with pytest.raises(MaskError, match="new rows of 'place' must be"):
        rows.append({"place": torch.ones(1, 3), "opacity": torch.ones(1)})
    adam.state[points.opacity]["mystery"] = torch.ones(3)
    with pytest.raises(OptimizerStateError, match="'mystery'"):
        rows.clone(torch.tensor([0]))
    assert points.place is before and len(rows) == 3
