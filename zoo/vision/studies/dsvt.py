"""`zoo reproduce dsvt`: rotated sets against fixed windows, dense pillars and sparse convolution.

The detectors have one voxel encoder, one 2D backbone design, one head and equal parameters; all see the same
pillars of 0.8 m (the sparse convolutions the same cells cut in eight along z), and what an encoder does not
spend, the 2D backbone gets. They are compared after the same epochs, and after the same training time: the
faster ones then train for more epochs, by the ratio of the times of their steps, measured in turn in one
process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from zoo.names import check_known
from zoo.shared.train import Checkpoint, Fit, resume
from zoo.studies.cells import CellCache
from zoo.studies.digests import code_digest
from zoo.studies.figures import Columns, mean_of
from zoo.studies.options import StudyOptions
from zoo.studies.study import Arm, Claim, Study
from zoo.studies.view import Row, Value
from zoo.vision.lidar.data import Frame, scene_frames
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.scenes import CLASSES
from zoo.vision.lidar.tasks import detections, scores, truth_of
from zoo.vision.lidar.train import detector_job, detector_recipe

SPEED_FRAMES, SPEED_ROUNDS = 32, 5
EPOCHS, TIME, STEP = "the same epochs", "the same training time", "step time"
RANGE = [-12.8, -12.8, -3.0, 12.8, 12.8, 1.0]
PILLAR, VOXEL = [0.8, 0.8, 4.0], [0.8, 0.8, 0.5]
WIDTH = 32
# The classes' thresholds of NMS and weights of the IoU branch.
HEAD = {
    "classes": list(CLASSES),
    "channels": 16,
    "rectify": [0.5, 0.5, 0.5],
    "nms": [0.2, 0.2, 0.2],
    "most": 200,
    "kept": 100,
}
_SETS: dict[str, Any] = {
    "window_shape": [[12, 12, 1]],
    "set_info": [[36, 2]],
    "d_model": [WIDTH],
    "nhead": [2],
    "dim_feedforward": [2 * WIDTH],
    "hybrid_factor": [2, 2, 1],
    "shifts_list": [[[0, 0, 0], [6, 6, 0]]],
}
_STILL = {**_SETS, "hybrid_factor": [1, 1, 1], "shifts_list": [[[0, 0, 0], [0, 0, 0]]], "rotate": False}
_CONV: dict[str, Any] = {"widths": [12, 16, 20, 24], "layers": 1}


def _bev(*widths: int) -> dict[str, Any]:
    return {
        "layer_nums": [1, 1, 1],
        "layer_strides": [1, 2, 2],
        "num_filters": list(widths),
        "upsample_strides": [1, 2, 4],
        "num_upsample_filters": [16, 16, 16],
    }


def _arm(
    encoder: str, voxel: list[float], vfe: int, backbone: dict[str, Any], bev: dict[str, Any]
) -> dict[str, Any]:
    return {
        "point_cloud_range": RANGE,
        "voxel_size": voxel,
        "encoder": encoder,
        "vfe": [16, vfe],
        "backbone": backbone,
        "bev": bev,
        "head": HEAD,
    }


DETECTORS: dict[str, dict[str, Any]] = {
    "dsvt": _arm("dsvt", PILLAR, WIDTH, _SETS, _bev(16, 24, 32)),
    "no rotation, no shift": _arm("dsvt", PILLAR, WIDTH, _STILL, _bev(16, 24, 32)),
    "dense pillars": _arm("pillars", PILLAR, WIDTH, {}, _bev(24, 28, 40)),
    "sparse convolution": _arm("sparse-conv", VOXEL, 12, _CONV, _bev(16, 24, 32)),
}


def make_arm(name: str, seed: int) -> Detector:
    """The detector of an arm with the fresh weights of a seed, whatever was drawn before.

    Raises:
        ConfigError: an unknown arm.
    """
    check_known("arm", [name], DETECTORS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detector(**DETECTORS[name])


@dataclass(frozen=True)
class DSVTOptions(StudyOptions):
    """Options of the study.

    Args:
        arms: which; by default all. The first one sets the training time.
        scenes: training scenes.
        test_scenes: test scenes.
        epochs: passes over them.
        batch: scenes per step.
        lr: peak learning rate.
        device: where to train.
    """

    arms: tuple[str, ...] = tuple(DETECTORS)
    scenes: int = 240
    test_scenes: int = 100
    epochs: int = 6
    batch: int = 4
    lr: float = 2e-3
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("arm", self.arms, DETECTORS)

    def fit(self, arm: str, frames: Sequence[Frame], epochs: int, seed: int = 0) -> Fit:
        """An arm's training from fresh weights."""
        job = detector_job(frames, detector_recipe(epochs, self.batch, self.lr), seed, self.device)
        return job.fit(make_arm(arm, seed), macs=lambda: 0.0)

    def key(self, code: Any, **rest: Any) -> Row:
        """A cell's key. The device is no part of it: it changes no more than the order of sums."""
        own = {"scenes": self.scenes, "test": self.test_scenes, "batch": self.batch, "lr": self.lr}
        return {"study": "dsvt", **own, "code": code_digest(code), **rest}


def step_times(options: DSVTOptions, cells: CellCache) -> dict[str, float]:
    """Seconds of a training step of each arm: medians over rounds in which each has its turn."""
    device = torch.device(options.device).type
    key = options.key(step_times, cell=STEP, arms=list(options.arms), device=device)

    def compute() -> dict[str, float]:
        frames = scene_frames("train", SPEED_FRAMES)
        fits = {arm: options.fit(arm, frames, SPEED_ROUNDS + 1) for arm in options.arms}
        times: dict[str, list[float]] = {arm: [] for arm in options.arms}
        for round_ in range(SPEED_ROUNDS + 1):
            for arm, fit in fits.items():
                before = fit.cost.seconds
                fit.run(until=round_ + 1)
                times[arm].append((fit.cost.seconds - before) / len(fit.batches))
        return {arm: statistics.median(own[1:]) for arm, own in times.items()}

    return dict(cells.cell(key, compute))


def trained_cell(options: DSVTOptions, arm: str, seed: int, epochs: int, cells: CellCache) -> Row:
    """What an arm trained for so many epochs finds in the test scenes."""
    key = options.key(trained_cell, cell="trained", arm=arm, seed=seed, epochs=epochs)

    def compute() -> Row:
        torch.set_num_threads(1)
        frames = scene_frames("train", options.scenes)
        fit = options.fit(arm, frames, epochs, seed)
        checkpoint = Checkpoint(cells.path(key).with_suffix(".state"), key)
        start = time.perf_counter()
        resume(fit, checkpoint, every_epochs=1, seconds=20.0)
        model = fit.model
        test = scene_frames("test", options.test_scenes)
        found = scores(detections(cast(Detector, model), test), [truth_of(frame) for frame in test])
        checkpoint.remove()
        return {
            "epochs": epochs,
            "seconds": fit.cost.seconds,
            "wall": time.perf_counter() - start,
            "loss": fit.last_loss,
            "parameters": sum(p.numel() for p in model.parameters()),
            **{name: measure.value for name, measure in found.items()},
            **{f"{name} stderr": m.stderr for name, m in found.items() if m.stderr is not None},
        }

    return dict(cells.cell(key, compute))


def equal_time_epochs(options: DSVTOptions, times: dict[str, float]) -> dict[str, int]:
    """Epochs of each arm that take as long as those of the first."""
    first = times[options.arms[0]]
    return {arm: max(1, round(options.epochs * first / times[arm])) for arm in options.arms}


def measure(make: Any, options: DSVTOptions, case: Row, cells: CellCache) -> Row | list[Row]:
    """An arm's detections after its epochs, or the times of all arms' steps."""
    if case["level"] == STEP:
        times = step_times(options, cells)
        return [{"arm": arm, STEP: seconds} for arm, seconds in times.items()]
    epochs = options.epochs
    if case["level"] == TIME:
        epochs = equal_time_epochs(options, step_times(options, cells))[case["arm"]]
    return trained_cell(options, case["arm"], case["seed"], epochs, cells)


def cases(options: DSVTOptions) -> Iterator[Row]:
    """The times of the steps, then all arms of a seed before the next seed."""
    yield {"arm": "all", "level": STEP, "seed": 0}
    for level in (EPOCHS, TIME):
        for seed in range(options.seeds):
            yield from ({"arm": arm, "level": level, "seed": seed} for arm in options.arms)


def _precision(level: str) -> Columns:
    """Average precision in one of the comparisons."""
    columns = {text: Value(name, 1.0) for name, text in METRICS.items()}
    epochs, error = mean_of("epochs"), mean_of(f"{AP.name} stderr", "{:.1f}")
    note = "The error over scenes is that of the first column of AP."
    title = f"Average precision after {level}"
    return Columns(title, {"epochs": epochs, **columns, "error over scenes": error}, note, levels=[level])


AP = Value("bev_ap_loose", 1.0, 1, "AP")
METRICS = {
    "bev_ap_loose": "BEV, IoU 0.5 / 0.25 / 0.25",
    "ap_3d_loose": "3D, IoU 0.5 / 0.25 / 0.25",
    "bev_ap": "BEV, IoU 0.7 / 0.5 / 0.5",
    "ap_3d": "3D, IoU 0.7 / 0.5 / 0.5",
}
_AHEAD = {
    "no rotation, no shift": "rotated, shifted sets are ahead of fixed ones; figures were not at hand",
    "dense pillars": "ahead; Waymo L2 73.2 mAP for DSVT on pillars, the baselines' figures were not at hand",
    "sparse convolution": "ahead, at a latency fit for real time; the baselines' figures were not at hand",
}
STUDY = Study(
    "dsvt",
    "DSVT: rotated sets against dense pillars and sparse convolution",
    "Haiyang Wang, Chen Shi, Shaoshuai Shi, Meng Lei, Sen Wang, Di He, Bernt Schiele, Liwei Wang: DSVT: "
    "Dynamic Sparse Voxel Transformer with Rotated Sets, CVPR 2023",
    DSVTOptions,
    {arm: Arm(fields) for arm, fields in DETECTORS.items()},
    cases,
    measure,
    papers=(59,),
    claims=[
        Claim(f"DSVT is ahead of {other} after {{level}}", published, "dsvt", other, at=(level,))
        for level in (EPOCHS, TIME)
        for other, published in _AHEAD.items()
    ],
    value=AP,
    varies=("arms", "seeds", "device"),
    data=lambda options, where: "scenes cast by seed",
    tables=[
        _precision(EPOCHS),
        _precision(TIME),
        Columns(
            "BEV AP by class at IoU 0.5 / 0.25 / 0.25, same epochs",
            {name.lower(): Value(f"{AP.name}/{name.lower()}", 1.0) for name in CLASSES},
            levels=[EPOCHS],
        ),
        Columns(
            "Size and time",
            {
                "parameters": mean_of("parameters", "{:.0f}"),
                "ms per step": lambda view, arm, _: mean_of(STEP, "{:.0f}", 1e3)(view, arm, STEP),
                "seconds of training": Value("seconds", 1.0, 0),
            },
            "Processor time of one thread, or on a GPU the time of the wall.",
            levels=[EPOCHS],
        ),
    ],
    notes=lambda options: [
        f"{options.scenes} training and {options.test_scenes} test scenes of 25.6 x 25.6 m, 24 beams, "
        f"{options.epochs} epochs, batch {options.batch}, {options.seeds} seeds (of the weights, the order "
        f"and the augmentation; the scenes are the same). Pillars of 0.8 m; for the sparse convolutions cut "
        "in eight along z.",
        "AP is the mean over cars, pedestrians and cyclists in percent, 40 points of recall; objects with "
        "fewer than five echoes are ignored. ± is the sample standard deviation over seeds; the standard "
        "error of one model over scenes (jackknife) stands in its own column.",
        "Equal time gives each arm as many epochs as take as long as those of the first, by the step times "
        "in the table, measured in turn in one process.",
        "The published numbers are of far larger models on real data, trained to convergence; here only the "
        "order of the arms after a short training is asked for. On a 32 x 32 grid with windows of 12 a "
        "rotation of the sets cannot matter much, and single-stage pillars leave attention pooling unused.",
        "No arm was tuned: all have one recipe.",
    ],
)
