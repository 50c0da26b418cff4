"""Detection on generated scenes, as a harness task."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import nn

from zoo.errors import TaskError
from zoo.harness.tasks import Flops, Measure, Progress, Task, TaskResult, register_task
from zoo.shared.measure.account import count
from zoo.shared.measure.modes import eval_mode
from zoo.vision.lidar.average_precision import (
    Detections,
    Matches,
    Truth,
    average_precision,
    match,
    with_error,
)
from zoo.vision.lidar.data import LEAST_POINTS, Frame, FrameBatches, scene_frames
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.scenes import CLASSES

# KITTI's thresholds of IoU for cars, pedestrians and cyclists; the loose ones are those of its second table.
STRICT, LOOSE = (0.7, 0.5, 0.5), (0.5, 0.25, 0.25)
BATCH = 8


def truth_of(frame: Frame) -> Truth:
    """A frame's boxes; those with fewer than five echoes are ignored."""
    known = frame.labels > 0
    return Truth(frame.boxes[known], frame.labels[known], frame.hits[known] < LEAST_POINTS)


def detections(
    model: Detector, frames: Sequence[Frame], progress: Progress | None = None
) -> list[Detections]:
    """What a detector, put in eval mode for it, finds in each frame, on the CPU."""
    device = next(model.parameters()).device
    found: list[Detections] = []
    with torch.no_grad(), eval_mode(model):
        for start in range(0, len(frames), BATCH):
            part = frames[start : start + BATCH]
            batch = FrameBatches(part, len(part), device).take(range(len(part)))
            found += [
                Detections(one.boxes.cpu(), one.scores.cpu(), one.labels.cpu())
                for one in model.detect(batch.points, len(part))
            ]
            if progress is not None:
                progress(len(found), len(frames), "frames")
    return found


def scores(
    found: Sequence[Detections], truths: Sequence[Truth], classes: Sequence[str] = CLASSES
) -> dict[str, Measure]:
    """AP in percent with its jackknife error over frames: `bev_ap` and `ap_3d` are means over the classes at
    KITTI's thresholds, `..._loose` those at the loose ones, and each class stands by itself, too."""
    measures: dict[str, Measure] = {}
    for suffix, thresholds in (("", STRICT), ("_loose", LOOSE)):
        pairs = [
            [match(d, t, label, thresholds[label - 1]) for d, t in zip(found, truths, strict=True)]
            for label in range(1, len(classes) + 1)
        ]
        for index, name in enumerate(("bev_ap", "ap_3d")):
            by_class: list[list[Matches]] = [[pair[index] for pair in one] for one in pairs]
            measures[name + suffix] = Measure(*with_error(by_class))
            for one, label in zip(by_class, classes, strict=True):
                value = average_precision(one)
                if not np.isnan(value):
                    measures[f"{name}{suffix}/{label.lower()}"] = Measure(value)
    return measures


@register_task
class Scenes(Task):
    """AP over 200 generated scenes that no training sees."""

    name = "vision/lidar-scenes"
    domain = "vision"
    primary = "bev_ap_loose"
    unit = "%"
    frames: ClassVar[int] = 200

    def accepts(self, card: Any) -> bool:
        """Detectors with the classes of the scenes."""
        return card.domain == self.domain and card.architecture.name == "vision/lidar-detector"

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Raises:
        TaskError: no detector, or one of other classes.
        """
        if not isinstance(model, Detector) or model.classes != CLASSES:
            raise TaskError(
                f"{self.name} takes detectors of {', '.join(CLASSES)}; received a {type(model).__name__}"
                + (f" of {', '.join(model.classes)}" if isinstance(model, Detector) else "")
            )
        frames = scene_frames("test", self.frames)
        measures = scores(detections(model, frames, progress), [truth_of(frame) for frame in frames])
        digest = hashlib.sha256(b"".join(frame.points.numpy().tobytes() for frame in frames)).hexdigest()[:16]
        return TaskResult(measures, {}, len(frames), digest)

    def flops(self, model: nn.Module) -> Flops:
        """Operations for the first test scene. The dense count is that of the same detector: nothing is
        masked, voxels that are not there are not computed in either."""
        detector = cast(Detector, model)
        batch = FrameBatches(scene_frames("test", 1), 1).take([0])
        total = count(detector, ({"points": batch.points, "batch_size": 1},)).total
        return Flops(total.flops, total.flops_kept)
