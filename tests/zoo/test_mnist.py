"""MNIST's files: what is damaged is named, whichever domain asks."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from zoo.errors import DataError
from zoo.mnist import read_mnist


def write(folder: Path, images: bytes, labels: bytes) -> None:
    folder.mkdir(exist_ok=True)
    for name, head, body in (
        ("images-idx3", np.array([0x803, len(images) // 784, 28, 28], ">u4"), images),
        ("labels-idx1", np.array([0x801, len(labels)], ">u4"), labels),
    ):
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head.tobytes() + body))


def test_images_and_labels_come_in_the_order_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    write(tmp_path / "mnist", bytes([7]) * 784 + bytes([9]) * 784, bytes([3, 5]))
    images, labels = read_mnist("train")
    assert images.shape == (2, 28, 28) and images[:, 0, 0].tolist() == [7, 9] and labels.tolist() == [3, 5]


def test_damaged_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    with pytest.raises(DataError, match="Set ZOO_DATA"):
        read_mnist("train")
    write(tmp_path / "mnist", bytes(784), bytes([3, 5]))
    with pytest.raises(DataError, match="1 images and 2 labels"):
        read_mnist("train")
    file = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read_mnist("train")
    file.write_bytes(gzip.compress(b"no header"))
    with pytest.raises(DataError, match="not an IDX file"):
        read_mnist("train")
