"""Posed views of a scene, for training and for testing: embedded ones and those in the folder ZOO_DATA.

views = load_views("shapes")              # embedded: made by a formula, with exact depth and masks
views = load_views("lego", longest=100)   # ZOO_DATA/nerf-synthetic-lego, each side divided by a whole number
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import DataError, MissingDataError
from zoo.neural3d.cameras import Camera, from_opengl, from_world, lens
from zoo.shared.store.io import read_json


@dataclass(frozen=True)
class View:
    """A picture and the camera that took it.

    Attributes:
        camera: where it was taken from.
        image: [height, width, 3] colours from 0 to 1, over the set's background.
        mask: [height, width] share of the object in each pixel, or None.
        depth: [height, width] along the camera's axis, 0 where unknown, or None.
        name: for messages and captions.
    """

    camera: Camera
    image: Tensor
    mask: Tensor | None = None
    depth: Tensor | None = None
    name: str = ""

    def __post_init__(self) -> None:
        wanted = (self.camera.height, self.camera.width)
        for what in ("image", "mask", "depth"):
            found = getattr(self, what)
            if found is not None and tuple(found.shape[:2]) != wanted:
                raise DataError(
                    f"view {self.name!r}: {what} of {tuple(found.shape[:2])}, the camera has {wanted}"
                )

    def reduced(self, factor: int) -> View:
        """Means over squares of `factor` pixels; what is left over at right and below is cut. Depth is taken
        from the middle pixel, as a mean of near and far is nowhere."""
        if factor == 1:
            return self
        height, width = (size // factor for size in self.image.shape[:2])
        scale = torch.tensor([[1 / factor], [1 / factor], [1.0]])
        camera = Camera(self.camera.viewmat, self.camera.intrinsics * scale, width, height)

        def mean(values: Tensor) -> Tensor:
            planes = values.reshape(*self.image.shape[:2], -1).permute(2, 0, 1)
            return (
                functional.avg_pool2d(planes, factor)
                .permute(1, 2, 0)
                .reshape(height, width, *values.shape[2:])
            )

        middle = slice(factor // 2, None, factor)
        depth = None if self.depth is None else self.depth[middle, middle][:height, :width]
        return View(
            camera, mean(self.image), None if self.mask is None else mean(self.mask), depth, self.name
        )


@dataclass(frozen=True)
class Views:
    """Views to train on and views to be judged by.

    Attributes:
        name: of the set.
        train, test: disjoint.
        background: colour behind the object.
        points, colours: [N, 3] each, a rough cloud of the surface, or None.
        licence: of the data.
    """

    name: str
    train: list[View]
    test: list[View]
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    points: Tensor | None = None
    colours: Tensor | None = None
    licence: str = ""

    def __post_init__(self) -> None:
        if not self.train or not self.test:
            raise DataError(
                f"{self.name}: {len(self.train)} views to train on and {len(self.test)} to test on"
            )

    @property
    def centre(self) -> Tensor:
        """[3], the point that the training cameras look at."""
        return middle_of_views(self.train)[0]

    @property
    def extent(self) -> float:
        """Mean distance of the training cameras from that point."""
        return middle_of_views(self.train)[1]


def middle_of_views(views: Sequence[View]) -> tuple[Tensor, float]:
    """The point [3] that the views' cameras look at, by least squares, and their mean distance from it."""
    axes = torch.stack([view.camera.viewmat[2, :3] for view in views]).double()
    eyes = torch.stack([view.camera.centre for view in views]).double()
    across = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]
    point = torch.linalg.lstsq(across.sum(0), (across @ eyes[:, :, None]).sum(0)).solution[:, 0]
    return point.float(), float((eyes - point).norm(dim=1).mean())


def refuse_none(views: Sequence[View]) -> None:
    """Raise DataError where there is nothing to learn from."""
    if not views:
        raise DataError("no views to learn from: give one at least")


@dataclass(frozen=True)
class ViewBatches:
    """One view a step, in a new order each epoch: what `zoo.shared.train.Fit` draws."""

    views: list[View] = field(default_factory=list)

    def __post_init__(self) -> None:
        refuse_none(self.views)

    def __len__(self) -> int:
        return len(self.views)

    def draw(self, generator: torch.Generator) -> Iterator[View]:
        for index in torch.randperm(len(self.views), generator=generator).tolist():
            yield self.views[index]

    def example(self) -> tuple[Camera]:
        return (self.views[0].camera,)


def load_views(name: str, *, longest: int | None = None) -> Views:
    """The views called `name`, no side longer than `longest` pixels; "lego-100" is "lego" with 100.

    Raises:
        DataError: an unknown name, or data that are not in ZOO_DATA.
    """
    base, _, number = name.rpartition("-")
    if longest is None and base in SETS and number.isdigit():
        name, longest = base, int(number)
    if name not in SETS:
        raise DataError(f"unknown views {name!r}; there are {', '.join(sorted(SETS))}")
    if longest is not None and longest < 8:
        raise DataError(f"views of {longest} pixels show nothing; ask for 8 or more")
    views = SETS[name]()
    if longest is None:
        return views
    size = max(views.train[0].image.shape[:2])
    factor = -(-size // longest)
    train, test = ([view.reduced(factor) for view in part] for part in (views.train, views.test))
    return Views(name, train, test, views.background, views.points, views.colours, views.licence)


def data_folder(name: str) -> Path:
    root = os.environ.get("ZOO_DATA")
    if root is None or not (Path(root) / name).is_dir():
        raise MissingDataError(
            f"the views {name!r} are not in the folder that ZOO_DATA names ({root}); 'shapes' are embedded"
        )
    return Path(root) / name


def read_picture(path: Path) -> Tensor:
    """[height, width, 1, 3 or 4] values of a picture from 0 to 1."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            values = numpy.asarray(picture)
    except OSError as error:
        raise DataError(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(values / (65535 if values.dtype == numpy.uint16 else 255)).float()


def _coloured(path: Path, background: float) -> tuple[Tensor, Tensor | None]:
    """Colours over a grey background, and the share of the object where the picture has one."""
    values = read_picture(path)
    if values.shape[-1] != 4:
        return values[..., :3], None
    alpha = values[..., 3:]
    return values[..., :3] * alpha + background * (1 - alpha), alpha[..., 0]


def _cloud(folder: Path) -> tuple[Tensor | None, Tensor | None]:
    path = folder / "points3d.npz"
    if not path.exists():
        return None, None
    with numpy.load(path, allow_pickle=False) as data:
        return torch.from_numpy(data["xyz"]).float(), torch.from_numpy(data["rgb"] / 255).float()


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(path)
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return found


def load_transforms(path: Path, background: float = 1.0) -> list[tuple[View, str]]:
    """The views of a transforms.json (Blender, nerfstudio), each with what it says of its split.

    Frames whose picture is absent are left out; distortion is refused, as the cameras here have none.

    Raises:
        DataError: no frames, no focal length, distorted pictures, or a camera that is none.
    """
    data = _json(path)
    if any(abs(data.get(name, 0)) > 1e-9 for name in ("k1", "k2", "k3", "p1", "p2")):
        raise DataError(
            f"{path}: distorted pictures; undistort them first (nerfstudio and COLMAP have commands)"
        )
    views = []
    for number, frame in enumerate(data.get("frames", [])):
        try:
            file, pose = path.parent / frame["file_path"], torch.tensor(frame["transform_matrix"])
            if pose.shape not in ((4, 4), (3, 4)):
                raise ValueError(f"transform_matrix of {tuple(pose.shape)}")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: frame {number} lacks a field or has it wrong: {error!r}") from error
        file = file if file.suffix else file.with_suffix(".png")
        if not file.exists():
            continue
        image, mask = _coloured(file, background)
        height, width = image.shape[:2]
        if "fl_x" in data:
            k = torch.eye(3)
            k[0, 0], k[1, 1] = data["fl_x"], data.get("fl_y", data["fl_x"])
            k[0, 2], k[1, 2] = data.get("cx", width / 2), data.get("cy", height / 2)
        elif "camera_angle_x" in data:
            k = lens(width, height, data["camera_angle_x"])
        else:
            raise DataError(f"{path}: neither fl_x nor camera_angle_x")
        try:
            camera = from_opengl(pose, k, width, height)
        except DataError as error:
            raise DataError(f"{path}: frame {number}: {error}") from error
        views.append((View(camera, image, mask, None, file.name), frame.get("split", "")))
    if not views:
        raise DataError(f"{path}: no frame whose picture is there")
    return views


def _lego() -> Views:
    folder = data_folder("nerf-synthetic-lego")
    train, test = (
        [v for v, _ in load_transforms(folder / f"transforms_{s}.json")] for s in ("train", "test")
    )
    return Views("lego", train, test, (1.0, 1.0, 1.0), licence="not stated by the source; not shipped")


def _fox() -> Views:
    folder = data_folder("nerf-fox")
    views = load_transforms(folder / "transforms_undistorted.json")
    train, test = ([v for v, split in views if (split == "test") == wanted] for wanted in (False, True))
    points, colours = _cloud(folder)
    licence = "NVIDIA source code licence, non-commercial"
    return Views("fox", train, test, points=points, colours=colours, licence=licence)


def _posed(folder: Path, images: str, poses: str, k_name: str, offset: float = 0.0) -> list[View]:
    """Views of a cameras.npz: pictures in the order of their names."""
    files = sorted((folder / images).iterdir())
    with numpy.load(folder / "cameras.npz", allow_pickle=False) as data:
        worlds, k = torch.from_numpy(data[poses]), torch.from_numpy(data[k_name]).float()
    if len(files) != len(worlds):
        raise DataError(f"{folder}: {len(files)} pictures and {len(worlds)} cameras")
    views = []
    for number, (file, world) in enumerate(zip(files, worlds, strict=True)):
        image, _ = _coloured(file, 0.0)
        own = (k if k.ndim == 2 else k[number]).clone()
        own[0, 1] = 0  # rounding of the source's decomposition: 1e-6 pixels
        own[:2, 2] += offset
        camera = from_world(world, own, image.shape[1], image.shape[0])
        views.append(View(camera, image, None, None, file.name))
    return views


def _split(
    views: list[View], test: list[int], excluded: tuple[int, ...] = ()
) -> tuple[list[View], list[View]]:
    train = [view for i, view in enumerate(views) if i not in test and i not in excluded]
    return train, [views[i] for i in test]


def _fern() -> Views:
    folder = data_folder("llff-fern")
    views = _posed(folder, "images_8", "c2w_opencv", "K_images_8")
    points, colours = _cloud(folder)
    return Views("fern", *_split(views, list(range(0, len(views), 8))), points=points, colours=colours)


def _dtu() -> Views:
    """Scan 24 in the frame where the object is in the unit sphere; views of odd exposure are left out."""
    folder = data_folder("dtu-scan24")
    views = _posed(folder, "images", "c2w_opencv_unit", "K")
    masked = []
    for view, file in zip(views, sorted((folder / "mask").iterdir()), strict=True):
        mask = read_picture(file)
        masked.append(
            View(view.camera, view.image, mask if mask.ndim == 2 else mask[..., 0], None, view.name)
        )
    with numpy.load(folder / "points3d.npz", allow_pickle=False) as data:
        points, colours = torch.from_numpy(data["xyz_unit"]), torch.from_numpy(data["rgb"] / 255).float()
    excluded = (3, 4, 5, 6, 7, *range(16, 22), *range(36, 40))
    train = [25, 22, 28, 40, 44, 48, 0, 8, 13]  # of the sparse-view protocol, in its order
    test = [i for i in range(len(masked)) if i not in train and i not in excluded]
    return Views(
        "dtu24", [masked[i] for i in train], [masked[i] for i in test], points=points, colours=colours
    )


def _strecha(folder: str, name: str, test: list[int]) -> Views:
    path = data_folder(folder)
    points, colours = _cloud(path)
    views = _posed(path, "images", "c2w_opencv", "K")
    return Views(name, *_split(views, test), points=points, colours=colours)


def _livingroom() -> Views:
    folder = data_folder("rgbd-livingroom")
    views = _posed(
        folder, "color", "c2w_opencv", "K", offset=0.5
    )  # its pixels are counted from their middles
    deep = []
    for view, file in zip(views, sorted((folder / "depth_mm").iterdir()), strict=True):
        deep.append(View(view.camera, view.image, None, read_picture(file) * 65.535, view.name))
    return Views("livingroom", *_split(deep, list(range(0, 36, 6))), licence="MIT")


def _shapes() -> Views:
    from zoo.neural3d.shapes import shapes

    return shapes()


def _arc() -> Views:
    from zoo.neural3d.shapes import arc

    return arc()


def _ring(name: str, source: str) -> Views:
    from zoo.neural3d.few import ring

    return ring(name, source)


def _frames() -> Views:
    from zoo.neural3d.few import frames

    return frames()


def _without_ball() -> Views:
    from zoo.neural3d.studies.spin_nerf import without_ball

    return without_ball()


SETS: dict[str, Callable[[], Views]] = {
    "shapes": _shapes,
    "shapes-arc": _arc,
    "lego": _lego,
    "fox": _fox,
    "fern": _fern,
    "dtu24": _dtu,
    "fountain": lambda: _strecha("strecha-fountain-P11", "fountain", [3, 4, 6, 7]),
    "herzjesu": lambda: _strecha("strecha-herzjesu-P8", "herzjesu", [2, 4, 5]),
    "livingroom": _livingroom,
    "shapes-ring": lambda: _ring("shapes-ring", "shapes-48"),
    "lego-ring": lambda: _ring("lego-ring", "lego-50"),
    "livingroom-frames": _frames,
    "disc-without-ball": _without_ball,
}
