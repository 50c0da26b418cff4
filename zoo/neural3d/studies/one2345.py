"""`zoo reproduce one2345`: elevations of toy objects from matches, and carved shapes from eight views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.harness.tasks import Progress, TaskResult
from zoo.neural3d.cameras import Camera, lens, orbit
from zoo.neural3d.hull import cube, pixels_of
from zoo.neural3d.meshes import is_watertight, isosurface, overlap
from zoo.neural3d.methods.one2345 import CostVolumeNet, One2345, Seen, elevation_of, near_views
from zoo.neural3d.networks import NetworkTask
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Value, View

SIDE, SIZE, VIEWS, TRAIN, HELD = 24, 32, 8, 120, 30
MATCHES, OBJECTS, WIDE = 60, 30, 256  # pixels matched of each object, whose elevation is asked; pixels


@dataclass(frozen=True)
class OneOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        steps: of a training.
        batch: shapes of a step.
        noise: deviation of the matched pixels, of 256.
    """

    seeds: int = 3
    steps: int = 120
    batch: int = 4
    noise: float = 1.0

    def __post_init__(self) -> None:
        if min(self.seeds, self.steps, self.batch) < 1 or self.noise < 0:
            raise ConfigError("give at least one seed, step and shape, and no negative noise")


def cameras() -> list[Camera]:
    """Four views at 30 degrees and above each of them one at 60."""
    options: dict[str, Any] = {"field_of_view": 0.75}
    rings = [
        orbit(torch.zeros(3), 3.2, VIEWS // 2, (SIZE, SIZE), elevations=(height,), **options)
        for height in (0.524, 1.047)
    ]
    return [camera for ring in rings for camera in ring]


def distances(balls: Float[Tensor, "b 4 4"], points: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n"]:
    """Distances from three balls joined, of which the fourth one is cut away."""
    away = torch.cdist(points, balls[..., :3]) - balls[:, None, :, 3]
    return torch.maximum(away[..., :3].amin(2), -away[..., 3])


def drawn(count: int, seed: int) -> Seen:
    """Random shapes with a hollow on top and patterns of their own, as the cameras see them."""
    generator = torch.Generator().manual_seed(seed)
    balls = torch.rand(count, 4, 4, generator=generator) * 0.8 - 0.4
    balls[..., 3] = 0.3 + 0.2 * torch.rand(count, 4, generator=generator)
    up = torch.randn(count, 3, generator=generator) + torch.tensor([0.0, -3.0, 0.0])
    balls[:, 3, :3] = balls[:, 0, :3] + 0.5 * nn.functional.normalize(up, dim=1)
    balls[:, 0, 3] += 0.15
    pattern = 6 * torch.randn(count, 3, 3, generator=generator)
    pictures = torch.stack([_pictured(balls, pattern, camera) for camera in cameras()], 1)
    points = cube(torch.zeros(3), 1.0, SIDE).expand(count, -1, -1)
    return Seen(pictures, distances(balls, points) < 0)


def _pictured(balls: Tensor, pattern: Tensor, camera: Camera) -> Float[Tensor, "b 4 h w"]:
    origin, rays = camera.rays()
    flat = rays.reshape(1, -1, 3)
    far = torch.full((len(balls), flat.shape[1]), 1.5)
    for _ in range(28):
        far = far + distances(balls, origin + far[..., None] * flat)
    points = origin + far[..., None] * flat
    hit = (distances(balls, points).abs() < 0.02) & (far < 6)
    colour = 0.5 + 0.4 * (points @ pattern).sin()
    seen = torch.cat([colour * hit[..., None], hit[..., None].float()], 2)
    return seen.mT.unflatten(2, (SIZE, SIZE))


@cache
def train_set(seed: int) -> tuple[Seen, list[Camera]]:
    """What a seed trains on."""
    return drawn(TRAIN, seed), cameras()


@cache
def held_out() -> tuple[Seen, list[Camera]]:
    """Shapes that no training sees."""
    return drawn(HELD, 10_000), cameras()


def overlaps(model: CostVolumeNet | None) -> list[float]:
    """Intersection over union of each held-out shape with what a network says; without one with the hull."""
    seen, views = held_out()
    with torch.no_grad():
        net = CostVolumeNet(SIDE) if model is None else model.eval()
        parts = [net(some, views) for some in seen.pictures.split(8)]
    found = torch.cat([kept if model is None else logits > 0 for logits, kept in parts])
    return [overlap(one, true) for one, true in zip(found, seen.inside, strict=True)]


def elevations(noise: float, seed: int) -> list[float]:
    """Errors of found elevations in degrees: points of toy objects, matched in five views with noise."""
    generator, found = torch.Generator().manual_seed(seed), []
    k = lens(WIDE, WIDE, 0.85)
    for _ in range(OBJECTS):
        true = -20 + 70 * float(torch.rand((), generator=generator))
        points = 0.5 * nn.functional.normalize(torch.randn(MATCHES, 3, generator=generator), dim=1)
        pixels = torch.stack([pixels_of(one, points)[0] for one in near_views(true, 1.8, k, WIDE)])
        pixels = pixels + noise * torch.randn(pixels.shape, generator=generator)
        found.append(abs(elevation_of(pixels, lambda degrees: near_views(degrees, 1.8, k, WIDE)) - true))
    return found


class CarvedShapes(NetworkTask):
    """Intersection over union of 30 held-out toy shapes with what a network makes of eight views."""

    name, primary = "neural3d/carved-shapes", "iou"
    network = CostVolumeNet

    def measured_on(self) -> Any:
        return list(held_out()[0])

    def example(self, model: CostVolumeNet) -> tuple[Any, ...]:
        """The views of a shape."""
        seen, views = held_out()
        return seen.pictures[:1], views

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure a network."""
        return TaskResult.from_samples({"iou": overlaps(self.fitting(model))})


def measure(make: Any, options: OneOptions, case: Row, cells: CellCache) -> Row:
    """Overlaps with the true shapes, or errors of elevations."""
    if make == "elevation":
        found = elevations(options.noise, case["seed"])
        return {"elevation": median(found), "worst": max(found)}
    if make == "hull":
        return {"iou": overlaps(None)}
    model = replace(make, steps=options.steps, batch=options.batch).fit(
        *train_set(case["seed"]), case["seed"]
    )
    found = overlaps(model)
    logits, _ = model(held_out()[0].pictures[:1], cameras())
    values = nn.functional.pad(logits.detach().reshape(SIDE, SIDE, SIDE).clamp(-5, 5), (1,) * 6, value=-5.0)
    _, faces = isosurface(values, torch.full((3,), -1.04), torch.full((3,), 1.04))
    return {"iou": found, "watertight": is_watertight(faces)}


def cases(options: OneOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        for arm in ARMS:
            if not (ARMS[arm].once and seed):
                yield {"arm": arm, "level": "toys", "seed": seed}


def closed(view: View) -> list[Verdict]:
    """Whether the meshes are closed."""
    found = [row["watertight"] for row in view.chosen(NET)]
    text = f"{sum(found)} of {len(found)}"
    return [
        view.fact("the mesh of a held-out shape is closed", "meshes", text, all(found) if found else None)
    ]


NET, MASKS, HULL, SEARCH = "sparse cost volume", "masks only", "visual hull", "elevation search"
ARMS = {
    NET: Arm(One2345()),
    MASKS: Arm(One2345(colours=False)),
    HULL: Arm("hull", once=True),
    SEARCH: Arm("elevation"),
}
IOU = Value("iou", 100.0, 1, "points", 1)
STUDY = Study(
    "one2345",
    "One-2-3-45: elevations, and shapes from a sparse cost volume",
    "Minghua Liu et al.: One-2-3-45: Any Single Image to 3D Mesh in 45 Seconds without Per-Shape "
    "Optimization, NeurIPS 2023",
    OneOptions,
    ARMS,
    cases,
    measure,
    papers=(56,),
    claims=[
        Claim("overlap 5 points or more above the visual hull", BAR, NET, HULL, bar=5.0),
        Claim("overlap above that from masks alone", BAR, NET, MASKS),
        Claim(
            "median error of the elevation below 3 degrees",
            BAR,
            SEARCH,
            bar=-3.0,
            value=Value("elevation", 1.0, 2, "degrees", 2, lower=True),
        ),
    ],
    value=IOU,
    varies=("seeds", "device"),
    facts=closed,
    tables=[
        Columns(
            "Held-out shapes, and elevations",
            {
                "overlap (%)": IOU,
                "median error of the elevation (degrees)": Value("elevation", 1.0, 2),
                "worst (degrees)": Value("worst", 1.0, 2),
            },
        )
    ],
    plots=[
        Curves(
            "shapes",
            "Carved shapes from eight views",
            "",
            "intersection over union (%)",
            arms=(HULL, MASKS, NET),
            x=None,
            levels=("toys",),
            points=True,
            alt="One point an arm, with the deviation over seeds.",
        )
    ],
    notes=lambda options: [
        f"{TRAIN} toy shapes of three balls with a hollow on top, on {SIDE}^3 voxels, {VIEWS} views of "
        f"{SIZE} pixels; {HELD} others held out. {options.steps} steps of {options.batch} shapes. Elevations "
        f"of {OBJECTS} objects a seed from {MATCHES} matches in five views with {options.noise:g} of {WIDE} "
        "pixels of noise. Zero123 and LoFTR are not built.",
    ],
)
