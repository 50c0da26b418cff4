"""`zoo sparsify my-scene.ply --keep 0.3 --out small.ply`: scenes that others trained, with fewer Gaussians.

The scene's own pictures are what the smaller one is judged by, from places between those that the choice and
the recovery steps have seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from zoo.cli.parsing import Positional, metavar
from zoo.errors import ConfigError
from zoo.neural3d.cameras import Camera
from zoo.neural3d.formats import WRITERS, read_splats, write_splats
from zoo.neural3d.importance import SCORES, cameras_around, pruned
from zoo.neural3d.metrics import psnr
from zoo.neural3d.packed import read_packed, steps_for, write_packed
from zoo.neural3d.refine import refine, scene_job
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import Splats
from zoo.neural3d.views import View


@dataclass
class SparsifyScene:
    """Prune a scene file to a share of its Gaussians, and compress what is left."""

    model: Annotated[Path, Positional, metavar("SCENE")]
    """A .ply, .splat, .spz or .sog file, or meta.json of a SOG folder."""

    out: Path
    """Where to: .ply, .spz, .sog, or .safetensors for the fewest bytes."""

    method: Literal[
        "removal-error", "max-contribution", "contribution", "opacity-volume", "opacity", "random"
    ] = "removal-error"
    """What tells which Gaussians matter."""

    keep: float = 0.3
    """Share of the Gaussians that stay, exactly."""

    rounds: int = 4
    """In how many rounds the others go; what is left is scored again in each."""

    steps: int = 0
    """Recovery steps, each on one picture of the whole scene."""

    degree: int | None = None
    """Cut the harmonics to this degree; recovery steps let the rest make up for it."""

    coarser: float = 1.0
    """Factor on the rounding steps of a .safetensors file."""

    views: int = 24
    """Cameras round the scene that the choice and the recovery look through."""

    size: int = 400
    """Pixels on a side of a picture."""

    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Colour behind the scene, from 0 to 1."""

    picture: Path | None = None
    """A .png of the scene before (above) and after (below)."""

    seed: int = 0
    """Of chance, random signs and the order of the steps."""

    overwrite: bool = False
    """Replace a file that is there."""

    json: bool = False
    """Print JSON."""

    def run(self) -> dict[str, Any]:
        """Prune, recover, write, and measure what was written.

        Raises:
            ConfigError: options out of range.
            DataError: a file that is no scene, or damaged.
        """
        self._check()
        before = read_splats(self.model)
        whole = GaussianScene.from_splats(before, self.background)
        seen = cameras_around(before, self.views, self.size)
        judged = cameras_around(before, max(4, self.views // 4), self.size, held_out=True)
        pictures, seconds_before = _pictures(whole, judged)
        mask = pruned(whole, SCORES[self.method], self.keep, seen, rounds=self.rounds, seed=self.seed)
        degree = before.sh_degree if self.degree is None else min(self.degree, before.sh_degree)
        scene = whole.like(before.rows(mask).with_degree(degree))
        report: dict[str, Any] = {"scene": str(self.model), "out": str(self.out), "method": self.method}
        report |= {"gaussians": [len(before), len(scene)], "degree": [before.sh_degree, degree]}
        report["psnr_pruned"] = _mean_psnr(_pictures(scene, judged)[0], pictures)
        if self.steps:
            targets, _ = _pictures(whole, seen)
            train = [View(camera, image) for camera, image in zip(seen, targets, strict=True)]
            job = scene_job(train, steps=self.steps, seed=self.seed)
            refine(scene, job)
        after = self._write(scene.splats)
        found, seconds_after = _pictures(whole.like(after), judged)
        report["bytes"] = [_size(self.model), _size(self.out)]
        report["bytes_per_gaussian"] = report["bytes"][1] / len(after)
        report["psnr"] = _mean_psnr(found, pictures)
        report["milliseconds_per_frame"] = [1e3 * seconds_before, 1e3 * seconds_after]
        if self.picture is not None:
            save_rows(self.picture, [pictures[:4], found[:4]])
        return report

    @staticmethod
    def describe(report: dict[str, Any]) -> str:
        """A report of `run` as lines of text."""
        (many, few), (old, new) = report["gaussians"], report["bytes"]
        slow, fast = report["milliseconds_per_frame"]
        return (
            f"{report['out']}: {few} of {many} Gaussians by {report['method']}, "
            f"degree {report['degree'][1]}\n"
            f"{new / 1e6:.2f} of {old / 1e6:.2f} MB, {report['bytes_per_gaussian']:.1f} bytes a Gaussian\n"
            f"{report['psnr']:.1f} dB against the whole scene's own pictures "
            f"({report['psnr_pruned']:.1f} before recovery and rounding)\n"
            f"{fast:.0f} ms a frame, {slow:.0f} before"
        )

    def _check(self) -> None:
        if self.out.suffix not in (*WRITERS, ".safetensors"):
            raise ConfigError(
                f"--out {self.out}: give a name that ends in {', '.join(WRITERS)} or .safetensors"
            )
        if self.out.exists() and not self.overwrite:
            raise ConfigError(f"{self.out} is there already; give another place, or --overwrite")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"--keep must be a share above 0, at most 1, such as 0.3; received {self.keep}")
        for name, least in (("rounds", 1), ("steps", 0), ("views", 4), ("size", 16)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} must be at least {least}; received {getattr(self, name)}")
        if not self.coarser > 0 or (self.degree is not None and not 0 <= self.degree <= 4):
            raise ConfigError(
                f"--coarser above 0 and --degree 0 to 4; received {self.coarser} and {self.degree}"
            )

    def _write(self, splats: Splats) -> Splats:
        """Write the scene; returns what a reader of the file gets."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.out.suffix == ".safetensors":
            write_packed(self.out, splats, steps_for(splats, self.coarser))
            return read_packed(self.out)
        write_splats(self.out, splats)
        return read_splats(self.out)


def save_rows(path: Path, rows: Sequence[Sequence[Tensor]]) -> None:
    """Write rows of pictures [height, width, 3] of one size as one .png."""
    from PIL import Image

    sheet = torch.cat([torch.cat([image.clamp(0, 1) for image in row], 1) for row in rows], 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().byte().numpy()).save(path)


def _pictures(scene: GaussianScene, cameras: Sequence[Camera]) -> tuple[list[Tensor], float]:
    """What the cameras see, and the median of the seconds that a picture took."""
    pictures, seconds = [], []
    with torch.no_grad():
        for camera in cameras:
            start = time.perf_counter()
            pictures.append(scene(camera))
            seconds.append(time.perf_counter() - start)
    return pictures, sorted(seconds)[len(seconds) // 2]


def _mean_psnr(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return sum(psnr(one, other.clamp(0, 1)) for one, other in zip(found, wanted, strict=True)) / len(found)


def _size(path: Path) -> int:
    if path.name == "meta.json":
        path = path.parent
    return sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size
