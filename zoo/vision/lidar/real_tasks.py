"""Detection on KITTI's frames by its official figures, and on frames of your own, as harness tasks."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import TaskError
from zoo.harness.tasks import Measure, Progress, TaskResult, register_task
from zoo.shared.store.identity import data_digest
from zoo.vision.lidar.data import KITTI_TEST, Frame, real_frame
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.frames import own_frames
from zoo.vision.lidar.kitti import DIFFICULTIES, Labelled, image_heights, kitti_ap
from zoo.vision.lidar.scenes import CLASSES
from zoo.vision.lidar.tasks import STRICT, Scenes, detections, scores, truth_of

KITTI_FOLDER = "lidar-kitti-mini"


def in_range(model: Detector, boxes: Tensor) -> np.ndarray:
    """Whether the middle of each box lies in a detector's range."""
    lower, upper = (torch.tensor(bound[:2]) for bound in (model.grid.lower, model.grid.upper))
    return ((boxes[:, :2] >= lower) & (boxes[:, :2] < upper)).all(1).numpy()


def checked_detector(model: nn.Module, task: str) -> Detector:
    """The model as a detector of the classes of the scenes.

    Raises:
        TaskError: it is none.
    """
    if not isinstance(model, Detector) or model.classes != CLASSES:
        raise TaskError(f"{task} takes detectors of {', '.join(CLASSES)}; received a {type(model).__name__}")
    return model


@register_task
class Kitti(Scenes):
    """KITTI's AP of cars, pedestrians and cyclists over the 4 of 13 frames that no job trains on.

    `3d_ap/car/moderate` is the official figure of that class and difficulty at 40 points of recall, `..._r11`
    at 11; `moderate_3d_ap` and its like are means over the classes that have boxes. Four frames say little.
    """

    name = "vision/kitti"
    primary = "moderate_bev_ap"

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Raises:
        TaskError: no detector, or one of other classes.
        DataError: the frames are not at hand.
        """
        detector = checked_detector(model, self.name)
        frames = [real_frame(KITTI_FOLDER, name) for name in KITTI_TEST]
        found = detections(detector, frames, progress)
        truths, heights = [], []
        for name, frame, one in zip(KITTI_TEST, frames, found, strict=True):
            truth, low = _labelled(name, frame, one.boxes, detector)
            truths.append(truth)
            heights.append(low)
        measures: dict[str, Measure] = {}
        for level, limits in DIFFICULTIES.items():
            for recalls, suffix in ((40, ""), (11, "_r11")):
                values = kitti_ap(found, truths, CLASSES, STRICT, limits, heights, recalls)
                for place, kind in enumerate(("bev_ap", "3d_ap")):
                    known = {c: v[place] for c, v in values.items() if not math.isnan(v[place])}
                    mean = sum(known.values()) / len(known) if known else 0.0
                    measures[f"{level}_{kind}{suffix}"] = Measure(mean)
                    measures |= {f"{kind}/{c.lower()}/{level}{suffix}": Measure(v) for c, v in known.items()}
        return TaskResult(measures, {}, len(frames), data_digest(_kitti_path()))


@register_task
class OwnFrames(Scenes):
    """AP over the test frames of a folder of your own, `frames:FOLDER`, as of the generated scenes."""

    name = "frames"

    def __init__(self, folder: str) -> None:
        self.folder, self.name = folder, f"frames:{folder}"

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Raises:
        TaskError: no detector, or one of other classes.
        DataError: frames that cannot be read.
        """
        detector = checked_detector(model, self.name)
        frames: Sequence[Frame] = own_frames(self.folder, "test")
        found = detections(detector, frames, progress)
        truths = [truth_of(frame) for frame in frames]
        outside = [torch.from_numpy(~in_range(detector, truth.boxes)) for truth in truths]
        truths = [
            type(truth)(truth.boxes, truth.labels, truth.ignored | out)
            for truth, out in zip(truths, outside, strict=True)
        ]
        return TaskResult(scores(found, truths), {}, len(frames), data_digest(Path(self.folder)))


def _kitti_path() -> Path:
    return Path(os.environ["ZOO_DATA"]) / KITTI_FOLDER


def _labelled(name: str, frame: Frame, found: Tensor, model: Detector) -> tuple[Labelled, np.ndarray]:
    """What KITTI labels in a frame, and the heights of what was found there."""
    with np.load(_kitti_path() / f"{name}.npz", allow_pickle=False) as file:
        stored: dict[str, Any] = dict(file)
    image = stored["bbox2d"]
    truth = Labelled(
        frame.boxes,
        frame.names,
        image[:, 3] - image[:, 1],
        stored["occluded"],
        stored["truncated"],
        in_range(model, frame.boxes),
    )
    calibration = (torch.from_numpy(stored["P2"]), torch.from_numpy(stored["velo_to_rect"]))
    rows, columns = (int(size) for size in stored["image_hw"])
    return truth, image_heights(found, *calibration, (rows, columns))
