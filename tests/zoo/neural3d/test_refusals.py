"""What the papers' notes say to refuse, where no method's own file has it."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from zoo.errors import ConfigError, DataError
from zoo.neural3d import importance
from zoo.neural3d.cameras import Camera, lens, orbit
from zoo.neural3d.fields import HashField, RayBatches, field_job
from zoo.neural3d.formats import read_splats
from zoo.neural3d.hull import visual_hull
from zoo.neural3d.methods.coherent_gs import CoherentGS, PairedViews, flows_between
from zoo.neural3d.methods.hollow_nerf import HollowNeRF
from zoo.neural3d.methods.sparse_nerf import quadruples
from zoo.neural3d.priors import cloud
from zoo.neural3d.refine import scene_job
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.shapes import shapes, view_of
from zoo.neural3d.splats import from_points
from zoo.neural3d.views import View, load_transforms


def some_scene(count: int = 8) -> GaussianScene:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(count, 3, generator=generator) + torch.tensor([-0.5, -0.5, 2.0])
    return GaussianScene.from_splats(from_points(points, torch.rand(count, 3, generator=generator), 0))


def arc(count: int, size: int) -> list[View]:
    cameras = orbit(
        torch.tensor([0.0, -0.3, 0.0]), 3.6, 18, (size, size), field_of_view=0.75, elevations=(0.5,)
    )
    return [view_of(camera, str(number)) for number, camera in enumerate(cameras[:count])]


@pytest.mark.parametrize("make", [scene_job, field_job])
def test_no_views_are_refused(make: Callable) -> None:
    with pytest.raises(DataError, match="no views to learn from"):
        make([])


@pytest.mark.parametrize("name", ["removal-error", "max-contribution", "contribution"])
def test_scores_that_look_refuse_to_see_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match="received no view; opacity-volume needs none"):
        importance.pruned(some_scene(), importance.SCORES[name], 0.5, [])
    assert int(importance.pruned(some_scene(), importance.SCORES["opacity-volume"], 0.5, []).sum()) == 4


def test_a_scene_behind_the_camera_is_an_empty_picture() -> None:
    scene = some_scene()
    scene.background.copy_(torch.tensor([0.25, 0.5, 0.75]))
    back = torch.diag(torch.tensor([-1.0, 1, -1, 1]))  # turned round the upward axis
    seen = scene.render(Camera(back, lens(9, 7, 1.0), 9, 7))
    assert not bool(seen.alpha.any()) and not bool(seen.depth.any())
    assert torch.equal(seen.colour, scene.background.expand(7, 9, 3))


@pytest.mark.parametrize("start", [b"", b"ply\n"])
def test_a_pickled_ply_is_refused_and_not_run(tmp_path: Path, start: bytes) -> None:
    mark = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.touch, (mark,)

    path = tmp_path / "a.ply"
    path.write_bytes(start + pickle.dumps(Hostile()))
    with pytest.raises(DataError, match="no line end_header" if start else "is no scene of Gaussians"):
        read_splats(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"transform_matrix": numpy.diag([-1.0, 1, 1, 1]).tolist()}, "frame 0: a camera that mirrors"),
        ({"transform_matrix": numpy.diag([1.0, math.nan, 1, 1]).tolist()}, "frame 0: a camera that mirrors"),
        ({"transform_matrix": [[1.0, 0], [0, 1]]}, r"frame 0 .*transform_matrix of \(2, 2\)"),
        ({"fl_x": 0.0}, "frame 0: a camera needs positive focal lengths"),
    ],
)
def test_frames_with_cameras_that_are_none(tmp_path: Path, change: dict, match: str) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    frame = {"file_path": "one.png", "transform_matrix": numpy.eye(4).tolist()}
    content = {"fl_x": 20.0, "frames": [frame]}
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps(content))
    assert len(load_transforms(path)) == 1
    (content if "fl_x" in change else frame).update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=match):
        load_transforms(path)


def test_a_dual_variable_that_is_no_number_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    views = shapes(24, 6, 2)
    field = HashField((0.0, -0.45, 0.0), 1.3, 3, 8, 4, 16, hidden=8, samples=12)
    job = field_job(views.train, batch=64, steps=6)
    salient = HashField.salient.fget
    assert salient is not None
    monkeypatch.setattr(HashField, "salient", property(lambda self: salient(self).detach() * math.nan))
    with pytest.raises(ConfigError, match="the dual variable is nan after step [23]"):
        HollowNeRF(cells=4, start=0.3).sparsify(field, job)


def test_points_outside_of_the_cube_have_neither_density_nor_gradient() -> None:
    field = HashField((0.0, 0.0, 0.0), 1.0, 3, 8, 4, 16, hidden=8)
    points = torch.tensor([[0.9, 0.0, 0.0], [1.1, 0.0, 0.0], [0.0, -7.0, 0.0]])
    density, colour = field.at(points, torch.tensor([[0.0, 0, 1]]).expand(3, 3))
    assert float(density.detach()[0]) > 0 and not bool(density[1:].any()) and not bool(colour[1:].any())
    field.zero_grad()
    density[1:].sum().backward()
    assert field.table.grad is None or not bool(field.table.grad.any())


@pytest.mark.parametrize("side", [2, 3])
def test_pairs_of_pictures_smaller_than_a_crop(side: int) -> None:
    """The reference draws from none of the candidates where a corner leaves too few."""
    torch.manual_seed(0)
    prior = torch.arange(1.0, side**2 + 1).reshape(side, side)
    found = quadruples(prior, 50, 30, True)
    assert len(found) > 20 and int(found.min()) >= 0 and int(found.max()) < side**2
    assert bool((found[:, 0] != found[:, 2]).all()) and bool((found[:, 1] != found[:, 3]).all())


def test_views_that_coherent_gaussians_refuse() -> None:
    views = arc(5, 24)
    start = cloud(views, 40, 0, (1.0, 1.0, 1.0))
    small = arc(2, 12)
    for wrong in (views, [views[0], views[1].reduced(2)], small, views[:1]):
        with pytest.raises(ConfigError, match="two to four views of one size, 16 pixels"):
            CoherentGS().sparsify(start, scene_job(wrong))
    pair = views[:2]
    flows = flows_between(pair)
    place, seen = flows[0, 1]
    flows[0, 1] = place[:12, :12], seen[:12, :12]
    job = scene_job(pair).replace(batches=PairedViews(pair, flows))
    with pytest.raises(ConfigError, match=r"flow from view 0 to 1 as \(24, 24, 2\)"):
        CoherentGS().sparsify(start, job)


def test_a_hull_follows_the_principal_point() -> None:
    """The reference takes the middle of the picture for it."""
    k = lens(16, 16, 1.0)
    k[0, 2] += 6
    mask = torch.zeros(16, 16)
    mask[7:9, 13:15] = 1
    view = View(Camera(torch.eye(4), k, 16, 16), torch.zeros(16, 16, 3), mask)
    points = torch.tensor([[0.0, 0.0, 2.0], [0.9, 0.0, 2.0]])
    assert visual_hull([view], points).tolist() == [True, False]
    masked = dataclasses.replace(view, mask=mask * 1.5)
    with pytest.raises(DataError, match="a mask from 0 to 1"):
        visual_hull([masked], points)


def test_rays_need_views() -> None:
    with pytest.raises(DataError, match="no views to learn from"):
        RayBatches([], 8)
