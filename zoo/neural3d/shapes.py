"""A small scene made by a formula: four balls over a chequered disc, lit by a lamp, seen from all around.

Everything about it is known exactly: colour, mask and depth of every pixel, and points of its surface.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.neural3d.cameras import Camera, orbit
from zoo.neural3d.views import View, Views

BALLS = torch.tensor(  # centre, radius, colour; y points down
    [
        [0.0, -0.45, 0.0, 0.45, 0.85, 0.25, 0.2],
        [0.62, -0.25, 0.2, 0.25, 0.2, 0.45, 0.85],
        [-0.5, -0.22, 0.45, 0.22, 0.95, 0.75, 0.2],
        [-0.3, -0.3, -0.6, 0.3, 0.25, 0.7, 0.35],
    ]
)
DISC = 1.2  # its radius, in the plane y = 0
LAMP = torch.tensor([0.5, -0.8, -0.35]) / torch.tensor([0.5, -0.8, -0.35]).norm()
BACKGROUND = (1.0, 1.0, 1.0)
FIELD = 0.75  # radians
OVER = 3  # rays per pixel and axis


def _shade(point: Tensor, normal: Tensor, colour: Tensor) -> Tensor:
    return colour * (0.35 + 0.65 * (normal @ LAMP).clamp_min(0)[..., None]) + 0 * point


def trace(camera: Camera, balls: Tensor = BALLS) -> tuple[Tensor, Tensor, Tensor]:
    """Colours [height, width, 3] (black where nothing is), hits [height, width] bool and depths along the
    camera's axis (infinite where nothing is) of the rays through the pixels' centres."""
    origin, rays = camera.rays()
    nearest = torch.full(rays.shape[:2], math.inf)
    colour = torch.zeros_like(rays)
    for ball in balls:
        offset = origin - ball[:3]
        along = (rays @ offset).neg()
        left = along.square() - offset.square().sum() + ball[3] ** 2
        distance = torch.where(left > 0, along - left.clamp_min(0).sqrt(), math.inf)
        hit = (distance > 0) & (distance < nearest)
        point = origin + rays * torch.where(hit, distance, 0.0)[..., None]
        shaded = _shade(point, (point - ball[:3]) / ball[3], ball[4:])
        colour = torch.where(hit[..., None], shaded, colour)
        nearest = torch.where(hit, distance, nearest)
    distance = -origin[1] / rays[..., 1]
    point = origin + rays * torch.where(distance.isfinite(), distance, 0.0)[..., None]
    hit = (distance > 0) & (distance < nearest) & (point[..., ::2].norm(dim=-1) < DISC)
    odd = ((point[..., 0] / 0.3).floor() + (point[..., 2] / 0.3).floor()) % 2
    board = 0.25 + 0.6 * odd[..., None].expand_as(point)
    up = torch.tensor([0.0, -1.0, 0.0]).expand_as(point)
    colour = torch.where(hit[..., None], _shade(point, up, board), colour)
    nearest = torch.where(hit, distance, nearest)
    return colour, nearest.isfinite(), nearest * (rays @ camera.viewmat[2, :3])


def view_of(camera: Camera, name: str = "", balls: Tensor = BALLS) -> View:
    """What the camera sees, each pixel the mean of nine rays; the depth is that of the middle one."""
    fine = camera.resized(camera.width * OVER, camera.height * OVER)
    colour, hit, depth = trace(fine, balls)
    image = torch.where(hit[..., None], colour, torch.tensor(BACKGROUND))
    depth = torch.where(hit, depth, 0.0)
    return View(fine, image, hit.float(), depth, name).reduced(OVER)


def shapes(size: int = 96, train: int = 36, test: int = 8) -> Views:
    """Views of the scene from a hemisphere, and a cloud of points on its surface."""
    centre, radius = torch.tensor([0.0, -0.3, 0.0]), 3.6
    heights = (0.25, 0.6, 1.0, 0.4)
    cameras = orbit(centre, radius, train, (size, size), field_of_view=FIELD, elevations=heights)
    others = orbit(centre, radius, test, (size, size), field_of_view=FIELD, elevations=(0.5, 0.8), start=0.21)
    points, colours = surface(4000)
    return Views(
        "shapes",
        [view_of(camera, f"train {number}") for number, camera in enumerate(cameras)],
        [view_of(camera, f"test {number}") for number, camera in enumerate(others)],
        BACKGROUND,
        points,
        colours,
        "Apache-2.0",
    )


def arc(size: int = 48) -> Views:
    """Three views of the scene 20 degrees apart, to train on, and eight others between them."""
    centre = torch.tensor([0.0, -0.3, 0.0])
    train = orbit(centre, 3.6, 18, (size, size), field_of_view=FIELD, elevations=(0.5,))[:3]
    test = orbit(centre, 3.6, 72, (size, size), field_of_view=FIELD, elevations=(0.4, 0.6), start=0.05)[:8]
    return Views(
        "shapes-arc", [*map(view_of, train)], [*map(view_of, test)], BACKGROUND, licence="Apache-2.0"
    )


def surface(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points [count, 3] spread over balls and disc by area, and their colours without light."""
    generator = torch.Generator().manual_seed(seed)
    areas = torch.cat([4 * BALLS[:, 3].square(), torch.tensor([DISC**2])])
    which = torch.multinomial(areas, count, replacement=True, generator=generator)
    normal = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    ball = BALLS[which.clamp_max(len(BALLS) - 1)]
    points = ball[:, :3] + normal * ball[:, 3:4]
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    reach = DISC * torch.rand(count, generator=generator).sqrt()
    flat = torch.stack([reach * angle.cos(), torch.zeros(count), reach * angle.sin()], 1)
    on_disc = (which == len(BALLS))[:, None]
    odd = ((flat[:, 0] / 0.3).floor() + (flat[:, 2] / 0.3).floor()) % 2
    board = 0.25 + 0.6 * odd[:, None].expand(-1, 3)
    return torch.where(on_disc, flat, points), torch.where(on_disc, board, ball[:, 4:])
