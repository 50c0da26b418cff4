"""Images of your own: a folder for each class, or a list of files and labels.

    FOLDER/CLASS/*.png                      split drawn per class: 70 % train, 10 % val, 20 % test
    FOLDER/train|val|test/CLASS/*.png       split given; without val/ a tenth of train/ is held out
    LIST.csv                                columns `file` (from the list's folder) and `label`, maybe `split`

`FOLDER@32` resizes to 32x32, `FOLDER@32L` to grey ones, `FOLDER@32RGB` to three channels; without it images
stay as they are, and must all have one size. Grey ones among coloured ones get three channels. Only Pillow
reads the files.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.bundles.sources import Source
from zoo.errors import DataError
from zoo.shared.store.identity import data_digest
from zoo.vision.data import Images, Split, held_out, statistics

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PARTS = ("train", "val", "test")
MOST_BYTES = 4 << 30  # of all images together, as they are kept in memory
_SPEC = re.compile(r"(?P<path>.+?)(?:@(?P<size>\d{1,4})(?P<mode>L|RGB)?)?")


@dataclass(frozen=True)
class Spec:
    """What `FOLDER@32L` says."""

    path: Path
    size: int | None
    mode: str | None

    @classmethod
    def of(cls, name: str) -> Spec:
        """Read it."""
        found = _SPEC.fullmatch(name)
        assert found is not None  # it matches whatever is not empty
        return cls(Path(found["path"]), int(found["size"]) if found["size"] else None, found["mode"])

    def __str__(self) -> str:
        return f"{self.path}@{self.size}{self.mode or ''}" if self.size else str(self.path)


def is_folder(name: str) -> bool:
    """Whether a data set's name is that of a folder or list of images."""
    path = Spec.of(name).path if name else Path()
    return bool(name) and ("/" in name or path.is_dir() or path.suffix == ".csv")


def state_of(name: str) -> tuple[tuple[str, int, int], ...]:
    """Each file of a set with its time of change and its size."""
    listed = [file for file, _, _ in _listed(Spec.of(name).path)]
    stats = [(file, file.stat()) for file in listed if file.is_file()]
    return tuple((str(file), found.st_mtime_ns, found.st_size) for file, found in stats)


@functools.lru_cache(maxsize=2)
def read_images(name: str, state: tuple[tuple[str, int, int], ...] = ()) -> Images:
    """The images of a folder or list, as bytes, with a split; classes are numbered in the order of their
    names.

    Args:
        name: as above.
        state: of the files, see `state_of`: files that changed are read again.

    Raises:
        DataError: nothing there, one class only, a part without images, a file that is no image, images of
            several sizes, or more than 4 GiB of them.
    """
    spec = Spec.of(name)
    listed = list(_listed(spec.path))
    classes = sorted({label for _, label, _ in listed})
    if len(classes) < 2:
        raise DataError(
            f"{spec.path}: {len(classes)} classes of images; a folder for each of two or more is needed."
        )
    images: list[Any] = []
    shape = None
    for file, _, _ in listed:
        array = _decoded(file, spec)
        if shape is None:
            shape = array.shape[1:]
            if len(listed) * array.nbytes > MOST_BYTES:
                raise DataError(
                    f"{spec.path}: {len(listed)} images of {array.nbytes} bytes do not fit; resize them: "
                    f"{spec.path}@64."
                )
        if array.shape[1:] != shape:
            raise DataError(
                f"{file} is {array.shape[2]}x{array.shape[1]}, the first image {shape[1]}x{shape[0]}: "
                f"give one size, {spec}@32 say."
            )
        images.append(array)
    if len({len(array) for array in images}) > 1:
        images = [np.repeat(array, 3, axis=0) if len(array) == 1 else array for array in images]
    numbers = {label: number for number, label in enumerate(classes)}
    whole = Split(
        torch.from_numpy(np.stack(images)), torch.tensor([numbers[label] for _, label, _ in listed])
    )
    parts = _parts(whole, [part for _, _, part in listed], spec.path)
    mean, std = statistics(parts["train"].images, 255.0)
    std = tuple(max(each, 1e-3) for each in std)
    return Images(name, parts["train"], parts["val"], parts["test"], mean, std, augment=False)


def source_of(name: str) -> Source:
    """What a card says of a folder or list: its name and the digest of its content."""
    path = Spec.of(name).path
    return Source(path.name, f"files of their owner, sha256 {data_digest(path)}", "not stated")


def _listed(path: Path) -> Iterator[tuple[Path, str, str]]:
    """File, class and part ("" where the part is to be drawn) of each image."""
    if path.suffix == ".csv":
        yield from _from_list(path)
        return
    if not path.is_dir():
        raise DataError(f"There is no folder of images at {path}.")
    given = [part for part in PARTS if (path / part).is_dir()]
    if given and not {"train", "test"} <= set(given):
        raise DataError(f"{path} has {', '.join(given)}: a split needs train and test.")
    for part in given or [""]:
        for folder in sorted(each for each in (path / part).iterdir() if each.is_dir()):
            for file in sorted(folder.rglob("*")):
                if file.suffix.lower() in ENDINGS:
                    yield file, folder.name, part


def _from_list(path: Path) -> Iterator[tuple[Path, str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a list: {error}.") from error
    for number, row in enumerate(rows, 2):
        part = row.get("split") or ""
        if not row.get("file") or not row.get("label") or part not in ("", *PARTS):
            raise DataError(
                f"{path}:{number}: a row has `file`, `label` and maybe `split` (train, val or test)."
            )
        yield path.parent / row["file"], row["label"], part


def _decoded(file: Path, spec: Spec) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as opened:
            mode = spec.mode or ("L" if opened.mode in ("1", "L", "I;16", "I") else "RGB")
            image = opened.convert(mode)
            if spec.size:
                image = image.resize((spec.size, spec.size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as an image: {error}.") from error
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _parts(whole: Split, stated: list[str], path: Path) -> dict[str, Split]:
    """The three parts; what is not stated is drawn with seed 0."""
    if any(stated) and not all(stated):
        raise DataError(f"{path}: some images have a split and some have none.")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    if any(stated):
        index = {part: order[torch.tensor([stated[i] == part for i in order.tolist()])] for part in PARTS}
    else:
        index = {part: torch.empty(0, dtype=torch.int64) for part in PARTS}
        for label in whole.labels.unique():
            own = order[whole.labels[order] == label]
            held, test = max(1, round(0.1 * len(own))), max(1, round(0.2 * len(own)))
            if len(own) < 3:
                raise DataError(f"{path}: a class has {len(own)} images; three are the least to split.")
            cut = own.split([test, held, len(own) - held - test])
            for part, piece in zip(("test", "val", "train"), cut, strict=True):
                index[part] = torch.cat([index[part], piece])
    parts = {part: whole.take(index[part]) for part in PARTS}
    if any(stated) and not len(parts["val"]):
        parts["train"], parts["val"] = held_out(parts["train"])
    if empty := [part for part in PARTS if not len(parts[part])]:
        raise DataError(f"{path}: no images are left for {empty[0]}.")
    shuffled = torch.randperm(len(parts["train"]), generator=torch.Generator().manual_seed(1))
    return parts | {"train": parts["train"].take(shuffled)}
