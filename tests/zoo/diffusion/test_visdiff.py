"""VisDiff: polygons, visibility, distances and the losses by hand, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.diffusion.networks import visdiff  # noqa: E402
from zoo.diffusion.networks.polygons import (  # noqa: E402
    aligned,
    border,
    crossed,
    draw_polygons,
    f1,
    inside,
    is_simple,
    posed,
    rasterised,
    require_simple,
    signed_distance,
    traced,
    untangled,
    visibility,
)
from zoo.diffusion.networks.visdiff import VisDiff, looked_up, polygon_loss, sight_loss  # noqa: E402
from zoo.diffusion.studies import visdiff as study  # noqa: E402
from zoo.diffusion.studies.quarters import quarters  # noqa: E402
from zoo.errors import ConfigError, DataError  # noqa: E402
from zoo.shared.train import Recipe  # noqa: E402

SQUARE = torch.tensor([[[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]]])
#: An arrowhead: 0 right, 1 up, 2 the reflex vertex, 3 down. 1 and 3 do not see each other.
ARROW = torch.tensor([[[1.0, 0.0], [-0.5, 0.8], [0.0, 0.0], [-0.5, -0.8]]])


@pytest.fixture
def model() -> VisDiff:
    return VisDiff.fresh(0, vertices=5, side=12, patch=3, width=8, depth=1).eval()


def test_visibility_by_hand() -> None:
    assert visibility(SQUARE)[0].int().tolist() == [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]
    assert visibility(ARROW)[0].int().tolist() == [[0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 1], [1, 0, 1, 0]]
    # A U of 8 vertices: its ends see nothing of each other, though their segment crosses the gap only.
    u = torch.tensor([[[0.0, 0], [3, 0], [3, 3], [2, 3.1], [2, 1], [1, 1.1], [1, 3.2], [0, 3]]])
    seen = visibility(u)[0]
    assert not seen[2, 6] and not seen[3, 6] and seen[0, 1] and seen[4, 5] and seen[1, 3] and seen[0, 5]
    assert torch.equal(seen, seen.T)


def test_crossings_and_simplicity_by_hand() -> None:
    a, b = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[2.0, 0.1]]])
    assert crossed(a, b, SQUARE)[0, 0].tolist() == [False, False, False, True]
    bow = SQUARE[:, [0, 2, 1, 3]]
    assert is_simple(SQUARE).tolist() == [True] and is_simple(bow).tolist() == [False]
    assert is_simple(untangled(bow)).tolist() == [True]
    assert inside(torch.tensor([[[0.0, 0.0], [0.6, 0.0], [-0.4, 0.45]]]), SQUARE).tolist() == [
        [True, False, True]
    ]


def test_distances_by_hand() -> None:
    points = torch.tensor([[[0.0, 0.1], [1.0, 0.0], [1.5, 1.5]]])
    found = signed_distance(points, SQUARE)[0]
    torch.testing.assert_close(found, torch.tensor([-0.4, 0.5, math.sqrt(2)]), atol=1e-5, rtol=0)
    field = rasterised(SQUARE, 23)  # steps of 0.1
    assert field[0, 0, 11, 11] == pytest.approx(-0.5) and field[0, 0, 11, 21] == pytest.approx(0.5)
    assert float(looked_up(field, torch.tensor([[[0.25, 0.0]]]))) == pytest.approx(-0.25, abs=1e-5)
    assert torch.equal(
        rasterised(ARROW, 23)[0, 0, 11, 16:21] < 0, torch.tensor([True] * 5)
    )  # x from 0.5 to 0.9


def test_the_zero_line_is_traced() -> None:
    line = traced(rasterised(SQUARE, 23), 40)[0]
    assert (signed_distance(line[None], SQUARE).abs() < 0.05).all()  # corners are cut
    gaps = (line.roll(-1, 0) - line).norm(dim=1)
    assert gaps.max() < 0.11 and gaps.min() > 0.05  # 40 points on a border of 4
    assert traced(torch.linspace(1, 2, 64).view(1, 1, 8, 8), 6).shape == (1, 6, 2)  # nowhere zero


def test_drawn_polygons_are_simple_and_posed() -> None:
    made = draw_polygons(40, 9, torch.Generator().manual_seed(0))
    assert is_simple(made).all() and torch.equal(made, draw_polygons(40, 9, torch.Generator().manual_seed(0)))
    assert made.mean(1).abs().max() < 1e-5 and (made.norm(dim=-1).amax(1) - 1).abs().max() < 1e-5
    assert made[:, 0, 1].abs().max() < 1e-5 and (made[:, 0, 0] > 0).all()
    x, y = made.unbind(-1)
    assert ((x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1) > 0).all()  # counter-clockwise
    assert torch.equal(visibility(posed(made)), visibility(made))
    assert 0.3 < float((visibility(made) & ~border(9)).float().sum() / 40 / 54) < 0.9


def test_f1_counts_no_neighbours() -> None:
    one = border(5)[None].clone()
    two = one.clone()
    one[0, 0, 2] = one[0, 2, 0] = one[0, 1, 3] = one[0, 3, 1] = True
    two[0, 0, 2] = two[0, 2, 0] = True
    assert f1(one, two).tolist() == [pytest.approx(2 / 3)] and f1(
        border(5)[None], border(5)[None]
    ).tolist() == [1]
    assert quarters(torch.arange(8.0), torch.arange(8.0).flip(0)) == [6.5, 4.5, 2.5, 0.5]


def test_losses_by_hand(model, monkeypatch) -> None:
    graph = torch.ones(1, 4, 4, dtype=torch.bool) & ~torch.eye(4, dtype=torch.bool)
    # Two pairs: largest distances -0.1 and 0.2, logits 2 and -4; both are visible.
    distances = torch.tensor([[-0.3, -0.1, -0.2, 0.2]])
    known = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(4))) / 2
    assert float(sight_loss(distances, graph)) == pytest.approx(known, rel=1e-5)
    five = draw_polygons(1, 5, torch.Generator().manual_seed(0))
    true, field, graphs, contour = visdiff.learned_from(five, 12)
    near = torch.cdist(true, contour).argmin(-1)
    points = torch.zeros_like(contour)
    points[0, near[0]] = true[0] + 0.2
    right = torch.full(contour.shape[:2], -40.0)
    right[0, near[0]] = math.log(math.e - 1) * -1  # a loss of 1 at each vertex, 0 elsewhere
    monkeypatch.setattr(VisDiff, "forward", lambda self, *_: (field + 0.5, right, points))
    monkeypatch.setattr(visdiff, "sight_loss", lambda *_: torch.tensor([3.0]))
    sigma = torch.tensor([0.25])
    loss = polygon_loss(model, (field, sigma, graphs, contour, field, true))
    share = len(set(near[0].tolist())) / contour.shape[1]
    assert float(loss) == pytest.approx(0.25 + 0.75**2 * (4 * 0.04 + 0.1 * share + 0.1 * 3), rel=1e-5)


def test_the_sampler_follows_the_estimate(model, monkeypatch) -> None:
    """With an estimate that never moves every sampler ends at it."""
    goal = rasterised(draw_polygons(2, 5, torch.Generator().manual_seed(0)), 12)
    monkeypatch.setattr(model, "estimate", lambda x, sigmas, tokens: goal)
    seen = []
    monkeypatch.setattr(model, "extract", lambda field, *_: seen.append(field) or field[:, 0, :5, :2])
    model.reconstruct(visibility(draw_polygons(2, 5, torch.Generator().manual_seed(0))), steps=3)
    torch.testing.assert_close(seen[0], goal, atol=1e-5, rtol=0)


def test_training_moves_all_parts_and_sampling_repeats(monkeypatch) -> None:
    monkeypatch.setattr(
        visdiff, "polygons", lambda part, v: draw_polygons(8, v, torch.Generator().manual_seed(0))
    )
    network = VisDiff.fresh(0, vertices=5, side=12, patch=3, width=8, depth=1)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.learn("polygons", recipe=Recipe(steps=3, lr=1e-2, batch=4, optimizer="adam"))
    moved = {
        name.partition(".")[0] for name, p in network.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == {name.partition(".")[0] for name in before}
    graphs = visibility(draw_polygons(3, 5, torch.Generator().manual_seed(1)))
    made = [
        network.reconstruct(graphs, steps=2, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2]) and made[0].shape == (3, 5, 2)


def test_picked_points_and_numbering_by_hand() -> None:
    points = torch.arange(12.0).view(1, 6, 2)
    logits = torch.tensor([[5.0, 4.0, 0.0, 1.0, 2.0, 4.5]])  # 0, then 4 (5 and 1 are its neighbours), then 2
    assert visdiff.corners(logits, points, 3)[0, :, 0].tolist() == [0.0, 4.0, 8.0]
    torch.testing.assert_close(
        aligned(ARROW.roll(1, 1), visibility(ARROW)).sort(1).values, ARROW.sort(1).values
    )
    turned = aligned(ARROW.roll(1, 1), visibility(ARROW))
    assert f1(visibility(ARROW.roll(1, 1)), visibility(ARROW)).tolist() == [0.0]
    assert f1(visibility(turned), visibility(ARROW)).tolist() == [1.0]


def test_the_nearest_graph_is_found_at_any_first_vertex() -> None:
    known = draw_polygons(6, 7, torch.Generator().manual_seed(0))
    asked = visibility(known.roll(3, 1))
    assert f1(visibility(study.nearest(asked, known)), asked).tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[:, :4, :4], r"\[n, 5, 5\].*\[1, 4, 4\]"),
        (lambda g: g.float() * 2, "symmetric, of 0 and 1"),
        (lambda g: g & torch.ones(5, 5, dtype=torch.bool).triu(), "symmetric"),
        (lambda g: g | torch.eye(5, dtype=torch.bool), "diagonal"),
        (lambda g: g & ~border(5), "border"),
    ],
)
def test_graphs_that_are_refused(model, change, message) -> None:
    with pytest.raises(DataError, match=message):
        model.reconstruct(change(visibility(draw_polygons(1, 5, torch.Generator().manual_seed(0)))))


def test_what_else_is_refused(model) -> None:
    with pytest.raises(DataError, match="polygon 0 crosses itself"):
        visdiff.learned_from(SQUARE[:, [0, 2, 1, 3]], 12)
    with pytest.raises(DataError, match="finite"):
        require_simple(SQUARE * torch.nan)
    with pytest.raises(ConfigError, match="received 10, 3"):
        VisDiff(side=10)
    with pytest.raises(DataError, match="'houses'"):
        model.make_job("houses")
