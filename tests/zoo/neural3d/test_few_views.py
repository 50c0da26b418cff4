"""Methods of few views: their defining steps by hand, what they make, and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from zoo.errors import ConfigError, DataError
from zoo.neural3d.cameras import lens, look_at, orbit
from zoo.neural3d.few import few
from zoo.neural3d.hull import cube, pixels_of, sampled, shell, visual_hull
from zoo.neural3d.methods.coherent_gs import (
    CoherentGS,
    Decoder,
    PairedViews,
    PixelScene,
    aligned,
    flow_loss,
    flow_of,
    flows_between,
    layer_masks,
)
from zoo.neural3d.methods.gaussian_object import GaussianObject, hull_points, stray
from zoo.neural3d.methods.lm_gaussian import LMGaussian, between, cloud_pictures, normals
from zoo.neural3d.methods.sparse_nerf import SparseNeRF, quadruples
from zoo.neural3d.priors import back_projected, cloud, known_depth, pearson, ranking
from zoo.neural3d.refine import scene_job
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.shapes import BALLS, view_of
from zoo.neural3d.views import View
from zoo.registry import METHODS, STUDIES


@pytest.fixture(scope="module")
def views() -> list[View]:
    """Three views of an arc, 24 pixels."""
    cameras = orbit(torch.tensor([0.0, -0.3, 0.0]), 3.6, 18, (24, 24), field_of_view=0.75, elevations=(0.5,))
    return [view_of(camera, str(number)) for number, camera in enumerate(cameras[:3])]


@pytest.fixture(scope="module")
def start(views: list[View]) -> GaussianScene:
    return cloud(views, 60, 0, (1.0, 1.0, 1.0))


def coherent_job(views: list[View], **changes: int):
    flows = flows_between(views)
    return scene_job(views, **changes).replace(batches=PairedViews(views, flows)), flows


def test_losses_by_hand() -> None:
    near, far = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    assert float(ranking(near, far, 0.1)) == pytest.approx((0.0 + 1.1) / 2)
    assert float(ranking(far, near, 0.1)) == pytest.approx((0.6 + 0.0) / 2)  # the sign counts
    x = torch.tensor([1.0, 2.0, 4.0])
    assert float(pearson(x, 3 * x + 1)) == pytest.approx(0, abs=1e-4)
    assert float(pearson(x, -x)) == pytest.approx(2, abs=1e-4)
    assert float(pearson(x, torch.ones(3))) == 1.0


@pytest.mark.parametrize("near_is_larger", [True, False])
def test_pairs_are_ordered_by_the_prior(near_is_larger: bool) -> None:
    torch.manual_seed(0)
    prior = torch.arange(1.0, 145).reshape(12, 12)
    prior[3, 3] = 0  # unknown
    found = quadruples(prior, 200, 6, near_is_larger)
    flat = prior.flatten()
    near, far = flat[found[:, 0]], flat[found[:, 1]]
    assert len(found) > 150 and bool(((near > far) == near_is_larger).all())
    assert bool((flat[found] != 0).all())
    rows, columns = found // 12, found % 12
    assert int((rows[:, 0] - rows[:, 1]).abs().max()) < 6 > int((columns[:, 0] - columns[:, 1]).abs().max())
    for one, partner in ((0, 2), (1, 3)):
        apart = torch.stack([rows[:, one] - rows[:, partner], columns[:, one] - columns[:, partner]]).abs()
        assert int(apart.max()) <= 3 and bool(apart.sum(0).min() > 0)
        # Of 48 neighbours the 30 % most alike: here those of the same row and of the rows beside it.
        inner = (rows[:, one] > 3) & (rows[:, one] < 8) & (columns[:, one] > 3) & (columns[:, one] < 8)
        assert bool((apart[0][inner] <= 1).all())
    assert len(quadruples(torch.ones(12, 12), 50, 6, True)) == 0  # ties are left out


def test_the_hull_of_a_ball_and_its_shell() -> None:
    k = lens(40, 40, 0.6)
    ball = torch.tensor([[0.1, 0.0, -0.1]])
    masked = []
    for eye in ((3.0, 0.3, 0), (0, 0.3, 3), (-2, 0.3, -2)):
        camera = look_at(torch.tensor(eye), torch.zeros(3), k, 40, 40, (0, -1, 0))
        origin, rays = camera.rays()
        miss = torch.linalg.cross((ball[0] - origin).expand_as(rays), rays).norm(dim=-1)
        masked.append(View(camera, torch.zeros(40, 40, 3), (miss < 0.5).float(), name=str(eye)))
    points = cube(torch.zeros(3), 1.0, 24)
    inside = visual_hull(masked, points)
    assert bool(inside[(points - ball).norm(dim=1) < 0.42].all())
    assert not inside[(points - ball).norm(dim=1) > 1.0].any()
    assert visual_hull(masked, points, 1).sum() > inside.sum()
    body = torch.zeros(5, 5, 5, dtype=torch.bool)
    body[1:4, 1:4, 1:4] = True
    assert int(shell(body).sum()) == 26 and not shell(body)[2, 2, 2]
    place, depth = pixels_of(masked[0].camera, torch.zeros(1, 3))
    torch.testing.assert_close(place, torch.tensor([[20.0, 20.0]]), atol=1e-4, rtol=0)
    assert float(depth) == pytest.approx(math.hypot(3, 0.3), rel=1e-5)
    behind = 2 * masked[0].camera.centre[None]
    assert float(sampled(torch.ones(40, 40, 1), masked[0].camera, behind)) == 0.0
    with pytest.raises(DataError, match="needs a mask"):
        visual_hull([dataclasses.replace(masked[0], mask=None)], points)
    with pytest.raises(DataError, match="not empty"):
        visual_hull([dataclasses.replace(masked[0], mask=torch.zeros(40, 40))], points)
    with pytest.raises(DataError, match="needs 3 views"):
        visual_hull(masked[:2], points, 1)
    with pytest.raises(DataError, match="the hull is empty"):
        visual_hull(masked, points + 10)


def test_a_floater_strays() -> None:
    grid = torch.stack(torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij"), -1).reshape(-1, 3)
    means = torch.cat([grid, torch.tensor([[40.0, 0, 0]])])
    found = stray(means, 2.0)
    assert int(found.sum()) == 1 and bool(found[-1])
    assert not stray(means, 1e9).any()


def test_flow_depth_and_alignment(views: list[View]) -> None:
    assert few(views, 2) == [views[0], views[2]] and few(views, 1) == views[:1]
    place, seen = flow_of(views[0], views[1])
    points, _ = back_projected(views[0])
    wanted = pixels_of(views[1].camera, points)[0]
    torch.testing.assert_close(place[views[0].depth > 0], wanted, atol=1e-3, rtol=0)
    assert 0.15 < float(seen.double().mean()) < float((views[0].depth > 0).double().mean())
    ground = points[points[:, 1].abs() < 1e-3]
    on_ball = (points - BALLS[0, :3]).norm(dim=1) - BALLS[0, 3]
    assert len(ground) > 50 and int((on_ball.abs() < 1e-3).sum()) > 20
    prior = [
        dataclasses.replace(view, depth=scale * view.depth + shift * (view.depth > 0))
        for view, scale, shift in zip(views, (0.9, 1.1, 1.0), (0.2, 0.0, -0.2), strict=True)
    ]
    job, flows = coherent_job(views)
    torch.manual_seed(0)
    pixels = PixelScene(prior, torch.ones(3), 5, 0)
    before = float(flow_loss(pixels, flows).detach())
    aligned(pixels, job, 300, flows)
    assert float(flow_loss(pixels, flows).detach()) < 0.3 * before
    for number, view in enumerate(views):
        known = view.depth > 0
        error = ((pixels.depths()[number] - view.depth).abs() / view.depth.clamp_min(0.1))[known].mean()
        assert float(error.detach()) < 0.05


def test_layers_and_the_decoder() -> None:
    depth = torch.arange(1.0, 101).reshape(1, 10, 10)
    depth[0, 0, 0] = 0
    masks = layer_masks(depth, 5)
    assert masks.shape == (1, 5, 10, 10) and sorted(masks.sum((0, 2, 3)).tolist()) == [19, 20, 20, 20, 20]
    assert bool((masks.sum(1) == (depth > 0)).all())
    assert int(masks[0, 0, 9].sum()) == 10  # the first layer is the farthest
    decoder = Decoder(5, 4, 21, 17)
    first, last = decoder(0.0), decoder(1.0)
    assert first.shape == (5, 21, 17) and not torch.equal(first, last)


def test_normals_and_views_between() -> None:
    camera = look_at(torch.tensor([0.0, 0, -2]), torch.zeros(3), lens(16, 16, 0.8), 16, 16, (0, -1, 0))
    flat = normals(torch.full((16, 16), 2.0), camera)
    torch.testing.assert_close(flat.abs(), torch.tensor([0.0, 0, 1]).expand(15, 15, 3), atol=1e-4, rtol=0)
    other = look_at(torch.tensor([2.0, 0, 0]), torch.zeros(3), lens(16, 16, 0.8), 16, 16, (0, -1, 0))
    middle = between(camera, other, 0.5)
    torch.testing.assert_close(middle.centre, torch.tensor([1.0, 0, -1]), atol=1e-4, rtol=0)
    ahead = middle.viewmat[2, :3]
    torch.testing.assert_close(
        ahead, functional.normalize(torch.tensor([-1.0, 0, 1]), dim=0), atol=1e-4, rtol=0
    )


def test_each_method_fits_and_leaves_its_start(views: list[View], start: GaussianScene) -> None:
    kept = start.means.detach().clone()
    job = scene_job(views, steps=3)
    for method in (SparseNeRF(near_is_larger=False, box=12), GaussianObject(every=1), LMGaussian(between=2)):
        made = method.sparsify(start, job)
        again = method.sparsify(start, job)
        assert torch.equal(made.model.means, again.model.means), type(method).__name__
        assert torch.equal(start.means, kept)
        assert not torch.equal(made.model.sh0, start.sh0)
    assert isinstance(made.model, GaussianScene) and len(made.model) == 60
    coherent, _ = coherent_job(views, steps=3)
    for motion in ("decoder", "ray", "free"):
        made = CoherentGS(motion=motion, align=2).sparsify(start, coherent)
        assert len(made.model) == sum(int((view.depth > 0).sum()) for view in views)
        assert made.extras["affine/scale-and-shift"].shape == (2, 3) and made.arguments["count"] == len(
            made.model
        )
    splats = hull_points(views, 50, 0, 0, side=24)
    assert len(splats) == 50 and float(splats.means[:, ::2].norm(dim=1).max()) < 3.0
    with torch.no_grad():
        assert len(cloud_pictures(start, views, 3)) == 3


def test_what_methods_of_few_views_refuse(views: list[View], start: GaussianScene) -> None:
    job = scene_job(views, steps=2)
    coherent, _ = coherent_job(views, steps=2)
    for name in ("sparse-nerf", "coherent-gs", "gaussian-object", "lm-gaussian"):
        assert STUDIES.get(name).name == name
        with pytest.raises(ConfigError, match="a scene of Gaussians to start from; received Linear"):
            METHODS.get(name)().sparsify(nn.Linear(2, 2), job)
    with pytest.raises(ConfigError, match="say near_is_larger"):
        SparseNeRF().sparsify(start, job)
    with pytest.raises(ConfigError, match="box >= 2"):
        SparseNeRF(near_is_larger=True, box=1).sparsify(start, job)
    blind = scene_job([dataclasses.replace(view, depth=None) for view in views])
    with pytest.raises(ConfigError, match="has no depth"):
        LMGaussian().sparsify(start, blind)
    for value, message in ((-1.0, "below zero"), (math.nan, "not finite"), (None, "the same everywhere")):
        depth = views[0].depth.clone() if value is not None else torch.ones(24, 24)
        if value is not None:
            depth[5, 5] = value
        with pytest.raises(ConfigError, match=message):
            known_depth(dataclasses.replace(views[0], depth=depth))
    with pytest.raises(ConfigError, match="weights of 0 or more"):
        LMGaussian(normal=-1.0).sparsify(start, job)
    with pytest.raises(ConfigError, match="between two views"):
        cloud_pictures(start, views[:1], 3)
    away = start.like(start.splats)
    with torch.no_grad():
        away.means.add_(1e4)
    with pytest.raises(ConfigError, match="no virtual view sees a point"):
        cloud_pictures(away, views, 3)
    with pytest.raises(ConfigError, match="every >= 1"):
        GaussianObject(every=0).sparsify(start, job)
    with pytest.raises(ConfigError, match="flow from view 0 to 1"):
        CoherentGS().sparsify(start, job)
    with pytest.raises(ConfigError, match="motion is decoder"):
        CoherentGS(motion="up").sparsify(start, coherent)
    with pytest.raises(ConfigError, match="two to four views of one size"):
        CoherentGS().sparsify(start, scene_job(views[:1]))
    with pytest.raises(DataError, match="cannot be taken"):
        few(views, 4)
