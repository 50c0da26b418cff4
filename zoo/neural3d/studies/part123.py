"""`zoo reproduce part123`: parts of a chequered chair from masks that every view numbers in its own way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.harness.tasks import Measure, Progress, TaskResult
from zoo.neural3d.cameras import Camera, orbit
from zoo.neural3d.fields import RECIPE, field_job
from zoo.neural3d.meshes import isosurface
from zoo.neural3d.methods.part123 import Part123, PartScene, cleaned, lifted, parts
from zoo.neural3d.networks import NetworkTask, fresh
from zoo.neural3d.views import View
from zoo.neural3d.weighed import WeighedField
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Value
from zoo.studies.view import View as Rows

BOXES = torch.tensor(  # middle and half sides of seat, back and foot; y points down
    [
        [0.0, 0.1, 0.0, 0.5, 0.07, 0.5],
        [0.0, -0.38, 0.43, 0.5, 0.42, 0.07],
        [0.0, 0.47, 0.0, 0.1, 0.3, 0.1],
    ]
)
COUNT, SIZE, GRID, LEVEL = (
    8,
    48,
    48,
    15.0,
)  # views, their pixels, points of the volume, density of the surface


FIELD: dict[str, Any] = {"half": 1.0, "levels": 6, "finest": 64, "hidden": 16, "samples": 32}


@dataclass(frozen=True)
class PartOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        steps: of the field's training.
        head: steps of the features' training.
        rays: of a step of either.
    """

    seeds: int = 5
    steps: int = 250
    head: int = 300
    rays: int = 192

    def __post_init__(self) -> None:
        if min(self.seeds, self.steps, self.head, self.rays) < 1:
            raise ConfigError("give at least one seed, step and ray")


class Chair(NamedTuple):
    """Views of the chair, and in each the part of every pixel [h, w], 0 for none."""

    views: list[View]
    labels: list[Tensor]


def distances(points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
    """Distances from the three parts, negative inside."""
    away = (points[..., None, :] - BOXES[:, :3]).abs() - BOXES[:, 3:]
    return away.clamp_min(0).norm(dim=-1) + away.amax(-1).clamp_max(0)


@cache
def chair() -> Chair:
    """The chair from all around; colours are a chequer in space and tell no parts apart."""
    cameras = orbit(torch.zeros(3), 3.2, COUNT, (SIZE, SIZE), field_of_view=0.62, elevations=(0.4, 0.15))
    views, labels = [], []
    for number, camera in enumerate(cameras):
        colour, part = _traced(camera)
        views.append(View(camera, colour, (part > 0).float(), None, f"view {number}"))
        labels.append(part)
    return Chair(views, labels)


def _traced(camera: Camera) -> tuple[Tensor, Tensor]:
    origin, rays = camera.rays()
    far = torch.full(rays.shape[:2], 1.8)
    for _ in range(60):
        far = (far + distances(origin + far[..., None] * rays).amin(-1)).clamp_max(6.0)
    points = origin + far[..., None] * rays
    nearest, which = distances(points).min(-1)
    hit = nearest < 0.01
    odd = (points / 0.25).floor().sum(-1) % 2
    shade = 0.75 + 0.25 * ((points[..., 0] * 7).sin() * (points[..., 1] * 5).cos())
    colour = (0.25 + 0.5 * odd)[..., None] * shade[..., None] * torch.tensor([1.0, 0.8, 0.5])
    return torch.where(hit[..., None], colour, 1.0), torch.where(hit, which + 1, 0)


def masks_of(scene: Chair, seed: int) -> list[Tensor]:
    """Masks as a segmenter of single views gives them: numbers in any order, and one view with a part cut in
    two."""
    generator, found = torch.Generator().manual_seed(seed), []
    for number, labels in enumerate(scene.labels):
        own = labels.clone()
        if number == seed % COUNT:
            line = torch.arange(SIZE).expand(SIZE, SIZE)
            middle = line[own == 1].median()
            own[(own == 1) & (line > middle)] = 4
        order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(4, generator=generator)])
        found.append(cleaned(order[own], f"view {number}"))
    return found


@cache
def fitted(options: PartOptions, seed: int) -> WeighedField:
    """A field of the chair."""
    model = fresh(WeighedField, seed, **FIELD)
    recipe = Recipe(**{**RECIPE, "steps": options.steps})
    field_job(chair().views, recipe=recipe, seed=seed, batch=options.rays).fit(model, macs=lambda: 0.0).run()
    return model.eval()


def surface(model: WeighedField) -> tuple[Tensor, Tensor]:
    """Points [n, 3] of a field's surface near the chair, and their colours [n, 3].

    Raises:
        DataError: there are none.
    """
    line = torch.linspace(-0.95, 0.95, GRID)
    grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    ahead = torch.tensor([0.0, 0.0, 1.0])
    with torch.no_grad():
        density = torch.cat([model.at(some, ahead.expand_as(some))[0] for some in grid.split(16384)])
        points, _ = isosurface(density.reshape(GRID, GRID, GRID), grid[0], grid[-1], LEVEL)
        points = points[distances(points).amin(1) < 0.1]  # floaters belong to no part
        if not len(points):
            raise DataError("the field has no surface near the chair: train it longer")
        return points, model.at(points, ahead.expand_as(points))[1]


def _agreement(points: Tensor, found: Tensor) -> float:
    """Adjusted Rand index of parts of points with the true ones."""
    return float(adjusted_rand_score(distances(points).argmin(1), found))


class ChairParts(NetworkTask):
    """Adjusted Rand index of the parts that are found on the surface of a chair, from its views and masks
    numbered anew in each, and how far their number is from three."""

    name, primary = "neural3d/chair-parts", "ari"
    network = PartScene

    def direction(self, metric: str) -> int:
        """A number of parts that is off is worse."""
        return 1 if metric == "ari" else -1

    def measured_on(self) -> Any:
        return [chair().labels, masks_of(chair(), 0)]

    def example(self, model: PartScene) -> tuple[Any, ...]:
        """A point."""
        return (torch.zeros(1, 3),)

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure a field with features."""
        own = self.fitting(model).eval()
        points, scene = surface(own.field)[0], chair()
        found = parts(own.field, own.head, scene.views, masks_of(scene, 0), points)
        off = abs(len(found.unique()) - len(BOXES))
        return TaskResult(
            {"ari": Measure(_agreement(points, found)), "parts_off": Measure(off)}, n=len(points)
        )


def made(options: PartOptions, seed: int) -> PartScene:
    """A field of the chair with features."""
    model, scene = fitted(replace(options, seeds=1), seed), chair()
    masks = masks_of(scene, seed)
    rendered = [lifted(model, view, mask) for view, mask in zip(scene.views, masks, strict=True)]
    out = PartScene(**FIELD)
    out.field.load_state_dict(model.state_dict())
    head = Part123(steps=options.head, rays=options.rays).fit(rendered, seed)
    out.head.load_state_dict(head.state_dict())
    return out.eval()


def measure(make: Part123 | None, options: PartOptions, case: Row, cells: CellCache) -> Row:
    """Agreement of the parts found with the true ones, and their number."""
    scene, seed = chair(), case["seed"]
    model = fitted(replace(options, seeds=1), seed)
    points, colours = surface(model)
    if make is None:
        places = torch.cat([points / points.std(0), colours / colours.std(0)], 1).numpy()
        found = torch.from_numpy(KMeans(len(BOXES), n_init=5, random_state=seed).fit(places).labels_)
    else:
        masks = masks_of(scene, seed)
        rendered = [lifted(model, view, mask) for view, mask in zip(scene.views, masks, strict=True)]
        trained = replace(make, steps=options.head if make.steps else 0, rays=options.rays)
        found = parts(model, trained.fit(rendered, seed), scene.views, masks, points)
    return {
        "ari": _agreement(points, found),
        "parts": len(found.unique()),
        "points": len(points),
    }


def cases(options: PartOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        yield from ({"arm": arm, "level": "chair", "seed": seed} for arm in ARMS)


def number(view: Rows) -> list[Verdict]:
    """Whether the number of parts is found in every run."""
    found = [row["parts"] for row in view.chosen(OURS)]
    text = ", ".join(map(str, found))
    return [
        view.fact("three parts are found, in every seed", BAR, text, set(found) == {3} if found else None)
    ]


OURS, NEW, PLAIN = "Part123", "features not trained", "colour and position, told three"
ARMS = {OURS: Arm(Part123()), NEW: Arm(Part123(steps=0)), PLAIN: Arm()}
ARI = Value("ari", 1.0, 3, "", 3)
STUDY = Study(
    "part123",
    "Part123: parts from masks of single views",
    "Anran Liu et al.: Part123: Part-aware 3D Reconstruction from a Single-view Image, SIGGRAPH 2024",
    PartOptions,
    ARMS,
    cases,
    measure,
    papers=(33,),
    claims=[
        Claim("the parts' adjusted Rand index is above 0.8", BAR, OURS, bar=0.8),
        Claim("parts agree better than clusters of colour and position", "better than others", OURS, PLAIN),
        Claim("parts agree better than clusters of untrained features", BAR, OURS, NEW),
    ],
    value=ARI,
    varies=("seeds", "device"),
    facts=number,
    tables=[
        Columns(
            "Parts of the surface",
            {"adjusted Rand index": ARI, "parts": Value("parts", 1.0, 1), "points": Value("points", 1.0, 0)},
        )
    ],
    plots=[
        Curves(
            "parts",
            "Parts of a chair",
            "parts found",
            "adjusted Rand index",
            x=Value("parts", 1.0),
            levels=("chair",),
            points=True,
            alt="One point an arm, with the deviation over seeds; the chair has three parts.",
        )
    ],
    notes=lambda options: [
        f"A chair of three boxes in {COUNT} views of {SIZE} pixels, whose masks are numbered anew in each; "
        f"one view has a part cut in two. {options.steps} steps of the field, then {options.head} of the "
        f"features, {options.rays} rays each. Views and masks are given; no diffusion model and no SAM.",
    ],
)
