"""Scenes and cameras: conventions point by point, round trips, rendering, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.neural3d.cameras import Camera, from_opengl, from_world, lens, look_at, orbit
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import SH_C0, Splats


def project(camera: Camera, point: Tensor) -> Tensor:
    seen = camera.intrinsics @ (camera.viewmat[:3, :3] @ point + camera.viewmat[:3, 3])
    return seen[:2] / seen[2]


def test_conventions_by_a_point_in_each_octant() -> None:
    # At (0, 0, 4) looking back along -z with y up: OpenGL's identity rotation.
    pose = torch.eye(4)
    pose[2, 3] = 4
    opengl = from_opengl(pose, lens(100, 100, math.pi / 2), 100, 100)
    same = look_at(
        torch.tensor([0.0, 0, 4]), torch.zeros(3), lens(100, 100, math.pi / 2), 100, 100, (0.0, 1, 0)
    )
    for camera in (opengl, same):
        for x in (-1.0, 1.0):
            for y in (-1.0, 1.0):
                for z in (-1.0, 1.0):
                    depth = 4 - z
                    expected = torch.tensor([50 + 50 * x / depth, 50 - 50 * y / depth])
                    torch.testing.assert_close(project(camera, torch.tensor([x, y, z])), expected)


def test_cameras_round_trip() -> None:
    for camera in orbit(torch.tensor([1.0, 2, 3]), 4.0, 5, (30, 20), elevations=(0.2, -0.7)):
        again = from_world(camera.to_world, camera.intrinsics, 30, 20)
        torch.testing.assert_close(again.viewmat, camera.viewmat, atol=1e-6, rtol=0)
        torch.testing.assert_close((camera.centre - torch.tensor([1.0, 2, 3])).norm(), torch.tensor(4.0))
        torch.testing.assert_close(project(camera, torch.tensor([1.0, 2, 3])), torch.tensor([15.0, 10.0]))
        origin, rays = camera.rays()
        torch.testing.assert_close(
            project(camera, origin + 3 * rays[7, 11]), torch.tensor([11.5, 7.5]), atol=1e-4, rtol=0
        )
        half = camera.resized(15, 10)
        torch.testing.assert_close(project(half, torch.zeros(3)), project(camera, torch.zeros(3)) / 2)


def test_up_is_up() -> None:
    camera = orbit(torch.zeros(3), 3.0, 1, (20, 20), elevations=(0.0,), up=(0.0, 0.0, 1.0))[0]
    assert (
        float(project(camera, torch.tensor([0.0, 0, 1]))[1])
        < 10
        < float(project(camera, -torch.tensor([0.0, 0, 1]))[1])
    )


@pytest.mark.parametrize("change", ["mirror", "focal", "up"])
def test_bad_cameras_are_refused(change: str) -> None:
    match = {"mirror": "mirrors", "focal": "positive focal", "up": "upward"}[change]
    with pytest.raises(DataError, match=match):
        if change == "mirror":
            Camera(torch.diag(torch.tensor([1.0, -1, 1, 1])), lens(4, 4, 1.0), 4, 4)
        elif change == "focal":
            Camera(torch.eye(4), torch.zeros(3, 3), 4, 4)
        else:
            look_at(torch.zeros(3), torch.tensor([0.0, 1, 0]), lens(4, 4, 1.0), 4, 4, (0.0, 1, 0))


def test_scene_renders_what_its_splats_are() -> None:
    splats = Splats(
        torch.tensor([[0.0, 0, 2]]),
        torch.tensor([[2.0, 0, 0, 0]]),
        torch.full((1, 3), math.log(0.5)),
        torch.tensor([math.log(0.8 / 0.2)]),
        torch.tensor([[[1.0, 0.0, -1.0]]]) * 0.5 / SH_C0,
    )
    scene = GaussianScene.from_splats(splats, (0.0, 1.0, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(scene.splats.tensors, splats.tensors, strict=True))
    camera = Camera(torch.eye(4), lens(9, 9, 0.1), 9, 9)
    seen = scene.render(camera)
    # Red in front of green, 80 % of it at the middle, where blue was cut to 0.
    torch.testing.assert_close(seen.alpha[4, 4], torch.tensor(0.8))
    torch.testing.assert_close(seen.colour[4, 4], torch.tensor([0.8, 0.4 + 0.2, 0.0]))
    assert torch.equal(scene(camera), seen.colour)
    extra = scene.render(camera, features=torch.full((1, 2), 3.0)).features
    torch.testing.assert_close(extra[4, 4], torch.tensor([2.4, 2.4]))


def test_degrees_can_be_cut_and_grown() -> None:
    splats = Splats(
        torch.zeros(2, 3), torch.ones(2, 4), torch.zeros(2, 3), torch.zeros(2), torch.randn(2, 9, 3)
    )
    assert torch.equal(splats.with_degree(1).sh, splats.sh[:, :4])
    grown = splats.with_degree(3)
    assert torch.equal(grown.sh[:, :9], splats.sh) and not grown.sh[:, 9:].any() and grown.sh_degree == 3
