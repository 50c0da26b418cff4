"""Frames: generated scenes, the real frames below $ZOO_DATA, batches of both, and what training does to
them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from zoo.bundles.sources import Source
from zoo.errors import DataError, MissingDataError
from zoo.vision.lidar.boxes import wrapped
from zoo.vision.lidar.scenes import CLASSES, SceneConfig, make_scene

LEAST_POINTS = 5  # objects with fewer echoes are neither trained on nor counted
TRAIN_SEED, TEST_SEED = 0, 1_000_000  # of the first scene

SOURCE = Source("Generated LiDAR scenes of the zoo", "zoo.vision.lidar.scenes, seeded", "Apache-2.0")
KITTI = Source(
    "KITTI, 13 training frames", "PointRCNN, PointPillars and Open3D-ML demo data", "CC BY-NC-SA 3.0"
)
KITTI_FRAMES = (*(f"{number:06d}" for number in range(11)), "000134", "004139")
KITTI_TRAIN, KITTI_TEST = KITTI_FRAMES[:9], KITTI_FRAMES[9:]
# Names of classes in the data sets, as the classes of the scenes.
ALIASES = {
    "Car": ("car", "van", "regular_vehicle", "vehicle"),
    "Pedestrian": ("pedestrian", "person"),
    "Cyclist": ("cyclist", "rider", "bicycle", "bicyclist", "motorcycle", "motor"),
}


@dataclass(frozen=True, eq=False)
class Frame:
    """One sweep.

    Attributes:
        points: x, y, z in metres and reflectance in [0, 1].
        boxes: see `zoo.vision.lidar.boxes`.
        labels: from 1, in the order of the classes; 0 for classes that none of them names.
        hits: points in each box.
        names: the data set's own names of the classes.
    """

    points: Float[Tensor, "points 4"]
    boxes: Float[Tensor, "boxes 7"]
    labels: Int64[Tensor, " boxes"]
    hits: Int64[Tensor, " boxes"]
    names: tuple[str, ...] = ()


class Batch(NamedTuple):
    """Frames together: boxes (x, y, z, dx, dy, dz, yaw, label) padded with zeros, and points (frame, x, y, z,
    reflectance)."""

    gt_boxes: Tensor
    points: Tensor


@functools.lru_cache(maxsize=8)
def scene_frames(split: str, count: int, config: SceneConfig | None = None) -> tuple[Frame, ...]:
    """The first scenes of a split.

    Args:
        split: train or test.
        count: how many.
        config: of the scenes.

    Raises:
        DataError: an unknown split.
    """
    if split not in ("train", "test"):
        raise DataError(f"scenes come as 'train' or 'test'; received {split!r}")
    first = TRAIN_SEED if split == "train" else TEST_SEED
    frames = []
    for seed in range(first, first + count):
        points, boxes, labels, hits = map(torch.from_numpy, make_scene(seed, config))
        frames.append(Frame(points, boxes, labels, hits))
    return tuple(frames)


def real_frame(folder: str, name: str) -> Frame:
    """A real frame, e.g. ("lidar-kitti-mini", "000008").

    Raises:
        DataError: it is not below ZOO_DATA.
    """
    root = os.environ.get("ZOO_DATA")
    path = Path(root or "ZOO_DATA") / folder / f"{name}.npz"
    if not path.is_file():
        raise MissingDataError(f"there is no {path}; set ZOO_DATA to the folder of the data sets")
    with np.load(path, allow_pickle=False) as file:
        stored = dict(file)
    xyz = torch.from_numpy(stored["xyz_q"].astype(np.float64) * stored["quantum_m"]).float()
    raw = stored.get("intensity", np.zeros(len(xyz), dtype=np.uint8))
    points = torch.cat([xyz, torch.from_numpy(raw.astype(np.float32) / 255)[:, None]], 1)
    names = tuple(str(name) for name in stored.get("names", ()))
    boxes = torch.from_numpy(stored.get("boxes", np.zeros((0, 7), dtype=np.float32)))
    hits = torch.from_numpy(stored.get("num_points", np.zeros(0)).astype(np.int64))
    labels = torch.tensor([label_of(name) for name in names], dtype=torch.int64)
    return Frame(points, boxes, labels, hits, names)


def label_of(name: str) -> int:
    """The label of a data set's class name: nuScenes' `vehicle.car`, Argoverse's REGULAR_VEHICLE ...; 0 for
    others."""
    plain = name.lower().rpartition(".")[2]
    return next((CLASSES.index(c) + 1 for c, known in ALIASES.items() if plain in known), 0)


class FrameBatches:
    """Shuffled batches of frames, turned, mirrored and scaled at random; see `zoo.shared.train.Batches`.

    Args:
        frames: to train on; they are moved to the device once.
        batch: frames per step; the last, short batch of an epoch is left out.
        device: where the batches are made.
        augment: whether frames are changed: mirrored along x and y, turned by up to 45 degrees, scaled by
        0.95 to 1.05.
    """

    def __init__(
        self, frames: Sequence[Frame], batch: int, device: torch.device | str = "cpu", augment: bool = True
    ) -> None:
        if not frames:
            raise DataError("training needs at least one frame")
        self.batch, self.augment, self.count = min(batch, len(frames)), augment, len(frames)
        sizes = torch.tensor([len(frame.points) for frame in frames])
        self._first = (sizes.cumsum(0) - sizes).tolist()
        self._sizes = sizes.tolist()
        self._points = torch.cat([frame.points for frame in frames]).to(device)
        self._boxes = padded_boxes(frames).to(device)

    def __len__(self) -> int:
        return self.count // self.batch

    def draw(self, generator: torch.Generator) -> Iterator[Batch]:
        """The batches of one epoch."""
        order = torch.randperm(self.count, generator=generator).tolist()
        for start in range(0, len(self) * self.batch, self.batch):
            batch = self.take(order[start : start + self.batch])
            yield augmented(batch, generator) if self.augment else batch

    def take(self, index: Sequence[int]) -> Batch:
        """The frames at these positions, as they are."""
        parts = [self._points[self._first[i] : self._first[i] + self._sizes[i]] for i in index]
        frame = torch.arange(len(index)).repeat_interleave(torch.tensor([self._sizes[i] for i in index]))
        points = torch.cat([frame.to(self._points)[:, None], torch.cat(parts)], 1)
        return Batch(self._boxes[list(index)], points)

    def example(self) -> tuple[Tensor, ...]:
        """The first frame as a batch of one."""
        return self.take([0])


def padded_boxes(frames: Sequence[Frame]) -> Float[Tensor, "batch most 8"]:
    """The boxes of frames that count in training, as one block padded with zeros."""
    kept = [(f.labels > 0) & (f.hits >= LEAST_POINTS) for f in frames]
    most = max([int(k.sum()) for k in kept] + [1])
    block = torch.zeros(len(frames), most, 8)
    for row, (frame, keep) in enumerate(zip(frames, kept, strict=True)):
        block[row, : int(keep.sum())] = torch.cat([frame.boxes, frame.labels[:, None].float()], 1)[keep]
    return block


def augmented(batch: Batch, generator: torch.Generator) -> Batch:
    """Each frame mirrored, turned and scaled by its own draw."""
    boxes, points = batch.gt_boxes.clone(), batch.points.clone()
    draw = torch.rand(4, len(boxes), generator=generator).to(points)
    mirror = torch.where(draw[:2] < 0.5, -1.0, 1.0)  # of x and of y
    angle, scale = (draw[2] - 0.5) * (torch.pi / 2), 0.95 + 0.1 * draw[3]
    frame = points[:, 0].long()
    points[:, 1:4] = _moved(points[:, 1:4], mirror[:, frame], angle[frame], scale[frame])
    spread = [values[..., None].expand(-1, boxes.shape[1]) for values in (angle, scale)]
    wide = mirror[..., None].expand(-1, -1, boxes.shape[1])
    real = boxes[..., 7:] != 0
    boxes[..., :3] = _moved(boxes[..., :3], wide, *spread)
    boxes[..., 3:6] *= spread[1][..., None]
    yaw = boxes[..., 6]
    yaw = torch.where(wide[0] < 0, torch.pi - yaw, yaw)
    yaw = torch.where(wide[1] < 0, -yaw, yaw)
    boxes[..., 6] = wrapped(yaw + spread[0])
    return Batch(boxes * real, points)


def _moved(place: Tensor, mirror: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
    x, y = place[..., 0] * mirror[0], place[..., 1] * mirror[1]
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([x * cos - y * sin, x * sin + y * cos, place[..., 2]], -1)
    return turned * scale[..., None]
