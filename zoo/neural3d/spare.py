"""The benchmark of sparse rendering (SpaRe): splits, cameras of projection matrices, submissions, scores.

Nazarczuk et al., "AIM 2024 Sparse Neural Rendering Challenge: Dataset and Benchmark", ECCV Workshops 2024. A
split names, for each scene, the views that a method may see and those that it must render; a submission is a
zip with a folder of images for each scene; scores are averaged over images, then scenes, then data sets.
PSNR-M is over the pixels of the object, SSIM-M over its bounding box. LPIPS is "not available": there is no
number for it without its backbone's weights.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import DataError
from zoo.neural3d.cameras import Camera
from zoo.neural3d.metrics import LPIPS, psnr, ssim
from zoo.neural3d.views import View
from zoo.shared.store.io import atomic_write, read_json, write_json

VIEWS = {"DTU": 64, "SpaRe": 64}  # most views of a scene, by data set
_NAMES = {"DTU": "rect_{:03d}_3_r5000.png", "SpaRe": "cam_{:03d}_3_0000.png"}  # light 3: all lamps
METRICS = ("psnr_m", "psnr", "ssim_m", "ssim")
_MOST = 64 << 20  # bytes of an image in a submission


@dataclass(frozen=True)
class SceneSplit:
    """The views of one scene, counted from zero.

    Attributes:
        input_views: that a method may see.
        test_views: that it must render.
        dataset: DTU or SpaRe, which decides the names of the files.
    """

    input_views: tuple[int, ...]
    test_views: tuple[int, ...]
    dataset: str

    def names(self) -> dict[str, int]:
        """The files of a submission for this scene, and the view of each."""
        return {image_name(self.dataset, view): view for view in self.test_views}


def image_name(dataset: str, view: int) -> str:
    """The file of a view that is counted from zero; files are counted from one."""
    return _NAMES[dataset].format(view + 1)


def read_split(path: str | Path) -> dict[str, SceneSplit]:
    """A `TrackN_split_*.json`, by scene.

    Raises:
        DataError: no such file or not of this form, views that are seen and asked for, or counted from one.
    """
    try:
        content = read_json(Path(path))
        split = {
            str(scene): SceneSplit(tuple(part["input_views"]), tuple(part["test_views"]), part["dataset"])
            for scene, part in content.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no split: {error!r}") from error
    check_split(split, str(path))
    return split


def write_split(path: str | Path, split: Mapping[str, SceneSplit]) -> None:
    """Write a split as `read_split` reads it."""
    write_json(Path(path), {scene: {k: v for k, v in vars(part).items()} for scene, part in split.items()})


def check_split(split: Mapping[str, SceneSplit], source: str) -> None:
    """Refuse a split that cannot be meant.

    Raises:
        DataError: as for `read_split`.
    """
    if not split:
        raise DataError(f"{source}: no scene")
    for scene, part in split.items():
        if part.dataset not in _NAMES:
            raise DataError(f"{source}, {scene}: data set {part.dataset!r}; there are {', '.join(_NAMES)}")
        views = [*part.input_views, *part.test_views]
        if not part.input_views or not part.test_views or not all(type(view) is int for view in views):
            raise DataError(f"{source}, {scene}: input_views and test_views are lists of whole numbers")
        if both := sorted(set(part.input_views) & set(part.test_views)):
            raise DataError(f"{source}, {scene}: view {both[0]} is both seen and asked for")
        if len(set(views)) < len(views):
            raise DataError(f"{source}, {scene}: a view is named twice")
        if not 0 <= min(views) <= max(views) < VIEWS[part.dataset]:
            raise DataError(
                f"{source}, {scene}: views from {min(views)} to {max(views)}, of {VIEWS[part.dataset]}, "
                "counted from zero; subtract one if these are the numbers of the files"
            )


def camera_of(projection: Float[Tensor, "3 4"], width: int, height: int) -> Camera:
    """The camera of a projection matrix, P = K [R | t] up to scale: an RQ decomposition with a positive
    diagonal and det R = 1.

    Raises:
        DataError: a matrix of rank below three, or pixels that are skewed.
    """
    matrix = projection.double()
    left = matrix[:, :3]
    if not bool(matrix.isfinite().all()) or float(torch.linalg.matrix_rank(left)) < 3:
        raise DataError(f"no camera has the projection {projection.tolist()}: its left part has no inverse")
    if float(torch.linalg.det(left)) < 0:
        matrix, left = -matrix, -left  # of all scales, the one with det R = 1
    flip = torch.eye(3, dtype=torch.float64).flip(0)
    q, r = torch.linalg.qr((flip @ left).T)
    k, turn = flip @ r.T @ flip, flip @ q.T
    signs = torch.diag(k.diagonal().sign())
    k, turn = k @ signs, signs @ turn
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, :3], viewmat[:3, 3] = turn, torch.linalg.solve(k, matrix[:, 3])
    k = k / k[2, 2]
    if abs(float(k[0, 1])) > 1e-3 * float(k[0, 0]):
        raise DataError(f"pixels that are skewed by {float(k[0, 1]):.3g}; the cameras here are not")
    k[0, 1] = 0
    return Camera(viewmat.float(), k.float(), width, height)


def read_projection(path: str | Path) -> Float[Tensor, "3 4"]:
    """The matrix of a `pos_XXX.txt`, float64.

    Raises:
        DataError: not twelve finite numbers.
    """
    try:
        values = [float(word) for word in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no projection matrix: {error}") from error
    if len(values) != 12 or not numpy.isfinite(values).all():
        raise DataError(f"{path}: {len(values)} numbers; a projection matrix has 12 finite ones")
    return torch.tensor(values, dtype=torch.float64).reshape(3, 4)


def pack(
    path: str | Path, split: Mapping[str, SceneSplit], render: Callable[[str, int], Float[Tensor, "h w 3"]]
) -> Path:
    """Write a submission: what `render(scene, view)` gives for each view that is asked for, as 8-bit .png."""
    from PIL import Image

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:  # .png is deflated already
        for scene, part in split.items():
            for name, view in part.names().items():
                image = (render(scene, view).clamp(0, 1) * 255).round().byte().numpy()
                encoded = io.BytesIO()
                Image.fromarray(image).save(encoded, "PNG")
                archive.writestr(zipfile.ZipInfo(f"{scene}/{name}"), encoded.getvalue())
    return atomic_write(Path(path), content.getvalue())


def read_submission(
    path: str | Path, split: Mapping[str, SceneSplit], size: Mapping[str, tuple[int, int]]
) -> dict[str, dict[int, Tensor]]:
    """The images of a valid submission, by scene and view. Nothing is unpacked to the disk.

    Args:
        size: width and height of each scene's images.

    Raises:
        DataError: no zip, a missing or extra image, one of another size, or names that are one off.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            wanted = {
                f"{s}/{name}": (s, view) for s, part in split.items() for name, view in part.names().items()
            }
            _check_names(str(path), split, set(infos), set(wanted))
            found: dict[str, dict[int, Tensor]] = {scene: {} for scene in split}
            for name, (scene, view) in wanted.items():
                if infos[name].file_size > _MOST:
                    raise DataError(f"{path}: {name} has {infos[name].file_size >> 20} MiB")
                found[scene][view] = _image(archive.read(name), f"{path}: {name}", size[scene])
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no submission: {error}") from error
    return found


def _check_names(source: str, split: Mapping[str, SceneSplit], found: set[str], wanted: set[str]) -> None:
    for shift in (-1, 1):
        slipped = {
            f"{scene}/{image_name(part.dataset, view + shift)}"
            for scene, part in split.items()
            for view in part.test_views
        }
        if found == slipped != wanted:
            raise DataError(f"{source}: all numbers are one off; a view n, from zero, is the file n + 1")
    roots = {name.partition("/")[0] for name in found}
    if len(roots) == 1 and not roots & set(split):
        raise DataError(f"{source}: the scenes' folders must be at the root, not in {sorted(roots)[0]!r}")
    if missing := sorted(wanted - found):
        raise DataError(f"{source}: {len(missing)} images are missing, the first {missing[0]}")
    if extra := sorted(found - wanted):
        raise DataError(f"{source}: {len(extra)} files are not asked for, the first {extra[0]}")


def _image(content: bytes, source: str, size: tuple[int, int]) -> Tensor:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.size != size or picture.mode != "RGB":
                raise DataError(
                    f"{source}: {picture.mode} of {picture.size[0]} x {picture.size[1]}; RGB of "
                    f"{size[0]} x {size[1]} is asked for"
                )
            values = numpy.array(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{source} is no picture: {error}") from error
    return torch.from_numpy(values).float() / 255


def score(found: Float[Tensor, "h w 3"], view: View) -> dict[str, float]:
    """The figures of one image against a view with a mask.

    Raises:
        DataError: a view without a mask, or a mask without a pixel.
    """
    if view.mask is None:
        raise DataError(f"view {view.name!r} has no mask; the benchmark's figures are of the object")
    inside, whole = (found, view.image, view.mask), (found, view.image)
    return dict(zip(METRICS, (psnr(*inside), psnr(*whole), ssim(*inside), ssim(*whole)), strict=True))


def evaluate(
    found: Mapping[str, Mapping[int, Tensor]],
    truth: Mapping[str, Mapping[int, View]],
    split: Mapping[str, SceneSplit],
) -> dict[str, Any]:
    """The figures of images by scene and view: `{"scenes": {...}, "datasets": {...}}`, LPIPS in words."""
    scenes = {}
    for scene, part in split.items():
        each = [score(found[scene][view], truth[scene][view]) for view in part.test_views]
        scenes[scene] = {name: fmean(one[name] for one in each) for name in METRICS}
    datasets = {}
    for dataset in dict.fromkeys(part.dataset for part in split.values()):
        own = [scenes[scene] for scene, part in split.items() if part.dataset == dataset]
        datasets[dataset] = {name: fmean(one[name] for one in own) for name in METRICS}
    return {"scenes": scenes, "datasets": datasets, "lpips": LPIPS, "lpips_m": LPIPS}
