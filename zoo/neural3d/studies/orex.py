"""`zoo reproduce orex`: surfaces through real cross-sections, against the true meshes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.harness.tasks import Measure, Progress, TaskResult
from zoo.neural3d.meshes import chamfer, is_watertight, occupancy, overlap, surface_points, volume_of
from zoo.neural3d.methods.orex import IterativeField, OReX, load_sections, rbf, surface, volume
from zoo.neural3d.networks import NetworkTask
from zoo.studies.cells import CellCache
from zoo.studies.figures import Grid
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.view import Row, Value


@dataclass(frozen=True)
class OReXOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        shapes: of ZOO_DATA/orex-csl, with their true meshes.
        steps: of a training.
        batch: points of a step.
        iterations: of the network.
        grid: points of the volume on a side.
    """

    seeds: int = 3
    shapes: tuple[str, ...] = ("eight_15",)
    steps: int = 400
    batch: int = 1024
    iterations: int = 4
    grid: int = 48

    def __post_init__(self) -> None:
        if min(self.seeds, self.steps, self.batch, self.iterations) < 1 or self.grid < 8:
            raise ConfigError("give at least one seed, step, point and iteration, and a grid of 8")


def measure(make: Any, options: OReXOptions, case: Row, cells: CellCache) -> Row:
    """Distance of the surfaces, overlap of the volumes, and whether the mesh is closed."""
    sections, truth = load_sections(case["level"])
    if truth is None:
        raise ConfigError(f"{case['level']} has no true mesh to compare with")
    if make is None:
        field: Any = rbf(sections)
    else:
        made = replace(make, steps=options.steps, batch=options.batch)
        made = made if made.iterations == 1 else replace(made, iterations=options.iterations)
        field = made.fit(sections, case["seed"])
    return compared(field, truth, options.grid)


def compared(field: Any, truth: tuple[Tensor, Tensor], grid: int) -> Row:
    """The zero surface of a field beside the true one, on a grid."""
    values = volume(field, grid)
    vertices, faces = surface(values)
    low, high = torch.full((3,), -1.0), torch.full((3,), 1.0)
    true = occupancy(*truth, grid, low, high)
    found = surface_points(vertices, faces, 8000)
    return {
        "iou": overlap(values < 0, true),
        "chamfer": chamfer(found, surface_points(*truth, 8000, seed=1)),
        "floor": chamfer(surface_points(*truth, 8000), surface_points(*truth, 8000, seed=1)),
        "watertight": is_watertight(faces),
        "volume": [volume_of(vertices, faces), volume_of(*truth)],
    }


class EightSections(NetworkTask):
    """The surface through cross-sections of a figure of eight beside the true mesh: overlap of the volumes on
    48^3 points, and the mean distance of the surfaces in thousandths of the half box."""

    name, primary = "neural3d/sections-eight", "iou"
    network = IterativeField

    def direction(self, metric: str) -> int:
        """Less distance is better."""
        return 1 if metric == "iou" else -1

    def measured_on(self) -> Any:
        return list(_eight())

    def example(self, model: IterativeField) -> tuple[Any, ...]:
        """A point."""
        return (torch.zeros(1, 3),)

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure a field."""
        found = compared(self.fitting(model), _eight(), 48)
        measures = {"iou": Measure(found["iou"]), "chamfer": Measure(1000 * found["chamfer"])}
        return TaskResult(measures, n=1)


def _eight() -> tuple[Tensor, Tensor]:
    truth = load_sections("eight_15")[1]
    assert truth is not None
    return truth


def cases(options: OReXOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for shape in options.shapes:
        for seed in range(options.seeds):
            for name, arm in ARMS.items():
                if not (arm.once and seed):
                    yield {"arm": name, "level": shape, "seed": seed}


OURS, PLAIN, RBF = "OReX", "plain network", "RBF"
ARMS = {OURS: Arm(OReX()), PLAIN: Arm(OReX(iterations=1, hinge=False)), RBF: Arm(None, once=True)}
IOU = Value("iou", 100.0, 2, "points", 2)
CHAMFER = Value("chamfer", 1e3, 2, "thousandths", 2, lower=True)
STUDY = Study(
    "orex",
    "OReX: closed surfaces through planar cross-sections",
    "Haim Sawdayee et al.: OReX: Object Reconstruction from Planar Cross-sections Using Neural Fields, "
    "CVPR 2023",
    OReXOptions,
    ARMS,
    cases,
    measure,
    papers=(60,),
    claims=[
        Claim("{level}: overlap above the plain network", "better than others", OURS, PLAIN),
        Claim(
            "{level}: distance below the plain network's", "better than others", OURS, PLAIN, value=CHAMFER
        ),
        Claim("{level}: overlap at least that of RBF, less one point", BAR, OURS, RBF, bar=-1.0),
        Claim(
            "{level}: distance at most that of RBF and 2 thousandths", BAR, OURS, RBF, bar=-2.0, value=CHAMFER
        ),
    ],
    value=IOU,
    varies=("seeds", "shapes", "device"),
    tables=[
        Grid("Overlap with the true volume (%)", columns=lambda view, level: str(level)),
        Grid(
            "Distance to the true surface (thousandths of the half box)",
            value=CHAMFER,
            columns=lambda view, level: str(level),
        ),
    ],
    notes=lambda options: [
        f"{options.steps} steps of {options.batch} points and {options.iterations} iterations; the released "
        "code does 10 iterations in float64 on 16,384 points. Sections and meshes are of its repository.",
        "`floor` in the rows is the distance between two samples of the true surface.",
    ],
)
