"""Views and metrics: what the embedded scene says of itself, real sets, hand-computed figures, refusals."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from zoo.errors import DataError
from zoo.neural3d.cameras import Camera, lens
from zoo.neural3d.metrics import psnr, ssim
from zoo.neural3d.shapes import BALLS, shapes, view_of
from zoo.neural3d.views import View, ViewBatches, load_transforms, load_views

DATA = Path(os.environ.get("ZOO_DATA", "missing"))


def test_embedded_depth_lies_on_the_surface() -> None:
    view = shapes(48, 2, 1).train[1]
    assert view.depth is not None and view.mask is not None
    origin, rays = view.camera.rays()
    depth = view.depth
    ahead = rays @ view.camera.viewmat[2, :3]
    points = (origin + rays * (depth / ahead)[..., None])[depth > 0]
    to_balls = ((points[:, None] - BALLS[:, :3]).norm(dim=2) - BALLS[:, 3]).abs().amin(1)
    assert float(torch.minimum(to_balls, points[:, 1].abs()).max()) < 1e-3
    assert float(view.mask.mean()) > 0.2 and bool((view.mask[depth > 0] > 0).all())
    assert float(view.image[view.mask == 0].min()) == 1.0


def test_embedded_surface_is_what_the_cameras_see() -> None:
    views = shapes(48, 3, 1)
    assert views.points is not None
    assert abs(views.extent - 3.6) < 1e-3 and float((views.centre - torch.tensor([0, -0.3, 0])).norm()) < 1e-3
    camera = views.test[0].camera
    seen = views.points @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
    pixel = seen @ camera.intrinsics.T
    pixel = pixel[:, :2] / pixel[:, 2:]
    assert bool(((pixel > 0) & (pixel < 48)).all()) and float(seen[:, 2].min()) > 1
    # A point is seen, at its own depth, or something nearer is.
    depth = views.test[0].depth[pixel[:, 1].long(), pixel[:, 0].long()]
    near = (depth - seen[:, 2]).abs() < 0.15
    assert (
        float((near | (depth < seen[:, 2])).double().mean()) > 0.97
        and 0.3 < float(near.double().mean()) < 0.9
    )


def test_a_reduced_view_is_the_mean_and_its_camera_agrees() -> None:
    fine = view_of(Camera(torch.eye(4), lens(9, 6, 1.0), 9, 6))
    small = fine.reduced(2)
    assert small.image.shape == (3, 4, 3) and (small.camera.width, small.camera.height) == (4, 3)
    torch.testing.assert_close(small.image[1, 2], fine.image[2:4, 4:6].mean((0, 1)))
    torch.testing.assert_close(small.camera.intrinsics[:2], fine.camera.intrinsics[:2] / 2)


def test_batches_are_a_new_order_each_epoch() -> None:
    views = shapes(16, 6, 1).train
    batches = ViewBatches(views)
    first, second = ([v.name for v in batches.draw(torch.Generator().manual_seed(s))] for s in (1, 2))
    assert sorted(first) == sorted(v.name for v in views) and first != second and len(batches) == 6


@pytest.mark.skipif(not DATA.is_dir(), reason="no ZOO_DATA")
@pytest.mark.parametrize("name", ["lego", "fox", "fern", "dtu24", "fountain", "herzjesu", "livingroom"])
def test_real_views(name: str) -> None:
    views = load_views(name, longest=64)
    assert not {v.name for v in views.test} & {v.name for v in views.train} or name == "lego"
    for view in (views.train[0], views.test[0]):
        assert max(view.image.shape[:2]) <= 64 and 0 <= float(view.image.min()) < float(view.image.max()) <= 1
    if views.points is None or views.colours is None:
        return
    # The cloud must land in the picture, where colours are like its own (as they are not when shuffled).
    camera, image = views.test[0].camera, views.test[0].image
    seen = views.points @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
    pixel = (seen @ camera.intrinsics.T)[:, :2] / seen[:, 2:]
    inside = ((pixel > 0) & (pixel < torch.tensor([camera.width, camera.height]))).all(1) & (seen[:, 2] > 0)
    assert float(inside.double().mean()) > 0.8
    there = image[pixel[inside, 1].long(), pixel[inside, 0].long()]
    own = views.colours[inside]
    assert float((there - own).abs().mean()) < 0.95 * float((there - own.roll(37, 0)).abs().mean())


@pytest.mark.skipif(not DATA.is_dir(), reason="no ZOO_DATA")
def test_depth_of_the_living_room_takes_a_point_to_the_next_view() -> None:
    first, second = load_views("livingroom", longest=160).train[:2]
    origin, rays = first.camera.rays()
    points = origin + rays * (first.depth / (rays @ first.camera.viewmat[2, :3]))[..., None]
    seen = points @ second.camera.viewmat[:3, :3].T + second.camera.viewmat[:3, 3]
    pixel = (seen @ second.camera.intrinsics.T)[..., :2] / seen[..., 2:]
    size = torch.tensor([second.camera.width, second.camera.height])
    inside = ((pixel > 0) & (pixel < size)).all(-1) & (first.depth > 0)
    there = second.depth[pixel[inside][:, 1].long(), pixel[inside][:, 0].long()]
    assert float(inside.double().mean()) > 0.3
    assert float((there - seen[inside][:, 2]).abs().median()) < 0.03  # metres


def test_psnr_by_hand() -> None:
    wanted, found = torch.zeros(4, 4, 3), torch.full((4, 4, 3), 0.1)
    assert psnr(found, wanted) == pytest.approx(20.0, abs=1e-4)
    assert psnr(wanted, wanted) == 100.0
    found[0] = 5.0  # cut to 1
    mask = torch.ones(4, 4)
    assert psnr(found, wanted) == pytest.approx(-10 * math.log10(0.25 + 0.75 * 0.01), abs=1e-4)
    mask[0] = 0
    assert psnr(found, wanted, mask) == pytest.approx(20.0, abs=1e-4)
    with pytest.raises(DataError, match="without a pixel"):
        psnr(found, wanted, torch.zeros(4, 4))


def test_ssim_is_one_of_equals_and_boxed_by_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(32, 32, 3, generator=generator)
    assert ssim(image, image) == pytest.approx(1.0, abs=1e-6)
    other = image.clone()
    other[:8] = 0
    mask = torch.zeros(32, 32)
    mask[10:30, 5:25] = 1
    assert ssim(other, image) < 0.9 and ssim(other, image, mask) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(DataError, match="11 x 11"):
        ssim(image[:5], image[:5])


def test_what_is_refused(tmp_path: Path, monkeypatch) -> None:
    camera = Camera(torch.eye(4), lens(4, 4, 1.0), 4, 4)
    with pytest.raises(DataError, match=r"mask of \(3, 4\), the camera has \(4, 4\)"):
        View(camera, torch.zeros(4, 4, 3), torch.zeros(3, 4))
    with pytest.raises(DataError, match="unknown views 'nothing'; there are disc-without-ball, dtu24"):
        load_views("nothing")
    monkeypatch.delenv("ZOO_DATA", raising=False)
    with pytest.raises(DataError, match="'shapes' are embedded"):
        load_views("lego")
    path = tmp_path / "transforms.json"
    for content, match in (
        ({"k1": 0.1, "frames": []}, "distorted"),
        ({"camera_angle_x": 1.0, "frames": []}, "no frame whose picture"),
        ({"camera_angle_x": 1.0, "frames": [{}]}, "frame 0 lacks"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=match):
            load_transforms(path)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_transforms(path)
