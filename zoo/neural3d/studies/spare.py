"""`zoo reproduce spare`: real views of DTU through the benchmark and ranked directly, 3 and 9 inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.neural3d.refine import refine, scene_job, start_of
from zoo.neural3d.spare import SceneSplit, evaluate, pack, read_submission, score
from zoo.neural3d.views import Views, load_views
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves, Grid
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Value, View


@dataclass(frozen=True)
class SpareOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        views: a set with masks, of `zoo.neural3d.views.load_views`.
        tracks: numbers of input views.
        asked: views to render, ten as in the challenge.
        steps: of a training.
        gaussians: of a scene.
    """

    seeds: int = 3
    views: str = "dtu24-100"
    tracks: tuple[int, ...] = (3, 9)
    asked: int = 10
    steps: int = 250
    gaussians: int = 1500

    def __post_init__(self) -> None:
        if min(self.seeds, self.asked, self.steps, self.gaussians, *self.tracks) < 1:
            raise ConfigError("give at least one seed, view, step and Gaussian")


def measure(make: Any, options: SpareOptions, case: Row, cells: CellCache) -> Row:
    """The figures of a submission that was packed, checked and read, and those of the images themselves."""
    whole = load_views(options.views)
    views = replace(whole, train=whole.train[: case["level"]], test=whole.test[: options.asked])
    images = [image.clamp(0, 1) for image in _rendered(make, views, options, case["seed"])]
    count = len(views.train)
    split = {"scan24": SceneSplit(tuple(range(count)), tuple(range(count, count + len(images))), "DTU")}
    camera = views.test[0].camera
    with tempfile.TemporaryDirectory() as folder:
        path = pack(Path(folder) / "s.zip", split, lambda scene, view: images[view - count])
        found = read_submission(path, split, {"scan24": (camera.width, camera.height)})
    truth = {"scan24": {count + number: view for number, view in enumerate(views.test)}}
    figures: Row = evaluate(found, truth, split)["datasets"]["DTU"]
    direct = [score(image, view) for image, view in zip(images, views.test, strict=True)]
    return figures | {f"direct {name}": fmean(one[name] for one in direct) for name in figures}


def _rendered(make: str, views: Views, options: SpareOptions, seed: int) -> list[Tensor]:
    if make == "nearest":
        at = torch.stack([view.camera.centre for view in views.train])
        near = [int((at - view.camera.centre).norm(dim=1).argmin()) for view in views.test]
        return [views.train[index].image for index in near]
    if make == "mean":
        colour = torch.stack([view.image.mean((0, 1)) for view in views.train]).mean(0)
        return [colour.expand_as(view.image) for view in views.test]
    known = views if make == "points" else replace(views, points=None, colours=None)
    scene = start_of(known, options.gaussians, 0, seed)
    refine(scene, scene_job(views.train, seed=seed, steps=options.steps))
    with torch.no_grad():
        return [scene(view.camera) for view in views.test]


def cases(options: SpareOptions) -> Iterator[Row]:
    """All arms of a track and seed before the next."""
    for level in options.tracks:
        for seed in range(options.seeds):
            for name, arm in ARMS.items():
                if not (arm.once and seed):
                    yield {"arm": name, "level": level, "seed": seed}


def _ranks(view: View) -> list[Verdict]:
    verdicts = []
    for level in view.levels():
        orders = []
        for prefix in ("", "direct "):
            means = {
                arm: fmean(view.values(arm, level, Value(f"{prefix}psnr_m", 1.0))) for arm in view.arms()
            }
            orders.append(sorted(means, key=lambda arm: -means[arm]))
        same = orders[0] == orders[1]
        verdicts.append(
            Verdict(
                f"{level} inputs: the benchmark ranks as direct evaluation does",
                BAR,
                " > ".join(orders[0]),
                "holds" if same else "does not hold",
                paper=(21,),
            )
        )
    return verdicts


POINTS, CHANCE, NEAREST, MEAN = (
    "Gaussians from points",
    "Gaussians from chance",
    "nearest input",
    "mean colour",
)
ARMS = {
    POINTS: Arm("points"),
    CHANCE: Arm("chance"),
    NEAREST: Arm("nearest", once=True),
    MEAN: Arm("mean", once=True),
}
STUDY = Study(
    "spare",
    "SpaRe: the benchmark of sparse rendering",
    "Michal Nazarczuk et al.: AIM 2024 Sparse Neural Rendering Challenge: Dataset and Benchmark, ECCV "
    "Workshops 2024",
    SpareOptions,
    ARMS,
    cases,
    measure,
    papers=(21,),
    claims=[
        Claim("{level} inputs: points to start from help", BAR, POINTS, CHANCE),
        Claim("{level} inputs: control: Gaussians above the nearest input", BAR, POINTS, NEAREST),
        Claim("{level} inputs: control: the nearest input above the mean colour", BAR, NEAREST, MEAN),
    ],
    value=Value("psnr_m", 1.0, 2, "dB", 2),
    varies=("seeds", "tracks", "device"),
    facts=_ranks,
    tables=[
        Grid("PSNR-M (dB) by number of inputs"),
        Grid("PSNR (dB)", value=Value("psnr", 1.0, 2)),
        Grid("SSIM-M", value=Value("ssim_m", 1.0, 3)),
        Grid("SSIM", value=Value("ssim", 1.0, 3)),
    ],
    plots=[
        Curves(
            "inputs", "Masked PSNR by number of inputs", "input views", "PSNR-M (dB)", x=lambda level: level
        )
    ],
    notes=lambda options: [
        f"DTU scan 24 at 100 x 75 pixels, {options.asked} views asked for, inputs of the sparse-view "
        "protocol. The benchmark's own images are hidden behind its platform. The points were triangulated "
        "from all views, more than a method with 3 inputs has. LPIPS: not available.",
    ],
)
