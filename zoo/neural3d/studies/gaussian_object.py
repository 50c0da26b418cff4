"""`zoo reproduce gaussian-object`: begun from the hull of four masks or at random, floaters removed or
not."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zoo.neural3d.hull import cube, visual_hull
from zoo.neural3d.methods.gaussian_object import GaussianObject, hull_points
from zoo.neural3d.methods.repair import Repair
from zoo.neural3d.refine import scene_job
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import from_points
from zoo.neural3d.studies import common
from zoo.neural3d.views import Views, load_views, middle_of_views
from zoo.studies.cells import CellCache
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.view import Row, Value

RANDOM, HULL, CLEAN = "random start", "hull", "hull, floaters removed"
LONGER, OWN, REPAIRED = (
    "trained on",
    "trained on, its own pictures as aims",
    "trained on, repaired pictures as aims",
)
SIDE = 32


@dataclasses.dataclass(frozen=True)
class ObjectOptions(common.FewOptions):
    """Options of the experiment.

    Args:
        views: sets of views.
        seeds: how many, from 0.
        steps: of every arm.
        count: Gaussians to start from.
    """

    views: tuple[str, ...] = ("shapes-ring", "lego")
    steps: int = 200


def random_start(views: Views, count: int, seed: int) -> GaussianScene:
    """Gaussians in a cube of half the cameras' distance, of random colours."""
    generator = torch.Generator().manual_seed(seed)
    centre, extent = middle_of_views(views.train)
    points = centre + (torch.rand(count, 3, generator=generator) - 0.5) * 0.6 * extent
    return GaussianScene.from_splats(
        from_points(points, torch.rand(count, 3, generator=generator), 0), views.background
    )


def outside(means: Tensor, name: str) -> float:
    """Share of points outside the hull of all training views, grown by a cell."""
    views = load_views("shapes-48" if name == "shapes-ring" else "lego-50").train
    centre, extent = middle_of_views(views)
    half = extent / 2
    inside = visual_hull(views, cube(centre, half, SIDE), 1).reshape(SIDE, SIDE, SIDE)
    grown = functional.max_pool3d(inside.float()[None, None], 3, 1, 1)[0, 0] > 0
    unit = (means - centre) / (2 * half) + 0.5
    x, y, z = (unit * SIDE).long().clamp(0, SIDE - 1).unbind(1)
    return float((~grown[z, y, x] | ((unit < 0) | (unit > 1)).any(1)).double().mean())


def measure(make: Any, options: ObjectOptions, case: Row, cells: CellCache) -> Row:
    """One training, and what it shows of held-out views."""
    views, seed = common.few_views(case["views"]), case["seed"]
    job = scene_job(views.train, seed=seed, steps=options.steps)
    given = random_start(views, options.count, seed)
    repair = make if isinstance(make, Repair) else None
    scene: Any = (GaussianObject if repair else make)().sparsify(given, job).model
    if repair is not None:
        start = given.like(hull_points(views.train, options.count, 0, seed))
        scene = replace(repair, without=options.steps, steps=options.steps).fit(
            scene, start, views.train, seed
        )
    found = common.quality(scene, views.test)
    means = scene.means.detach()
    return {**found, "count": len(means), "outside": outside(means, case["views"])}


OUTSIDE = Value("outside", 100.0, 1, "% of the Gaussians", 1, lower=True)
COUNT = Value("count", 1.0, 0, "Gaussians", 0)
ARMS = {
    RANDOM: Arm(partial(GaussianObject, hull=False, floaters=False)),
    HULL: Arm(partial(GaussianObject, floaters=False)),
    CLEAN: Arm(GaussianObject),
    LONGER: Arm(Repair(drawn=False)),
    OWN: Arm(Repair(learned=0)),
    REPAIRED: Arm(Repair()),
}

STUDY = Study(
    "gaussian-object",
    "GaussianObject: hull and floaters at four views",
    "Yang et al., GaussianObject: High-Quality 3D Object Reconstruction from Four Views, SIGGRAPH Asia 2024",
    ObjectOptions,
    ARMS,
    lambda options: common.cases(ARMS, options),
    measure,
    papers=(50,),
    claims=[
        Claim("{where}: hull above a random start by 1 dB", "24.81 dB, Mip-NeRF 360", HULL, RANDOM, 1.0),
        Claim("{where}: fewer Gaussians outside with floaters removed", BAR, CLEAN, HULL, value=OUTSIDE),
        Claim("{where}: at no loss of 0.2 dB", BAR, CLEAN, HULL, -0.2),
        Claim("{where}: repair does not lower PSNR", BAR, REPAIRED, LONGER, -0.05),
        Claim("{where}: repair raises PSNR", BAR, REPAIRED, LONGER),
        Claim("{where}: repaired aims above its own pictures as aims", BAR, REPAIRED, OWN),
    ],
    value=common.PSNR,
    varies=("seeds", "views"),
    data=common.content,
    by=("views",),
    titles=common.TITLES,
    tables=[
        lambda view: common.table(
            view, {"PSNR, dB": common.PSNR, "outside the hull, %": OUTSIDE, "Gaussians": COUNT}
        )
    ],
    plots=[common.by_view],
    notes=lambda options: [
        "Renderings are repaired by a small diffusion model that is trained on the views left out in turn: "
        "Stable Diffusion's weights are not available. The arms that train on do so for as many steps again."
    ],
)
