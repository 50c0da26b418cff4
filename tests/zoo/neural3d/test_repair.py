"""GaussianObject's repair: cameras between views, pairs, the diffusion model, the further training."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.errors import ConfigError
from zoo.neural3d.cameras import orbit
from zoo.neural3d.methods.repair import Repair, RepairNet, between, kept, shaken
from zoo.neural3d.networks import fresh
from zoo.neural3d.priors import cloud
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.shapes import view_of
from zoo.neural3d.views import View, middle_of_views

SMALL = Repair(without=2, learned=2, steps=4, every=2)


@pytest.fixture(scope="module")
def views() -> list[View]:
    """Four views around, not in the order of their angles."""
    cameras = orbit(torch.tensor([0.0, -0.3, 0.0]), 3.6, 4, (32, 32), field_of_view=0.75, elevations=(0.5,))
    return [view_of(cameras[number], str(number)) for number in (0, 2, 1, 3)]


@pytest.fixture(scope="module")
def start(views: list[View]) -> GaussianScene:
    return cloud(views, 60, 0, (1.0, 1.0, 1.0))


def test_cameras_between_views_go_round_the_object(views: list[View]) -> None:
    centre, distance = middle_of_views(views)
    eyes = torch.stack([view.camera.centre for view in views])
    for number in range(4):
        camera = between(views, number, 0.5)
        assert float((camera.centre - centre).norm()) == pytest.approx(distance, rel=1e-3)
        near = (eyes - camera.centre).norm(dim=1).sort().values
        assert float(near[0]) == pytest.approx(float(near[1]), rel=1e-3) and float(near[2]) > 1.5 * float(
            near[0]
        )
        ahead = camera.viewmat[2, :3]
        torch.testing.assert_close(ahead, (centre - camera.centre) / distance, atol=1e-3, rtol=0)
    ends = [between(views, 0, share).centre for share in (0.0, 1.0)]
    assert min(float((eyes - ends[0]).norm(dim=1).min()), float((eyes - ends[1]).norm(dim=1).min())) < 1e-3


def test_noise_by_time_and_a_net_that_begins_by_changing_nothing() -> None:
    share = kept(torch.tensor([0.0, 0.5, 1.0]))
    assert float(share[0]) > 0.999 and float(share[2]) < 1e-3
    assert float(share[1]) == pytest.approx(math.cos((0.495 + 0.008) / 1.008 * math.pi / 2) ** 2)
    net = fresh(RepairNet, 0, width=8)
    spoiled = torch.rand(2, 3, 18, 21)
    found = net.repair(spoiled, 0.5, torch.Generator().manual_seed(0), steps=3)
    assert torch.equal(found, spoiled)


def test_shaken_scenes_keep_their_colours(start: GaussianScene) -> None:
    other = shaken(start, torch.Generator().manual_seed(0))
    assert torch.equal(other.sh0, start.sh0)
    for name in ("means", "scales", "quats", "opacities"):
        moved = (other.get_parameter(name) != start.get_parameter(name)).float().mean()
        assert 0.15 < float(moved) < 0.45
    apart = ((other.means - start.means) / start.scales.exp()).detach()
    assert float(apart[apart != 0].std()) == pytest.approx(0.3, rel=0.3)


def test_a_repaired_scene(views: list[View], start: GaussianScene) -> None:
    spoiled, true = SMALL.pairs(start, start, views, 0)
    assert spoiled.shape == true.shape == (16, 3, 32, 32)
    torch.testing.assert_close(true[0].permute(1, 2, 0), views[0].image)
    before = start.means.detach().clone()
    made = [
        Repair(without=2, learned=learned, steps=4, every=2, drawn=drawn).fit(start, start, views)
        for learned, drawn in ((2, True), (0, True), (0, False))
    ]
    assert torch.equal(start.means, before)
    assert not torch.equal(made[0].means, made[2].means) and not torch.equal(made[1].means, made[2].means)
    with pytest.raises(ConfigError, match="leaving one out needs 3 views; received 2"):
        SMALL.pairs(start, start, views[:2], 0)
    with pytest.raises(ConfigError, match=r"a strength in \(0, 1\]"):
        Repair(strength=0.0)


def test_a_model_of_pairs_brings_the_true_picture_nearer() -> None:
    """A spoiled picture is the true one darkened by a half: easily learned."""
    true = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.5
    model = Repair(learned=80).learn((true / 2, true), 0)
    found = model.repair(true / 2, 0.3, torch.Generator().manual_seed(1))
    assert float((found - true).square().mean()) < 0.2 * float((true / 2).square().mean())
