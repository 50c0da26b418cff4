"""EdgeGaussians: losses by hand, what stays, growth and curves, refusals, a small training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zoo.errors import ConfigError
from zoo.neural3d.cameras import orbit
from zoo.neural3d.edges import fitted, grown, kept_points, precision_recall, tangents, write_curves
from zoo.neural3d.methods.edge_gaussians import (
    EdgeGaussians,
    EdgePoints,
    direction_loss,
    edge_values,
    neighbours,
    on_edges,
    ratio_loss,
)
from zoo.neural3d.views import View


def bar(size: int = 24, count: int = 4) -> list[View]:
    """Maps of a vertical bar through (0.5, 0.5, 0.5), half a unit long."""
    views = []
    for camera in orbit(torch.full((3,), 0.5), 3.0, count, (size, size), field_of_view=0.5):
        points = torch.full((60, 3), 0.5)
        points[:, 1] += torch.linspace(-0.25, 0.25, 60)
        seen = points @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
        flat = seen @ camera.intrinsics.T
        x, y = (flat[:, :2] / flat[:, 2:]).floor().long().unbind(1)
        image = torch.zeros(size, size, 1)
        image[y, x] = 1
        views.append(View(camera, image))
    return views


def test_losses_by_hand() -> None:
    scales = torch.tensor([[math.log(4.0), 0.0, math.log(2.0)], [0.0, 0.0, -5.0]])
    assert float(ratio_loss(scales)) == pytest.approx((0.5 + 1.0) / 2)
    means = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0]])
    near = torch.tensor([[1], [0], [1]])
    directions = torch.tensor([[-1.0, 0, 0], [0.6, 0.8, 0], [1, 0, 0]])
    assert float(direction_loss(means, directions, near)) == pytest.approx(1 - (1 + 0.6 + 0) / 3)
    assert neighbours(means, 1)[:, 0].tolist() in ([1, 0, 1], [1, 2, 1])  # itself is none of them


def test_the_longest_axis_is_the_direction() -> None:
    points = EdgePoints(2, seed=1)
    with torch.no_grad():
        points.scales[:] = torch.tensor([[-5.0, -2, -5], [-1, -4, -4]])
        half = math.sqrt(0.5)
        points.quats[:] = torch.tensor([[1.0, 0, 0, 0], [half, 0, 0, half]])  # a quarter turn round z
    torch.testing.assert_close(points.directions().abs(), torch.tensor([[0.0, 1, 0], [0, 1, 0]]))


def test_a_bar_is_found() -> None:
    views = bar()
    points = EdgeGaussians(count=150, steps=120).fit(views)
    means, opacities = points.means.detach(), points.opacities.detach().sigmoid()
    kept = kept_points(means, opacities, edge_values(means, views))
    truth = torch.full((50, 3), 0.5)
    truth[:, 1] += torch.linspace(-0.25, 0.25, 50)
    found, _ = precision_recall(means[kept], truth, 0.06)
    before, _ = precision_recall(EdgePoints(150).means.detach(), truth, 0.06)
    assert bool(kept.any()) and found > before + 0.3
    assert float(on_edges(truth, views).mean()) > 0.85
    assert float(on_edges(truth + torch.tensor([0.3, 0, 0.3]), views).mean()) < 0.5


def test_growth_stops_at_corners_and_curves_are_told_from_lines(tmp_path: Path) -> None:
    place = torch.linspace(0, 1, 30)
    line = torch.stack([place, 0 * place, 0 * place], 1)
    rise = torch.stack([torch.ones(30), place, 0 * place], 1)[1:]
    ahead = torch.tensor([1.0, 0, 0]).repeat(30, 1), torch.tensor([0.0, 1, 0]).repeat(29, 1)
    groups = grown(torch.cat([line, rise]), torch.cat(ahead))
    assert sorted(len(group) for group in groups) == [29, 30]
    straight = fitted(line)
    assert len(straight.controls) == 2 and straight.points == 30
    ends = straight.controls[straight.controls[:, 0].argsort()]
    torch.testing.assert_close(ends, torch.tensor([[0.0, 0, 0], [1, 0, 0]]), atol=1e-5, rtol=0)
    angle = place * math.pi / 2
    arc = torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)
    bend = fitted(arc)
    assert len(bend.controls) == 4
    assert float((bend.sampled().norm(dim=1) - 1).abs().max()) < 0.02
    write_curves(tmp_path / "curves.json", [straight, bend])
    written = json.loads((tmp_path / "curves.json").read_text())
    assert [len(written["lines"]), len(written["cubic_beziers"])] == [1, 1]
    assert grown(line[:3], ahead[0][:3]) == []


def test_measures_by_hand() -> None:
    truth = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    assert precision_recall(torch.tensor([[0.01, 0, 0], [0.5, 0, 0]]), truth) == (0.5, 0.5)
    assert precision_recall(torch.zeros(0, 3), truth) == (0.0, 0.0)
    line = torch.stack([torch.linspace(0, 1, 50), torch.zeros(50), torch.zeros(50)], 1)
    assert float(tangents(torch.tensor([[0.3, 0.01, 0]]), line)[0, 0].abs()) == pytest.approx(1.0)


def test_what_is_refused() -> None:
    views = bar()
    method = EdgeGaussians(count=5, steps=1)
    with pytest.raises(ConfigError, match="three views"):
        method.fit(views[:2])
    with pytest.raises(ConfigError, match="edges are bright"):
        method.fit([*views[:3], replace(views[3], image=1 - views[3].image)])
    with pytest.raises(ConfigError, match="from 0 to 1"):
        method.fit([*views[:3], replace(views[3], image=views[3].image * 255)])
    with pytest.raises(ConfigError, match="no edge pixel"):
        method.fit([replace(view, image=0 * view.image) for view in views])
