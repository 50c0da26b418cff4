"""Photographs below $ZOO_DATA/superres: T91 to train on, Set5 and Set14 to test on, as luma in [-1, 1]."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from zoo.diffusion.networks.base import Draw
from zoo.errors import MissingDataError


def _folder(name: str) -> Path:
    root = os.environ.get("ZOO_DATA")
    folder = Path(root) / "superres" / name if root else None
    if folder is None or not folder.is_dir():
        raise MissingDataError(
            f"{name} is not at {folder or '$ZOO_DATA/superres/' + name}. Set ZOO_DATA to the folder with "
            "superres/."
        )
    return folder


@functools.lru_cache(maxsize=4)
def photos(name: str) -> tuple[Float[Tensor, "1 H W"], ...]:
    """The images of a set in order of their names, as luma (ITU-R 601) in [-1, 1].

    Args:
        name: `T91`, or `Set5` or `Set14` with `/HR`, `/LRx2` or `/LRx4`.

    Raises:
        DataError: the files are not below ZOO_DATA.
    """
    found = []
    for path in sorted(_folder(name).glob("*.png")):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"), dtype=np.float32)
        found.append(torch.from_numpy(grey.copy())[None] / 127.5 - 1)
    return tuple(found)


def crops(side: int) -> Draw:
    """Draws square crops of T91, mirrored at random."""
    images = [image for image in photos("T91") if min(image.shape[1:]) >= side]

    def make(n: int, generator: torch.Generator) -> tuple[Tensor]:
        out = torch.empty(n, 1, side, side)
        for place in range(n):
            image = images[int(torch.randint(len(images), (1,), generator=generator))]
            top, left = (
                int(torch.randint(size - side + 1, (1,), generator=generator)) for size in image.shape[1:]
            )
            cut = image[:, top : top + side, left : left + side]
            flip = bool(torch.randint(2, (1,), generator=generator))
            out[place] = cut.flip(-1) if flip else cut
        return (out,)

    return make


@functools.lru_cache(maxsize=4)
def test_tiles(side: int, limit: int) -> Float[Tensor, "n 1 side side"]:
    """Squares of Set5 and Set14 side by side, evenly thinned to at most `limit`."""
    tiles = []
    for image in (*photos("Set5/HR"), *photos("Set14/HR")):
        whole = image[:, : image.shape[1] // side * side, : image.shape[2] // side * side]
        cut = whole.unfold(1, side, side).unfold(2, side, side)
        tiles.append(cut.reshape(-1, 1, side, side))
    every = torch.cat(tiles)
    chosen = torch.linspace(0, len(every) - 1, min(limit, len(every))).long()
    return every[chosen]


@functools.lru_cache(maxsize=4)
def photo_pairs(
    side: int, scale: int, limit: int
) -> tuple[Float[Tensor, "n 1 h w"], Float[Tensor, "n 1 side side"]]:
    """(small squares, true squares) of Set5 and Set14, the small images as MATLAB made them; thinned evenly.

    Args:
        side: of the true squares.
        scale: 2 or 4.
        limit: how many at most.
    """
    pairs = []
    for name in ("Set5", "Set14"):
        for small, true in zip(photos(f"{name}/LRx{scale}"), photos(f"{name}/HR"), strict=True):
            inner = side // scale
            rows, columns = (size // inner for size in small.shape[1:])
            for place in range(rows * columns):
                top, left = place // columns, place % columns
                cut = small[:, top * inner :, left * inner :][:, :inner, :inner]
                pairs.append((cut, true[:, top * side :, left * side :][:, :side, :side]))
    chosen = torch.linspace(0, len(pairs) - 1, min(limit, len(pairs))).long().tolist()
    smalls, trues = zip(*(pairs[index] for index in chosen), strict=True)
    return torch.stack(smalls), torch.stack(trues)
