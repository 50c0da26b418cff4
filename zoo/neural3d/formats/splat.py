""".splat (antimatter15): 32 bytes a Gaussian, no header, no harmonics."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch

from zoo.errors import DataError
from zoo.neural3d.splats import SH_C0, Splats, logits

_ROW = numpy.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("colour", "u1", 4), ("quat", "u1", 4)])


def read(path: Path) -> Splats:
    """A scene from a .splat file: floats for position and scale, bytes for colour, opacity and rotation.

    Raises:
        DataError: no whole number of rows, or a scale that is not positive (with the byte).
    """
    data = path.read_bytes()
    if len(data) % _ROW.itemsize:
        last = len(data) // _ROW.itemsize * _ROW.itemsize
        raise DataError(f"{path}: the row at byte {last} has {len(data) - last} of {_ROW.itemsize} bytes")
    table = numpy.frombuffer(data, _ROW)
    wrong = numpy.flatnonzero(~(table["scale"] >= 0).all(1))
    if len(wrong):
        raise DataError(
            f"{path}: the scale at byte {wrong[0] * _ROW.itemsize + 12} is below zero or no number"
        )
    colour = torch.from_numpy(table["colour"] / 255)
    return Splats(
        torch.from_numpy(table["mean"].copy()),
        torch.from_numpy((table["quat"].astype(numpy.float32) - 128) / 128),
        torch.from_numpy(numpy.log(numpy.maximum(table["scale"], 1e-12))),
        logits(colour[:, 3]),
        ((colour[:, None, :3] - 0.5) / SH_C0).float(),
    )
