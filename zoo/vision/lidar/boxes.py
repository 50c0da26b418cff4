"""Boxes: one convention inside, the conventions of the data sets converted at the door.

Inside, a box is (x, y, z, dx, dy, dz, yaw) as in OpenPCDet: z is that of the geometric centre, dx is the
length along the heading, dy the width, dz the height, yaw counter-clockwise from +x, in radians, in the
frame of the points.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from zoo.errors import ConfigError, DataError

Boxes = Float[Tensor, "boxes 7"]


def check_boxes(boxes: Tensor, what: str = "boxes") -> None:
    """Refuse what is no set of boxes.

    Raises:
        DataError: a wrong shape, values that are not finite, or a box without size.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 7:
        raise DataError(
            f"{what} are rows of (x, y, z, dx, dy, dz, yaw); received the shape {list(boxes.shape)}"
        )
    bad = ~(boxes.isfinite().all(1) & (boxes[:, 3:6] > 0).all(1))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"{what}: row {row} has the dimensions {[round(v, 4) for v in boxes[row, 3:6].tolist()]} "
            f"({int(bad.sum())} boxes without size or not finite); remove them"
        )


def wrapped(angle: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """An angle in [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def corners_bev(boxes: Boxes) -> Float[Tensor, "boxes 4 2"]:
    """The corners of the footprints, counter-clockwise."""
    signs = boxes.new_tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]) / 2
    local = signs * boxes[:, None, 3:5]
    cos, sin = boxes[:, 6].cos()[:, None], boxes[:, 6].sin()[:, None]
    x, y = local.unbind(2)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], 2) + boxes[:, None, :2]


def points_in_boxes(xyz: Float[Tensor, "points 3"], boxes: Boxes) -> Bool[Tensor, "boxes points"]:
    """Which points lie in which box, its surface included."""
    offset = xyz[None] - boxes[:, None, :3]
    cos, sin = boxes[:, 6].cos()[:, None], boxes[:, 6].sin()[:, None]
    x, y, z = offset.unbind(2)
    local = torch.stack([x * cos + y * sin, y * cos - x * sin, z], 2)
    return (local.abs() <= boxes[:, None, 3:6] / 2).all(2)


def points_per_box(xyz: Float[Tensor, "points 3"], boxes: Boxes) -> Int64[Tensor, " boxes"]:
    """How many points lie in each box."""
    found = [points_in_boxes(xyz, part).sum(1) for part in boxes.split(32)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def from_kitti_camera(
    labels: Float[Tensor, "boxes 7"], velo_to_rect: Float[Tensor, "4 4"]
) -> Float[Tensor, "boxes 7"]:
    """KITTI's labels as boxes in the velodyne frame.

    Args:
        labels: (h, w, l, x, y, z, ry) as in KITTI's files: the bottom's centre in the rectified camera frame
            (x right, y down, z forward), ry about the camera's y axis.
        velo_to_rect: from the velodyne to that frame, homogeneous (R0_rect @ Tr_velo_to_cam).
    """
    h, w, length, x, y, z, ry = labels.unbind(1)
    bottom = torch.stack([x, y, z, torch.ones_like(x)], 1).to(velo_to_rect.dtype)
    place = torch.linalg.solve(velo_to_rect, bottom.T).T[:, :3].to(labels.dtype)
    place = place + torch.stack([torch.zeros_like(h), torch.zeros_like(h), h / 2], 1)
    return torch.cat([place, torch.stack([length, w, h, wrapped(-ry - math.pi / 2)], 1)], 1)


def to_kitti_camera(boxes: Boxes, velo_to_rect: Float[Tensor, "4 4"]) -> Float[Tensor, "boxes 7"]:
    """The inverse of `from_kitti_camera`."""
    x, y, z, length, w, h, yaw = boxes.unbind(1)
    bottom = torch.stack([x, y, z - h / 2, torch.ones_like(x)], 1).to(velo_to_rect.dtype)
    place = (velo_to_rect @ bottom.T).T[:, :3].to(boxes.dtype)
    sizes, ry = torch.stack([h, w, length], 1), wrapped(-yaw - math.pi / 2)
    return torch.cat([sizes, place, ry[:, None]], 1)


def from_quaternion(
    centre: Float[Tensor, "boxes 3"],
    size: Float[Tensor, "boxes 3"],
    rotation: Float[Tensor, "boxes 4"],
    order: str,
) -> Float[Tensor, "boxes 7"]:
    """Boxes with quaternions (w, x, y, z): nuScenes has sizes as (width, length, height), Argoverse 2 as
    (length, width, height). Both have geometric centres; the yaw is the heading of the rotated x axis.

    Raises:
        ConfigError: another order of sizes.
    """
    if order not in ("wlh", "lwh"):
        raise ConfigError(f"sizes come as 'wlh' (nuScenes) or 'lwh' (Argoverse 2); received {order!r}")
    w, x, y, z = rotation.unbind(1)
    yaw = torch.atan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z))
    sizes = size[:, [1, 0, 2]] if order == "wlh" else size
    return torch.cat([centre, sizes, wrapped(yaw)[:, None]], 1)


def from_sustech(labels: Float[Tensor, "boxes 9"]) -> Float[Tensor, "boxes 7"]:
    """SUSTechPOINTS: (position xyz, scale xyz, rotation xyz); scale x is along the heading, rotation z the
    yaw.
    Roll and pitch, a few degrees on slopes, are left out."""
    return torch.cat([labels[:, :6], wrapped(labels[:, 8:9])], 1)


def from_bottom_centre(boxes: Boxes) -> Boxes:
    """Boxes of mmdetection3d 1.x (`LiDARInstance3DBoxes`), whose z is that of the bottom."""
    return boxes + torch.nn.functional.pad(boxes[:, 5:6] / 2, (2, 4))


def to_bottom_centre(boxes: Boxes) -> Boxes:
    """The inverse of `from_bottom_centre`."""
    return boxes - torch.nn.functional.pad(boxes[:, 5:6] / 2, (2, 4))
