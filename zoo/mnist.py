"""MNIST of $ZOO_DATA (`mnist/`): the four IDX files of LeCun, Cortes and Burges, checked."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from zoo.errors import DataError, MissingDataError


def read_mnist(part: str) -> tuple[UInt8[np.ndarray, "n 28 28"], Int[np.ndarray, " n"]]:
    """The images and labels of a part, "train" or "t10k", in the order of the files.

    Raises:
        DataError: ZOO_DATA is not set, or its files are missing, damaged or of different lengths.
    """
    root = os.environ.get("ZOO_DATA")
    folder = Path(root) / "mnist" if root else None
    if folder is None or not folder.is_dir():
        raise MissingDataError(
            f"MNIST is not at {folder or '$ZOO_DATA/mnist'}. Set ZOO_DATA to the folder with mnist/."
        )
    images = _idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
    labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images and {len(labels)} labels of {part}")
    return images.copy(), labels.astype(np.int64)


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file (LeCun's format: a magic number, the sizes, the values)."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    head = np.frombuffer(content[:start].ljust(start, b"\0"), ">u4")
    shape = tuple(int(size) for size in head[1:])
    if head[0] != 0x800 + dimensions or len(content) != start + np.prod(shape):
        raise DataError(f"{path} is not an IDX file of {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
