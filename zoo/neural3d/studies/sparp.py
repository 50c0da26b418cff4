"""`zoo reproduce sparp`: cameras of toy objects from true but spoiled, and from learned, coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.harness.tasks import Progress, TaskResult
from zoo.neural3d.cameras import Camera, lens
from zoo.neural3d.hull import cube, visual_hull
from zoo.neural3d.meshes import is_watertight, isosurface, overlap
from zoo.neural3d.methods.sparp import (
    CoordinateNet,
    PoseNet,
    angle_between,
    decode,
    encode,
    pnp,
    pnp_ransac,
    pose_of,
    random_turns,
)
from zoo.neural3d.networks import NetworkTask
from zoo.neural3d.views import View
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Grid
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.view import Row, Value

LOW, HIGH = torch.full((3,), -1.0), torch.full((3,), 1.0)
DISTANCE, FIELD = 5.0, 0.5
REACH = 4.0  # pixels of 32 that learned coordinates may be off; of 1, 2 and 4 the best on other pictures
OBJECTS = torch.tensor(  # three of four balls each: centre, radius, colour
    [
        [
            [0, 0, 0, 0.5, 0.9, 0.2, 0.2],
            [0.6, 0, 0, 0.3, 0.2, 0.9, 0.2],
            [0, 0.6, 0.2, 0.35, 0.2, 0.2, 0.9],
            [-0.3, -0.2, 0.6, 0.3, 0.9, 0.9, 0.2],
        ],
        [
            [0.2, 0.1, -0.3, 0.45, 0.2, 0.8, 0.8],
            [-0.5, 0.3, 0, 0.4, 0.9, 0.5, 0.1],
            [0.1, -0.6, 0.3, 0.3, 0.6, 0.2, 0.8],
            [0.5, 0.4, 0.4, 0.3, 0.8, 0.8, 0.8],
        ],
        [
            [-0.2, 0, 0.1, 0.4, 0.5, 0.9, 0.4],
            [0.4, 0.4, -0.4, 0.35, 0.9, 0.3, 0.6],
            [0.3, -0.5, 0.3, 0.4, 0.2, 0.3, 0.5],
            [-0.6, 0.5, -0.1, 0.25, 0.9, 0.9, 0.5],
        ],
    ]
)


class Seen(NamedTuple):
    """Pictures of an object: colours with the mask [n, 4, s, s], object coordinates [n, 3, s, s], cameras."""

    pictures: Tensor
    coordinates: Tensor
    turns: Tensor
    cameras: list[Camera]


@dataclass(frozen=True)
class PoseOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        poses: of all objects together, with spoiled true coordinates, at 64 pixels.
        noise: deviation of the coordinates.
        outliers: share of pixels with coordinates of another place.
        steps: of a network's training.
        batch: pictures of a step, at 32 pixels.
        held: pictures that a network is measured on.
    """

    seeds: int = 3
    poses: int = 45
    noise: float = 0.02
    outliers: float = 0.2
    steps: int = 350
    batch: int = 12
    held: int = 45

    def __post_init__(self) -> None:
        if min(self.seeds, self.poses, self.steps, self.batch, self.held) < 1 or not 0 <= self.outliers < 1:
            raise ConfigError(
                "give at least one seed, pose, step and picture, and a share of outliers below 1"
            )


def pictures(balls: Tensor, count: int, size: int, generator: torch.Generator) -> Seen:
    """Random views of an object of balls."""
    turns = random_turns(count, generator)
    k, viewmats = lens(size, size, FIELD), torch.eye(4).repeat(count, 1, 1)
    viewmats[:, :3, :3] = turns
    viewmats[:, 2, 3] = DISTANCE
    cameras = [Camera(viewmat, k, size, size) for viewmat in viewmats]
    seen, places = [], []
    for camera in cameras:
        origin, rays = camera.rays()
        offset = origin - balls[:, :3]
        along = -(rays @ offset.T)
        left = along.square() - offset.square().sum(1) + balls[:, 3].square()
        distance = torch.where(left > 0, along - left.clamp_min(0).sqrt(), torch.inf)
        nearest, which = distance.min(-1)
        hit = nearest.isfinite()
        point = origin + rays * torch.where(hit, nearest, 0.0)[..., None]
        normal = (point - balls[which, :3]) / balls[which, 3:4]
        light = 0.5 - 0.5 * normal @ camera.viewmat[2, :3]
        colour = balls[which, 4:] * light[..., None] * hit[..., None]
        seen.append(torch.cat([colour, hit[..., None]], 2).permute(2, 0, 1))
        places.append((encode(point, LOW, HIGH) * hit[..., None]).permute(2, 0, 1))
    return Seen(torch.stack(seen), torch.stack(places), turns, cameras)


def spoiled(make: str, options: PoseOptions, seed: int) -> Row:
    """Errors of poses from true coordinates with noise and outliers, and the hull of the posed masks."""
    generator = torch.Generator().manual_seed(seed)
    errors, shapes = [], []
    for balls in OBJECTS:
        seen = pictures(balls, options.poses // len(OBJECTS), 64, generator)
        posed = []
        for picture, coordinates, camera in zip(seen.pictures, seen.coordinates, seen.cameras, strict=True):
            mask = picture[3] > 0.5
            y, x = mask.nonzero(as_tuple=True)
            found = coordinates[:, y, x].T
            found = found + options.noise * torch.randn(found.shape, generator=generator)
            wrong = torch.rand(len(found), generator=generator) < options.outliers
            found = torch.where(wrong[:, None], torch.rand(found.shape, generator=generator), found).clamp(
                0, 1
            )
            points, pixels = decode(found, LOW, HIGH), torch.stack([x, y], 1) + 0.5
            if make == "ransac":
                pose, _ = pnp_ransac(points, pixels, camera.intrinsics, seed=seed)
            else:
                pose = pnp(points, pixels, camera.intrinsics)
            errors.append(float(angle_between(pose[:3, :3], camera.viewmat[:3, :3])))
            posed.append(
                View(
                    Camera(pose.float(), camera.intrinsics, 64, 64),
                    picture[:3].permute(1, 2, 0),
                    mask.float(),
                )
            )
        shapes.append(_hull(posed[:6], balls) if make == "ransac" else (0.0, False))
    row: Row = {"error": median(errors), "worst": max(errors)}
    return row | (
        {"iou": [s[0] for s in shapes], "watertight": all(s[1] for s in shapes)} if make == "ransac" else {}
    )


def _hull(views: list[View], balls: Tensor) -> tuple[float, bool]:
    """Overlap of the hull of posed masks with the object, and whether its mesh is closed."""
    side = 32
    points = cube(torch.zeros(3), 1.1, side)
    found = visual_hull(views, points)
    true = (torch.cdist(points, balls[:, :3]) < balls[:, 3]).any(1)
    values = torch.nn.functional.pad(found.reshape(side, side, side).float(), (1,) * 6)
    _, faces = isosurface(values - 0.5, torch.full((3,), -1.1), torch.full((3,), 1.1))
    return overlap(found, true), is_watertight(faces)


class Fresh:
    """New pictures of all objects at every step."""

    def __init__(self, options: PoseOptions) -> None:
        self.options = options

    def __len__(self) -> int:
        return self.options.steps

    def draw(self, generator: torch.Generator) -> Iterator[Seen]:
        each = self.options.batch // len(OBJECTS)
        for _ in range(len(self)):
            yield _joined([pictures(balls, each, 32, generator) for balls in OBJECTS])

    def example(self) -> tuple[Tensor]:
        return (torch.zeros(1, 4, 32, 32),)


def _joined(parts: list[Seen]) -> Seen:
    tensors = [torch.cat(tensor) for tensor in zip(*(part[:3] for part in parts), strict=True)]
    return Seen(tensors[0], tensors[1], tensors[2], [camera for part in parts for camera in part.cameras])


def net_loss(model: nn.Module, seen: Seen) -> Tensor:
    """Mean distance of coordinates over the object, or squared distance of rotations."""
    found = model(seen.pictures)
    if isinstance(model, CoordinateNet):
        mask = seen.pictures[:, 3:]
        return ((found - seen.coordinates).abs() * mask).sum() / mask.sum()
    loss: Tensor = (found - seen.turns).square().sum((1, 2)).mean()
    return loss


def trained(make: Callable[[], nn.Module], options: PoseOptions, seed: int) -> nn.Module:
    """A network that learned from new pictures at every step."""
    with seeded(seed):
        model = make()
    recipe = Recipe(lr=3e-3, epochs=1, optimizer="adam", weight_decay=0.0, warmup=0.05, decay="cosine")
    Job(Fresh(options), loss=net_loss, recipe=recipe, seed=seed).fit(model, macs=lambda: 0.0).run()
    return model.eval()


def held_out(count: int, seed: int) -> Seen:
    """Pictures that no training sees."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    return _joined([pictures(balls, count // len(OBJECTS), 32, generator) for balls in OBJECTS])


def turn_errors(model: nn.Module, seen: Seen) -> list[float]:
    """Angle between the found and the true rotation of each picture, in degrees."""
    with torch.no_grad():
        found = model(seen.pictures)
    errors = []
    for number, camera in enumerate(seen.cameras):
        turn = found[number]
        if isinstance(model, CoordinateNet):
            try:
                mask = seen.pictures[number, 3] > 0.5
                turn = pose_of(turn.permute(1, 2, 0), mask, LOW, HIGH, camera.intrinsics, REACH).viewmat[
                    :3, :3
                ]
            except DataError:
                turn = torch.eye(3)  # no pose: counted as an error like any other
        errors.append(float(angle_between(turn, camera.viewmat[:3, :3])))
    return errors


class ToyCameras(NetworkTask):
    """Cameras of 45 pictures of toy objects from a network's coordinates: mean angle to the true rotation in
    degrees, and the share of pictures where it is below 15."""

    name, primary, unit, higher_is_better = "neural3d/toy-cameras", "error", "degrees", False
    network = CoordinateNet

    def direction(self, metric: str) -> int:
        """Less error is better, and a larger share below 15 degrees."""
        return -1 if metric == "error" else 1

    def measured_on(self) -> Any:
        return list(held_out(45, 0)[:3])

    def example(self, model: CoordinateNet) -> tuple[Any, ...]:
        """A picture."""
        return (held_out(3, 0).pictures[:1],)

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure a network."""
        errors = turn_errors(self.fitting(model).eval(), held_out(45, 0))
        return TaskResult.from_samples({"error": errors, "within_15": [float(one < 15) for one in errors]})


def learned(make: type[nn.Module], options: PoseOptions, seed: int) -> Row:
    """Errors of poses on new pictures: from a learned map, or learned themselves."""
    model = trained(make, options, seed)
    errors = turn_errors(model, held_out(options.held, seed))
    return {
        "error": median(errors),
        "worst": max(errors),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def measure(make: Any, options: PoseOptions, case: Row, cells: CellCache) -> Row:
    """Median angle between found and true cameras, in degrees."""
    if isinstance(make, str):
        return spoiled(make, options, case["seed"])
    return learned(make, options, case["seed"])


def cases(options: PoseOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        yield from ({"arm": arm, "level": "toys", "seed": seed} for arm in ARMS)


RANSAC, ALL, MAP, DIRECT = "PnP with RANSAC", "PnP of all pixels", "learned coordinates", "learned rotation"
ARMS = {RANSAC: Arm("ransac"), ALL: Arm("all"), MAP: Arm(CoordinateNet), DIRECT: Arm(PoseNet)}
ERROR = Value("error", 1.0, 2, "degrees", 2, lower=True)
STUDY = Study(
    "sparp",
    "SpaRP: cameras from maps of object coordinates",
    "Chao Xu et al.: SpaRP: Fast 3D Object Reconstruction and Pose Estimation from Sparse Views, ECCV 2024",
    PoseOptions,
    ARMS,
    cases,
    measure,
    papers=(6,),
    claims=[
        Claim("spoiled true coordinates: median error below 2 degrees", BAR, RANSAC, bar=-2.0),
        Claim("RANSAC is needed for it", BAR, RANSAC, ALL),
        Claim("learned coordinates: median error below 15 degrees", BAR, MAP, bar=-15.0),
        Claim(
            "learned coordinates are better than a learned rotation",
            "better than direct regression",
            MAP,
            DIRECT,
        ),
        Claim(
            "a learned rotation is more than 60 degrees off",
            BAR,
            DIRECT,
            bar=60.0,
            value=Value("error", 1.0, 2, "degrees", 2),
        ),
    ],
    value=ERROR,
    tables=[
        Grid("Median error of rotations (degrees)"),
        Grid("Overlap of the hull of six posed masks (%)", value=Value("iou", 100.0, 1)),
    ],
    notes=lambda options: [
        f"Three toy objects of four balls; {options.poses} poses at 64 pixels with noise of {options.noise} "
        f"and {100 * options.outliers:g} % outliers; networks of {options.steps} steps of {options.batch} "
        f"new pictures of 32 pixels, measured on {options.held} others. The diffusion model is not built.",
        "The learned rotation is at chance: two that are drawn at random are 126 degrees apart on average.",
    ],
)
