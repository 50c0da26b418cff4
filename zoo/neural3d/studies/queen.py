"""`zoo reproduce queen`: a ball that moves through the still shapes, frame by frame, and what each costs."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, TaskError
from zoo.harness.tasks import Flops, Progress, Task, TaskResult
from zoo.neural3d.cameras import orbit
from zoo.neural3d.methods.queen import Queen, Residual, Stream, read_frame, write_frame
from zoo.neural3d.metrics import psnr, ssim
from zoo.neural3d.packed import steps_for, write_packed
from zoo.neural3d.refine import RATES, mean_psnr, refine, scene_job, start_of
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.shapes import BALLS, FIELD, shapes, view_of
from zoo.neural3d.tasks import drawing
from zoo.neural3d.views import View
from zoo.studies.cells import CellCache
from zoo.studies.figures import Grid
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.tables import Plot, Series
from zoo.studies.view import Row, Value
from zoo.studies.view import View as Rows

CENTRE, MOVER = torch.tensor([0.0, -0.3, 0.0]), 3  # the ball that moves, of `zoo.neural3d.shapes.BALLS`
STEP = torch.tensor([0.06, -0.03, 0.05])  # in a frame
BYTES = 4 * (3 + 3 + 4 + 1 + 3)  # of a Gaussian whose every number is stored


@dataclass(frozen=True)
class QueenOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        frames: of the video, with the first.
        gaussians: of every frame.
        size: pixels on a side.
        first: steps of the first frame.
        steps: of each later frame.
    """

    seeds: int = 3
    frames: int = 5
    gaussians: int = 1000
    size: int = 64
    first: int = 1500
    steps: int = 60

    def __post_init__(self) -> None:
        if min(self.seeds, self.frames - 1, self.gaussians, self.first, self.steps) < 1:
            raise ConfigError("give at least one seed, two frames, one Gaussian and one step")


VIDEO = QueenOptions(frames=3, gaussians=800)  # of the bundles


def ball_at(frame: int) -> Tensor:
    """The balls of a frame."""
    balls = BALLS.clone()
    balls[MOVER, :3] += frame * STEP
    return balls


def video(options: QueenOptions) -> tuple[list[list[View]], list[list[View]]]:
    """Training and held-out views of every frame."""
    size = (options.size, options.size)
    train = orbit(CENTRE, 3.6, 12, size, field_of_view=FIELD, elevations=(0.3, 0.7, 1.0))
    test = orbit(CENTRE, 3.6, 4, size, field_of_view=FIELD, elevations=(0.5,), start=0.3)
    frames = range(options.frames)
    return (
        [[view_of(camera, "train", ball_at(frame)) for camera in train] for frame in frames],
        [[view_of(camera, "test", ball_at(frame)) for camera in test] for frame in frames],
    )


def first_frame(options: QueenOptions, seed: int, views: list[View], cells: CellCache) -> GaussianScene:
    """The whole scene of frame 1, which all arms go on from."""
    scene = start_of(replace(shapes(8, 1, 1), train=views), options.gaussians, 0, seed)
    key = {"study": "queen", "cell": "first", "seed": seed, "gaussians": options.gaussians}
    key |= {"size": options.size, "steps": options.first}

    def compute() -> tuple[Row, dict[str, Tensor]]:
        refine(scene, scene_job(views, seed=seed, steps=options.first))
        return {}, scene.state_dict()

    scene.load_state_dict(cells.tensors(key, compute)[1])
    return scene


def still(scene: GaussianScene) -> Tensor:
    """Gaussians that no frame's ball comes near: within the reach of 0.1 beyond its surface."""
    where = torch.stack([ball_at(frame)[MOVER, :3] for frame in range(8)])
    return torch.cdist(scene.means.detach(), where).amin(1) > float(BALLS[MOVER, 3]) + 0.1


def free(before: GaussianScene, views: list[View], steps: int, seed: int) -> GaussianScene:
    """The next frame with every number of every Gaussian trained."""
    scene = before.like(before.splats)
    rates = {**RATES, "means": Queen.rates[0]}
    groups = [
        {"params": [parameter], "lr": rates[name]}
        for name, parameter in scene.named_parameters()
        if parameter.numel()
    ]
    scene_job(views, seed=seed, steps=steps).fit(scene, parameters=groups, macs=lambda: 0.0).run()
    return scene


class MovingBall(Task):
    """PSNR and SSIM of four held-out views of each later frame of a ball that moves, and the share of the
    Gaussians that do not move in that frame."""

    name, domain, primary, unit = "neural3d/moving-ball", "neural3d", "psnr", "dB"

    def accepts(self, card: Any) -> bool:
        """Videos that were measured on this."""
        return self.is_on(card)

    def measured_on(self) -> Any:
        return [[view.image for view in views] for views in video(VIDEO)[1]]

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure a video.

        Raises:
            TaskError: something else, or another number of frames.
        """
        if not isinstance(model, Stream) or len(model.frames) != VIDEO.frames - 1:
            raise TaskError(f"{self.name} takes a Stream of {VIDEO.frames} frames")
        samples: dict[str, list[float]] = {"psnr": [], "ssim": [], "at_rest": []}
        found, views = model.scenes(), video(VIDEO)[1]
        with torch.no_grad():
            for number in range(1, len(found)):
                at_rest = float((found[number].means == found[number - 1].means).all(1).float().mean())
                for view in views[number]:
                    seen = found[number](view.camera)
                    samples["psnr"].append(psnr(seen, view.image))
                    samples["ssim"].append(ssim(seen, view.image))
                    samples["at_rest"].append(at_rest)
        return TaskResult.from_samples(samples)

    def flops(self, model: nn.Module) -> Flops | None:
        """Operations of drawing the held-out views of the later frames."""
        if not isinstance(model, Stream):
            return None
        views = video(VIDEO)[1]
        pairs = zip(model.scenes()[1:], views[1:], strict=True)
        total = sum(drawing(scene, [view.camera for view in own]) for scene, own in pairs)
        return Flops(total, total)


def streamed(make: Queen, options: QueenOptions, seed: int) -> Stream:
    """A video whose frames are learned one after the other."""
    train, _ = video(options)
    scene = start_of(replace(shapes(8, 1, 1), train=train[0]), options.gaussians, 0, seed)
    refine(scene, scene_job(train[0], seed=seed, steps=options.first))
    found: list[Residual] = []
    for old, new in itertools.pairwise(train):
        found.append(replace(make, steps=options.steps).fit(scene, old, new, seed))
        scene = found[-1].scene()
    return Stream.of(found)


def measure(make: Any, options: QueenOptions, case: Row, cells: CellCache) -> Row:
    """PSNR over the later frames' held-out views, bytes of a frame, and how many still Gaussians stay."""
    train, test = video(options)
    scene, seed = first_frame(options, case["seed"], train[0], cells), case["seed"]
    at_rest, found, sizes, closed, exact = still(scene), [], [], [], True
    for frame in range(1, options.frames):
        if isinstance(make, Queen):
            residual = replace(make, steps=options.steps).fit(scene, train[frame - 1], train[frame], seed)
            with tempfile.TemporaryDirectory() as folder:
                sizes.append(write_frame(Path(folder) / "frame", residual))
                decoded = read_frame(Path(folder) / "frame", scene)
            gates, scene = residual.gates().detach(), residual.scene()
            closed.append(float((gates[at_rest] == 0).float().mean()))
            exact &= all(map(torch.equal, decoded.splats.tensors, scene.splats.tensors))
        elif make == "free":
            scene = free(scene, train[frame], options.steps, seed)
            sizes.append(BYTES * len(scene))
        if make == "packed":
            scene = free(scene, train[frame], options.steps, seed)
            with tempfile.TemporaryDirectory() as folder:
                size = write_packed(Path(folder) / "frame", scene.splats, steps_for(scene.splats))
            sizes.append(size)
        found.append(mean_psnr(scene, test[frame]))
    row: Row = {"psnr": found, "bytes": sizes or [0]}
    return row | ({"closed": closed, "exact": exact} if closed else {})


def cases(options: QueenOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        yield from ({"arm": arm, "level": "video", "seed": seed} for arm in ARMS)


def _plot(view: Rows) -> Plot:
    series = []
    for arm in view.arms():
        runs = [row["psnr"] for row in view.chosen(arm)]
        means = [sum(values) / len(values) for values in zip(*runs, strict=True)]
        series.append(Series(arm, list(range(2, len(means) + 2)), means))
    return Plot("frames", "Held-out PSNR by frame", "frame", "PSNR (dB)", series, "One line an arm.")


OURS, NO_GATES, FREE, PACKED, NONE = "QUEEN", "no gates", "everything trained", "each frame packed", "frame 1"
ARMS = {
    OURS: Arm(Queen()),
    NO_GATES: Arm(Queen(gated=False)),
    FREE: Arm("free"),
    PACKED: Arm("packed"),
    NONE: Arm("none"),
}
PSNR = Value("psnr", 1.0, 2, "dB", 2)
SIZE = Value("bytes", 1.0, 0, "(log of the ratio)", 2, lower=True, log=True)
CLOSED = Value("closed", 100.0, 1, "points", 1)
STUDY = Study(
    "queen",
    "QUEEN: frames of a moving scene as gated, rounded residuals",
    "Sharath Girish et al.: QUEEN: QUantized Efficient ENcoding of Dynamic Gaussians for Streaming "
    "Free-viewpoint Videos, NeurIPS 2024",
    QueenOptions,
    ARMS,
    cases,
    measure,
    papers=(11,),
    claims=[
        Claim(
            "more than 80 % of the gates of what stands still are closed", BAR, OURS, bar=80.0, value=CLOSED
        ),
        Claim(
            "a frame takes less than a fifth of the bytes of all its numbers",
            "0.7 MB a frame",
            OURS,
            FREE,
            bar=1.609,
            value=SIZE,
        ),
        Claim("the pictures are less than 0.3 dB behind training everything", BAR, OURS, FREE, bar=-0.3),
        Claim("a frame is smaller than the packed scene", BAR, OURS, PACKED, value=SIZE),
        Claim("gates make a frame smaller", "the sparser the smaller", OURS, NO_GATES, value=SIZE),
        Claim("control: the frames are better than frame 1 shown again", "yes", OURS, NONE),
    ],
    value=PSNR,
    tables=[
        Grid("Held-out PSNR (dB), mean over the later frames"),
        Grid("Bytes of a later frame", value=SIZE),
        Grid("Closed gates of what stands still (%)", value=CLOSED),
    ],
    plots=[_plot],
    notes=lambda options: [
        f"A ball moves {float(STEP.norm()):.3f} a frame through three that stand still over a disc; "
        f"{options.gaussians} Gaussians, 12 training and 4 held-out cameras of {options.size} pixels. No "
        "multi-camera video of the real world could be had.",
        "The file of every frame was decoded and gave the trained scene bit for bit (`exact` in the rows).",
        f"All numbers of a Gaussian are {BYTES} bytes; the packed scene is that of zoo/neural3d/packed.py.",
    ],
)
