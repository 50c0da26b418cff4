"""Average precision of detected boxes, KITTI's way: greedy matches by score, 40 points of recall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from zoo.vision.lidar.iou import box_iou

RECALLS = 40


@dataclass(frozen=True, eq=False)
class Detections:
    """The boxes found in one frame: (x, y, z, dx, dy, dz, yaw), a score and a class for each."""

    boxes: Float[Tensor, "found 7"]
    scores: Float[Tensor, " found"]
    labels: Int64[Tensor, " found"]


@dataclass(frozen=True, eq=False)
class Truth:
    """The boxes of one frame. Detections of `ignored` ones (too few points) are neither right nor wrong."""

    boxes: Float[Tensor, "boxes 7"]
    labels: Int64[Tensor, " boxes"]
    ignored: Bool[Tensor, " boxes"]


@dataclass(frozen=True, eq=False)
class Matches:
    """What became of the detections of one class in one frame.

    Attributes:
        scores: of the detections that count, highest first.
        right: whether each met a box that no better detection had met.
        truths: boxes that count.
    """

    scores: np.ndarray
    right: np.ndarray
    truths: int


def match(found: Detections, truth: Truth, label: int, threshold: float) -> tuple[Matches, Matches]:
    """Match the detections of a class, best first, each to the free box that it overlaps most.

    Returns:
        By the IoU of footprints, and by the IoU in 3D.
    """
    mine, theirs = found.labels == label, truth.labels == label
    scores, order = found.scores[mine].sort(descending=True, stable=True)
    boxes, ignored = truth.boxes[theirs], truth.ignored[theirs].numpy()
    both = box_iou(found.boxes[mine][order].double(), boxes.double())
    bev, whole = (_greedy(scores.double().numpy(), overlap.numpy(), ignored, threshold) for overlap in both)
    return bev, whole


def _greedy(scores: np.ndarray, overlap: np.ndarray, ignored: np.ndarray, threshold: float) -> Matches:
    free = np.ones(len(ignored), dtype=bool)
    right, counts = np.zeros(len(scores), dtype=bool), np.ones(len(scores), dtype=bool)
    for row in range(len(scores)):
        for target in (free & ~ignored, free & ignored):  # a box that counts goes first
            reached = np.where(target, overlap[row], 0.0)
            if reached.size and reached.max() >= threshold:
                best = int(reached.argmax())
                free[best] = False
                right[row], counts[row] = not ignored[best], not ignored[best]
                break
    return Matches(scores[counts], right[counts], int((~ignored).sum()))


def average_precision(matches: Sequence[Matches]) -> float:
    """Mean over recall 1/40, 2/40, ..., 1 of the best precision at that recall or above, in percent.

    NaN where there is no box at all.
    """
    truths = sum(one.truths for one in matches)
    if not truths:
        return math.nan
    scores = np.concatenate([one.scores for one in matches])
    right = np.concatenate([one.right for one in matches])
    order = np.argsort(-scores, kind="stable")
    # Detections of one score stand or fall together.
    last = np.append(np.diff(scores[order]) != 0, True) if len(order) else np.zeros(0, dtype=bool)
    hits = np.cumsum(right[order])[last]
    precision = hits / (np.flatnonzero(last) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    needed = np.ceil(np.arange(1, RECALLS + 1) * truths / RECALLS - 1e-9)
    place = np.searchsorted(hits, needed)
    reached = place < len(hits)
    return (
        float(100 * np.where(reached, best[np.minimum(place, len(hits) - 1)], 0).mean()) if len(hits) else 0.0
    )


def with_error(by_class: Sequence[Sequence[Matches]]) -> tuple[float, float]:
    """Mean AP over classes, and its standard error over frames by the jackknife: sqrt((n - 1) / n sum (a_i -
    mean)^2), where a_i leaves frame i out.

    Args:
        by_class: matches of each class and frame.
    """

    def mean(leave: int | None) -> float:
        values = [average_precision([m for frame, m in enumerate(one) if frame != leave]) for one in by_class]
        known = [value for value in values if not math.isnan(value)]
        return sum(known) / len(known) if known else 0.0

    frames = len(by_class[0])
    if frames < 2:
        return mean(None), 0.0
    left_out = np.array([mean(frame) for frame in range(frames)])
    error = math.sqrt((frames - 1) / frames * float(((left_out - left_out.mean()) ** 2).sum()))
    return mean(None), error
