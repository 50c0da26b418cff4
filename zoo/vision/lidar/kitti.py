"""KITTI's official average precision of boxes: three difficulties, 40 or 11 points of recall.

As the development kit and its Python form compute it (Geiger et al., CVPR 2012; 40 points since Simonelli et
al., ICCV 2019). A box counts at a difficulty if it is high enough in the image and neither too occluded
nor too
truncated; the other boxes of the class, vans for cars, sitting persons for pedestrians, and boxes out of the
detector's range are neither right nor wrong. A detection lower in the image than a difficulty's least
height is
not wrong, either. Up to 41 scores are the thresholds at which precision is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from zoo.vision.lidar.average_precision import Detections
from zoo.vision.lidar.boxes import corners_bev
from zoo.vision.lidar.iou import box_iou

COUNTS, IGNORED, OTHER = 0, 1, -1  # states of a box
POINTS = 41
NEIGHBOURS = {"Car": "van", "Pedestrian": "person_sitting"}


class Difficulty(NamedTuple):
    """What a box may be at most: least pixels of height, occlusion (0 to 3) and truncation (0 to 1)."""

    height: float
    occlusion: int
    truncation: float


DIFFICULTIES = {
    "easy": Difficulty(40, 0, 0.15),
    "moderate": Difficulty(25, 1, 0.3),
    "hard": Difficulty(25, 2, 0.5),
}


@dataclass(frozen=True, eq=False)
class Labelled:
    """The labelled boxes of one frame.

    Attributes:
        boxes: in the frame of the points.
        names: KITTI's own, Van and DontCare among them.
        heights: in the image, in pixels.
        occlusion, truncation: as KITTI labels them.
        within: whether each lies in the detector's range; all by default.
    """

    boxes: Float[Tensor, "boxes 7"]
    names: tuple[str, ...]
    heights: np.ndarray
    occlusion: np.ndarray
    truncation: np.ndarray
    within: np.ndarray | None = None

    def states(self, name: str, level: Difficulty) -> np.ndarray:
        """Whether each box counts, is ignored, or is of another class."""
        names = np.array([one.lower() for one in self.names], dtype=object)
        mine = names == name.lower()
        hard = (
            (self.heights <= level.height)
            | (self.occlusion > level.occlusion)
            | (self.truncation > level.truncation)
        )
        hard |= ~self.within if self.within is not None else False
        near = names == NEIGHBOURS.get(name, "")
        return np.where(mine & ~hard, COUNTS, np.where(mine | near, IGNORED, OTHER))


def states_of_found(
    found: Detections, label: int, heights: np.ndarray | None, level: Difficulty
) -> np.ndarray:
    """Whether each detection counts; the low ones are ignored, of whatever class they are, as officially."""
    states = np.where(found.labels.numpy() == label, COUNTS, OTHER)
    return states if heights is None else np.where(heights < level.height, IGNORED, states)


def kitti_ap(
    found: Sequence[Detections],
    truths: Sequence[Labelled],
    classes: Sequence[str],
    thresholds: Sequence[float],
    level: Difficulty,
    heights: Sequence[np.ndarray] | None = None,
    recalls: int = 40,
) -> dict[str, tuple[float, float]]:
    """AP in percent by class: of footprints, and in 3D; NaN where no box counts.

    Args:
        found: of each frame.
        truths: of each frame.
        classes: label 1 is the first.
        thresholds: of IoU, by class.
        level: see `DIFFICULTIES`.
        heights: of the detections in the image, see `image_heights`; None counts them all.
        recalls: 40 or 11 points.
    """
    overlaps = [box_iou(f.boxes.double(), t.boxes.double()) for f, t in zip(found, truths, strict=True)]
    result = {}
    for label, (name, least) in enumerate(zip(classes, thresholds, strict=True), 1):
        frames = []
        for index, (one, truth) in enumerate(zip(found, truths, strict=True)):
            low = None if heights is None else heights[index]
            frames.append(
                (
                    one.scores.double().numpy(),
                    truth.states(name, level),
                    states_of_found(one, label, low, level),
                    index,
                )
            )
        values = []
        for kind in (0, 1):
            cases = [(overlaps[i][kind].numpy(), s, t, f) for s, t, f, i in frames]
            values.append(average_precision(cases, least, recalls))
        result[name] = (values[0], values[1])
    return result


Case = tuple[
    np.ndarray, np.ndarray, np.ndarray, np.ndarray
]  # overlaps [found, boxes], scores, states of both


def average_precision(cases: Sequence[Case], least: float, recalls: int = 40) -> float:
    """AP in percent of the frames of one class; NaN where no box counts."""
    total = sum(int((truth == COUNTS).sum()) for _, _, truth, _ in cases)
    if not total:
        return math.nan
    hits = [score for case in cases for score in _matched(*case, least, None)[2]]
    precision = np.zeros(POINTS)
    for place, threshold in enumerate(recall_thresholds(hits, total)):
        counts = np.array([_matched(*case, least, threshold)[:2] for case in cases]).sum(0)
        precision[place] = counts[0] / counts.sum() if counts.sum() else 0.0
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(100 * (best[1:].mean() if recalls == 40 else best[::4].mean()))


def recall_thresholds(hits: Sequence[float], total: int) -> list[float]:
    """The scores at which recall comes nearest to 0, 1/40, 2/40, ...

    Args:
        hits: scores of the right detections.
        total: boxes that count.
    """
    scores, chosen, recall = sorted(hits, reverse=True), [], 0.0
    for place, score in enumerate(scores):
        last = place == len(scores) - 1
        here, after = (place + 1) / total, (place + (1 if last else 2)) / total
        if after - recall < recall - here and not last:
            continue
        chosen.append(score)
        recall += 1 / (POINTS - 1)
    return chosen


def _matched(
    overlap: np.ndarray,
    scores: np.ndarray,
    truth: np.ndarray,
    found: np.ndarray,
    least: float,
    threshold: float | None,
) -> tuple[int, int, list[float]]:
    """Right and wrong detections above a threshold, and the scores of the right ones.

    Without a threshold each box takes the detection of the best score, otherwise that of the largest overlap,
    one that counts before one that is ignored: the official code's two passes.
    """
    free = found != OTHER
    if threshold is not None:
        free &= scores >= threshold
    right, hits = 0, list[float]()
    for box in np.flatnonzero(truth != OTHER):
        near = np.flatnonzero(free & (overlap[:, box] > least))
        if not len(near):
            continue
        if threshold is None:
            best = near[scores[near].argmax()]
        else:
            counting = near[found[near] == COUNTS]
            best = counting[overlap[counting, box].argmax()] if len(counting) else near[0]
        free[best] = False
        if truth[box] == COUNTS and found[best] == COUNTS:
            right += 1
            hits.append(float(scores[best]))
    wrong = int((free & (found == COUNTS)).sum())
    return right, wrong, hits


def image_heights(
    boxes: Float[Tensor, "boxes 7"],
    projection: Float[Tensor, "3 4"],
    velo_to_rect: Float[Tensor, "4 4"],
    image: tuple[int, int],
) -> np.ndarray:
    """Heights in pixels of boxes as the camera sees them, cut at the image's edges (`image`: rows,
    columns)."""
    if not len(boxes):
        return np.zeros(0)
    footprint = corners_bev(boxes.double())
    low, high = (boxes[:, 2] - boxes[:, 5] / 2).double(), (boxes[:, 2] + boxes[:, 5] / 2).double()
    corners = torch.cat(
        [torch.cat([footprint, z[:, None, None].expand(-1, 4, 1)], 2) for z in (low, high)], 1
    )
    ones = torch.ones_like(corners[..., :1])
    seen = torch.cat([corners, ones], 2) @ velo_to_rect.double().T @ projection.double().T
    rows = seen[..., 1] / seen[..., 2].clamp_min(1e-3)
    rows = rows.clamp(0, image[0] - 1)
    return (rows.amax(1) - rows.amin(1)).numpy()
