"""Seeded LiDAR scenes: a spinning scanner over sloping ground, objects of three classes, and things that
look like them.

Each ray stops at the nearest surface, so that objects hide each other and the ground behind them. Cars are a
body and a cabin, cyclists a frame and a rider, pedestrians a box; walls, poles, bushes and crates are there
to be confused with them. Reflectance is drawn alike for objects and for distractors: only shape tells them
apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CLASSES = ("Car", "Pedestrian", "Cyclist")
# Mean (length, width, height) in metres and their relative spread.
SIZES = {"Car": (4.2, 1.75, 1.55), "Pedestrian": (0.75, 0.65, 1.75), "Cyclist": (1.8, 0.65, 1.7)}
SPREAD = 0.08


@dataclass(frozen=True)
class SceneConfig:
    """The scanner and what stands around it.

    Attributes:
        extent: scenes reach so many metres from the scanner along x and y.
        beams: elevations, evenly spaced from `lowest` to `highest` degrees.
        steps: rays per turn.
        height: of the scanner above the ground, metres.
        noise: standard deviation of the range, metres.
        lost: share of rays without an echo.
        objects: fewest and most per class, in the order of `CLASSES`.
        distractors: fewest and most.
        slope: steepest slope of the ground.
    """

    extent: float = 12.8
    beams: int = 24
    lowest: float = -28.0
    highest: float = 2.0
    steps: int = 256
    height: float = 1.8
    noise: float = 0.03
    lost: float = 0.05
    objects: tuple[tuple[int, int], ...] = ((2, 4), (1, 4), (1, 3))
    distractors: tuple[int, int] = (3, 7)
    slope: float = 0.03


class Scene(NamedTuple):
    """One frame.

    Attributes:
        points: [n, 4] float32: x, y, z and reflectance in [0, 1], in the scanner's frame.
        boxes: [m, 7] float32, see `zoo.vision.lidar.boxes`.
        labels: [m] int64, from 1, in the order of `CLASSES`.
        hits: [m] int64, echoes from each object.
    """

    points: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    hits: np.ndarray


class _Things(NamedTuple):
    """Solid boxes: (x, y, z of the bottom, length, width, height, yaw), and the object each belongs to (-1:
    none)."""

    solids: list[tuple[float, ...]]
    owner: list[int]


def make_scene(seed: int, config: SceneConfig | None = None) -> Scene:
    """The scene of a seed; equal seeds give equal scenes.

    Args:
        seed: not negative.
        config: by default `SceneConfig()`.
    """
    config = config or SceneConfig()
    rng = np.random.default_rng([20230517, seed])
    slope = rng.uniform(-config.slope, config.slope, 2)
    boxes, labels, things = _place(rng, config, slope)
    origin = np.zeros(3)
    directions = _rays(rng, config)
    ground = _ground_range(directions, slope, config.height)
    solids = np.array(things.solids).reshape(-1, 7)
    hit, which = _nearest(directions, solids)
    is_ground = ground <= hit
    distance = np.where(is_ground, ground, hit)
    owner = np.array([*things.owner, -1])[np.where(is_ground, -1, which)]
    alive = np.isfinite(distance) & (rng.random(len(distance)) >= config.lost)
    distance = distance + rng.normal(0, config.noise, len(distance))
    points = origin + directions * np.where(np.isfinite(distance), distance, 0)[:, None]
    alive &= (np.abs(points[:, :2]) < config.extent).all(1)
    surface = rng.uniform(0.1, 0.9, len(solids) + 1)
    surface[-1] = 0.25  # the ground
    reflectance = surface[np.where(is_ground, len(solids), which)] + rng.normal(0, 0.05, len(distance))
    cloud = np.concatenate([points, reflectance.clip(0, 1)[:, None]], 1)[alive]
    hits = np.bincount(owner[alive] + 1, minlength=len(boxes) + 1)[1:]
    return Scene(cloud.astype(np.float32), boxes.astype(np.float32), labels, hits)


def _rays(rng: np.random.Generator, config: SceneConfig) -> np.ndarray:
    """Unit vectors of all rays of a turn, which starts anywhere."""
    elevation = np.radians(np.linspace(config.lowest, config.highest, config.beams))
    azimuth = (np.arange(config.steps) + rng.random()) * (2 * math.pi / config.steps)
    e, a = (v.ravel() for v in np.meshgrid(elevation, azimuth, indexing="ij"))
    return np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], 1)


def _ground_range(directions: np.ndarray, slope: np.ndarray, height: float) -> np.ndarray:
    """Distance to the plane z = slope . (x, y) - height along each ray; infinite where it points above."""
    fall = directions[:, :2] @ slope - directions[:, 2]
    with np.errstate(divide="ignore"):
        return np.where(fall > 1e-6, height / np.maximum(fall, 1e-12), np.inf)


def _nearest(directions: np.ndarray, solids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest solid along each ray from the origin, and which it is (slab test)."""
    best, which = np.full(len(directions), np.inf), np.zeros(len(directions), dtype=np.int64)
    azimuth = np.arctan2(directions[:, 1], directions[:, 0])
    for number, (x, y, z, length, width, height, yaw) in enumerate(solids):
        # Only rays within the angle that the solid's circumscribed circle takes can meet it.
        away = math.hypot(x, y)
        half = math.asin(min(1.0, math.hypot(length, width) / 2 / away)) + 1e-6
        turn = np.remainder(azimuth - math.atan2(y, x) + math.pi, 2 * math.pi) - math.pi
        near = np.flatnonzero(np.abs(turn) <= half)
        cos, sin = math.cos(yaw), math.sin(yaw)
        part = directions[near]
        local = np.stack(
            [part[:, 0] * cos + part[:, 1] * sin, part[:, 1] * cos - part[:, 0] * sin, part[:, 2]], 1
        )
        start = np.array([-x * cos - y * sin, x * sin - y * cos, -z - height / 2])
        sides = np.array([length, width, height]) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            first, second = (-sides - start) / local, (sides - start) / local
        enter = np.fmin(first, second).max(1)
        leave = np.fmax(first, second).min(1)
        meets = (enter <= leave) & (enter > 0) & (enter < best[near])
        best[near[meets]], which[near[meets]] = enter[meets], number
    return best, which


def _place(
    rng: np.random.Generator, config: SceneConfig, slope: np.ndarray
) -> tuple[np.ndarray, np.ndarray, _Things]:
    """Objects and distractors at places where nothing else stands."""
    taken: list[tuple[float, float, float]] = [(0.0, 0.0, 2.5)]  # the scanner's own car
    boxes: list[list[float]] = []
    labels: list[int] = []
    things = _Things([], [])
    for label, (name, (fewest, most)) in enumerate(zip(CLASSES, config.objects, strict=True), start=1):
        for _ in range(rng.integers(fewest, most + 1)):
            length, width, height = np.array(SIZES[name]) * (1 + SPREAD * rng.standard_normal(3)).clip(
                0.7, 1.3
            )
            if (spot := _free_spot(rng, config, taken, math.hypot(length, width) / 2)) is None:
                continue
            x, y = spot
            bottom = float(slope @ spot) - config.height
            yaw = rng.uniform(-math.pi, math.pi)
            boxes.append([x, y, bottom + height / 2, length, width, height, yaw])
            labels.append(label)
            for solid in _solids(name, x, y, bottom, length, width, height, yaw):
                things.solids.append(solid)
                things.owner.append(len(boxes) - 1)
    for _ in range(rng.integers(config.distractors[0], config.distractors[1] + 1)):
        length, width, height = _distractor(rng)
        if (spot := _free_spot(rng, config, taken, math.hypot(length, width) / 2)) is None:
            continue
        bottom = float(slope @ spot) - config.height
        yaw = rng.uniform(-math.pi, math.pi)
        things.solids.append((*spot, bottom, length, width, height, yaw))
        things.owner.append(-1)
    return np.array(boxes).reshape(-1, 7), np.array(labels, dtype=np.int64), things


def _free_spot(
    rng: np.random.Generator, config: SceneConfig, taken: list[tuple[float, float, float]], radius: float
) -> np.ndarray | None:
    """A place whose circle touches no other; None after 50 tries."""
    for _ in range(50):
        spot = rng.uniform(-config.extent + 1, config.extent - 1, 2)
        if all(math.hypot(spot[0] - x, spot[1] - y) > radius + other + 0.2 for x, y, other in taken):
            taken.append((float(spot[0]), float(spot[1]), radius))
            return spot
    return None


def _distractor(rng: np.random.Generator) -> tuple[float, float, float]:
    """Length, width and height of a wall, a pole, a bush or a crate."""
    kind = rng.integers(4)
    if kind == 0:
        return rng.uniform(4, 12), 0.25, rng.uniform(1.5, 3)
    if kind == 1:
        side = rng.uniform(0.15, 0.4)
        return side, side, rng.uniform(2.2, 4)
    if kind == 2:
        return rng.uniform(0.8, 2.5), rng.uniform(0.8, 1.6), rng.uniform(0.5, 1.2)
    return rng.uniform(0.5, 3.0), rng.uniform(0.5, 2.5), rng.uniform(0.8, 2.4)


def _solids(
    name: str, x: float, y: float, bottom: float, length: float, width: float, height: float, yaw: float
) -> list[tuple[float, ...]]:
    """What an object is made of, inside its box."""
    cos, sin = math.cos(yaw), math.sin(yaw)

    def part(along: float, share: tuple[float, float], low: float, high: float) -> tuple[float, ...]:
        here = x + cos * along * length, y + sin * along * length
        return (*here, bottom + low * height, length * share[0], width * share[1], (high - low) * height, yaw)

    if name == "Car":  # the cabin sits behind the middle: it tells front from back
        return [part(0.0, (1.0, 1.0), 0.12, 0.6), part(-0.1, (0.55, 0.9), 0.6, 1.0)]
    if name == "Cyclist":
        return [part(0.0, (1.0, 0.3), 0.0, 0.6), part(-0.05, (0.35, 1.0), 0.45, 1.0)]
    return [part(0.0, (1.0, 1.0), 0.0, 1.0)]
