"""LiDAR frames of your own, in the layout of OpenPCDet's and MMDetection3D's custom data sets.

    FOLDER/points/ID.bin | ID.npy      rows (x, y, z, reflectance): float32, or an array of 3 columns or more
    FOLDER/labels/ID.txt               lines `x y z dx dy dz yaw NAME`: metres, z of the centre, yaw from +x
    FOLDER/ImageSets/train.txt, val.txt or test.txt      IDs, a line each; without them every fifth is a test

Names are read as the classes of the scenes (`label_of`); others are neither trained on nor counted.

    python -m zoo.vision.lidar.frames --model vision/dsvt-pillars-scenes --points sweep.bin
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from zoo.bundles.sources import Source
from zoo.bundles.store import load
from zoo.errors import ConfigError, DataError
from zoo.shared.store.identity import data_digest
from zoo.vision.lidar.average_precision import Detections
from zoo.vision.lidar.boxes import check_boxes, points_in_boxes
from zoo.vision.lidar.data import Frame, label_of
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.tasks import detections

SUFFIXES = (".bin", ".npy")
TEST_EVERY = 5


def is_frames(name: str) -> bool:
    """Whether a data set's name is a folder of frames."""
    return bool(name) and (Path(name) / "points").is_dir()


def read_points(path: Path) -> Float[Tensor, "points 4"]:
    """One sweep: x, y, z in metres and reflectance, which is 0 where the file has none.

    Raises:
        DataError: no such file, another kind, no whole rows, or values that are not finite.
    """
    try:
        if path.suffix == ".bin":
            flat = np.fromfile(path, dtype=np.float32)
            if flat.size % 4:
                raise DataError(f"{path} holds {flat.size} numbers: rows of four float32 are needed")
            rows = flat.reshape(-1, 4)
        elif path.suffix == ".npy":
            rows = np.load(path, allow_pickle=False)
        else:
            raise DataError(f"{path}: points are read from {' and '.join(SUFFIXES)}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as points: {error}") from error
    if rows.ndim != 2 or rows.shape[1] < 3 or rows.dtype.kind not in "fiu":
        raise DataError(f"{path} is {rows.dtype} {list(rows.shape)}: rows of x, y, z, reflectance are needed")
    points = torch.zeros(len(rows), 4)
    width = min(4, rows.shape[1])
    points[:, :width] = torch.from_numpy(rows[:, :width].astype(np.float32))
    if not bool(points.isfinite().all()):
        raise DataError(f"{path} has points that are not finite; remove them")
    return points


def read_frame(folder: Path, name: str) -> Frame:
    """A frame with its labels, if there is a file of them.

    Raises:
        DataError: points that cannot be read, or a line that is no label.
    """
    found = [folder / "points" / f"{name}{suffix}" for suffix in SUFFIXES]
    path = next((one for one in found if one.is_file()), found[0])
    points = read_points(path)
    rows, names = [], []
    labels = folder / "labels" / f"{name}.txt"
    for number, line in enumerate(labels.read_text().splitlines() if labels.is_file() else [], 1):
        words = line.split()
        try:
            values = [float(word) for word in words[:7]]
        except ValueError:
            values = []
        if len(values) != 7 or len(words) != 8:
            raise DataError(f"{labels}:{number}: a label is `x y z dx dy dz yaw NAME`; received {line!r}")
        rows.append(values)
        names.append(words[7])
    boxes = torch.tensor(rows).reshape(-1, 7)
    check_boxes(boxes, str(labels))
    hits = points_in_boxes(points[:, :3], boxes).sum(1)
    return Frame(
        points, boxes, torch.tensor([label_of(one) for one in names], dtype=torch.int64), hits, tuple(names)
    )


def split_of(folder: Path) -> dict[str, list[str]]:
    """The IDs of the training and test frames.

    Raises:
        DataError: no frames, a part without any, or one that is in both.
    """
    there = sorted({file.stem for file in (folder / "points").glob("*") if file.suffix in SUFFIXES})
    lists = folder / "ImageSets"
    test = next((lists / name for name in ("test.txt", "val.txt") if (lists / name).is_file()), None)
    if test is not None and (lists / "train.txt").is_file():
        parts = {"train": (lists / "train.txt").read_text().split(), "test": test.read_text().split()}
    else:
        parts = {
            "train": [name for place, name in enumerate(there, 1) if place % TEST_EVERY],
            "test": there[TEST_EVERY - 1 :: TEST_EVERY],
        }
    if empty := [part for part, names in parts.items() if not names]:
        raise DataError(f"{folder}: {len(there)} frames leave none for {empty[0]}; give five, or ImageSets/")
    if both := set(parts["train"]) & set(parts["test"]):
        raise DataError(f"{folder}: {sorted(both)[0]} is a training and a test frame")
    return parts


def own_frames(folder: str, part: str) -> tuple[Frame, ...]:
    """The frames of one part, `train` or `test`; files that change are read again.

    Raises:
        DataError: see `read_frame` and `split_of`; a part in which nothing is named as a class of the scenes.
    """
    return _own_frames(folder, part, data_digest(Path(folder)))


@functools.lru_cache(maxsize=4)
def _own_frames(folder: str, part: str, digest: str) -> tuple[Frame, ...]:
    frames = tuple(read_frame(Path(folder), name) for name in split_of(Path(folder))[part])
    if not any(bool((frame.labels > 0).any()) for frame in frames):
        names = sorted({name for frame in frames for name in frame.names})
        raise DataError(
            f"{folder}: no label of the {part} frames is one of the detector's classes "
            f"(names: {', '.join(names) or 'none'})"
        )
    return frames


def frames_source(folder: str) -> Source:
    """What a card says of a folder of frames."""
    return Source(
        Path(folder).name, f"files of their owner, sha256 {data_digest(Path(folder))}", "not stated"
    )


def detect(model: Detector, points: Float[Tensor, "points 4"]) -> Detections:
    """The boxes in one sweep, best first."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return detections(model, [Frame(points, torch.zeros(0, 7), nothing, nothing)])[0]


@dataclass(frozen=True)
class Detect:
    """What to look at.

    Args:
        model: a detector of the zoo: a name or folder.
        points: a .bin or .npy file.
        least: score from which on boxes are printed.
    """

    model: str
    points: Path
    least: float = 0.3


def main(config: Detect) -> None:
    """Print the boxes of one sweep, as lines of a label file with the score at the end.

    Raises:
        ConfigError: no detector.
        DataError: points that cannot be read.
    """
    model = load(config.model)
    if not isinstance(model, Detector):
        raise ConfigError(f"{config.model} is no detector of boxes")
    found = detect(model, read_points(config.points))
    for box, score, label in zip(found.boxes, found.scores.tolist(), found.labels.tolist(), strict=True):
        if score >= config.least:
            print(
                " ".join(f"{value:.3f}" for value in box.tolist()), model.classes[label - 1], f"{score:.3f}"
            )


if __name__ == "__main__":
    main(tyro.cli(Detect, description=__doc__))
