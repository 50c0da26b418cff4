"""Overlaps of rotated boxes, and non-maximum suppression, vectorised over pairs."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.vision.lidar.boxes import Boxes, check_boxes, corners_bev

_CHUNK = 100_000  # pairs at once: 24 points of 16 bytes each are 40 MB
# A corner counts as inside up to this share of the box's size, so that coinciding edges are not lost.
_SLACK = 1e-9


def intersection_bev(a: Float[Tensor, "pairs 7"], b: Float[Tensor, "pairs 7"]) -> Float[Tensor, " pairs"]:
    """Area shared by the footprints of each pair of boxes.

    The shared polygon is convex; its vertices are among the corners of one rectangle inside of the other and
    the crossings of their edges. Sorted by angle about their mean they give the area (shoelace formula).
    Computed in float64.
    """
    parts = [
        _intersection(x.double(), y.double()) for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True)
    ]
    return torch.cat(parts).to(a.dtype) if parts else a.new_zeros(0)


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    # Relative to the middle of the pair, so that large coordinates cost no digits.
    middle = torch.nn.functional.pad((a[:, :2] + b[:, :2]) / 2, (0, 5))
    a, b = a - middle, b - middle
    first, second = corners_bev(a), corners_bev(b)
    crossing, crosses = _crossings(first, second)
    points = torch.cat([first, second, crossing], 1)
    valid = torch.cat([_inside(first, b), _inside(second, a), crosses], 1)
    count = valid.sum(1)
    weight = valid.to(points.dtype)[..., None]
    centre = (points * weight).sum(1, keepdim=True) / count.clamp(min=1)[:, None, None]
    offset = (points - centre) * weight
    angle = torch.atan2(offset[..., 1], offset[..., 0]).masked_fill(~valid, math.inf)
    order = angle.argsort(1)
    # Places beyond the last vertex repeat the first one, which adds nothing to the area.
    last = torch.arange(points.shape[1], device=a.device) < count[:, None]
    order = torch.where(last, order, order[:, :1])
    x, y = offset.gather(1, order[..., None].expand(-1, -1, 2)).unbind(2)
    area = (x * y.roll(-1, 1) - x.roll(-1, 1) * y).sum(1) / 2
    return torch.where(count >= 3, area.clamp(min=0), torch.zeros_like(area))


def _inside(points: Tensor, box: Tensor) -> Tensor:
    offset = points - box[:, None, :2]
    cos, sin = box[:, 6].cos()[:, None], box[:, 6].sin()[:, None]
    x, y = offset.unbind(2)
    half = box[:, None, 3:5] / 2
    slack = _SLACK * half.amax(2)
    along, across = (x * cos + y * sin).abs(), (y * cos - x * sin).abs()
    return (along <= half[..., 0] + slack) & (across <= half[..., 1] + slack)


def _crossings(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Where the 4 x 4 edges of two rectangles cross: [pairs, 16, 2], and whether they do."""
    p, q = first[:, :, None], second[:, None]
    r, s = (first.roll(-1, 1) - first)[:, :, None], (second.roll(-1, 1) - second)[:, None]
    denominator = r[..., 0] * s[..., 1] - r[..., 1] * s[..., 0]
    parallel = denominator.abs() <= 1e-12 * r.norm(dim=-1) * s.norm(dim=-1)
    safe = torch.where(parallel, torch.ones_like(denominator), denominator)
    gap = q - p
    t = (gap[..., 0] * s[..., 1] - gap[..., 1] * s[..., 0]) / safe
    u = (gap[..., 0] * r[..., 1] - gap[..., 1] * r[..., 0]) / safe
    crosses = ~parallel & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    return (p + t[..., None] * r).flatten(1, 2), crosses.flatten(1)


def paired_iou(
    a: Float[Tensor, "pairs 7"], b: Float[Tensor, "pairs 7"]
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Intersection over union of each pair: of the footprints, and in 3D."""
    shared = intersection_bev(a, b)
    areas = [box[:, 3] * box[:, 4] for box in (a, b)]
    bev = shared / (areas[0] + areas[1] - shared)
    top = torch.minimum(a[:, 2] + a[:, 5] / 2, b[:, 2] + b[:, 5] / 2)
    bottom = torch.maximum(a[:, 2] - a[:, 5] / 2, b[:, 2] - b[:, 5] / 2)
    both = shared * (top - bottom).clamp(min=0)
    volumes = areas[0] * a[:, 5] + areas[1] * b[:, 5]
    return bev, both / (volumes - both)


def box_iou(a: Boxes, b: Float[Tensor, "others 7"]) -> tuple[Tensor, Tensor]:
    """All pairs: IoU of the footprints and in 3D, each [boxes, others].

    Only pairs whose circumscribed circles meet are computed.

    Raises:
        DataError: boxes without size.
    """
    check_boxes(a)
    check_boxes(b)
    i, j = _near(a, b)
    found = paired_iou(a[i], b[j])
    bev, whole = (a.new_zeros(len(a), len(b)).index_put((i, j), values) for values in found)
    return bev, whole


def _near(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    reach = [box[:, 3:5].norm(dim=1) / 2 for box in (a, b)]
    distance = (a[:, None, :2] - b[None, :, :2]).norm(dim=2)
    i, j = (distance <= reach[0][:, None] + reach[1][None]).nonzero(as_tuple=True)
    return i, j


def rotated_nms(
    boxes: Boxes, scores: Float[Tensor, " boxes"], threshold: float, most: int | None = None
) -> Int64[Tensor, " kept"]:
    """Non-maximum suppression by the IoU of footprints: rows that are kept, best first.

    A box is dropped if it overlaps a kept one of a higher score by more than the threshold; of equal scores
    the earlier row counts as higher.

    Args:
        boxes: of one class.
        scores: theirs.
        threshold: above which boxes are the same object, in [0, 1].
        most: how many to keep; by default all.

    Raises:
        DataError: boxes without size, or not one finite score per box.
        ConfigError: a threshold out of range.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"the threshold of NMS lies between 0 and 1; received {threshold}")
    if scores.shape != boxes.shape[:1] or not bool(scores.isfinite().all()):
        raise DataError(f"{len(boxes)} boxes need as many finite scores; received {list(scores.shape)}")
    check_boxes(boxes)
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order]
    i, j = _near(ranked, ranked)
    i, j = i[i < j], j[i < j]
    bev, _ = paired_iou(ranked[i], ranked[j])
    over = bev > threshold
    i, j = i[over], j[over]
    # Rounds of the greedy rule: each settles at least the first box that is still open, so few are needed.
    keep = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    while True:
        beaten = torch.zeros_like(keep).index_fill(0, j[keep[i]], True)
        if torch.equal(keep, ~beaten):
            return order[keep][:most]
        keep = ~beaten
