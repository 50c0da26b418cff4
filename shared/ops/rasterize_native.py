"""Calls of the native rasteriser: tensors to addresses (native/src/rasterize_*.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native

# The first three as in native/include/zoo/gaussians.hpp.
DONE, NOT_FINITE, NO_ROTATION, TOO_MANY = range(4)
TILE = 8
MOMENTS = 6
SPLAT_FLOATS = 16
COVER_BYTES = 16


class Scene(NamedTuple):
    """Gaussians, and what is blended of each besides its depth."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    sh: Tensor | None
    values: Tensor
    shift: Tensor | None


class Camera(NamedTuple):
    """A pinhole camera and the rules of its projection."""

    viewmat: Tensor
    intrinsics: Tensor
    width: int
    height: int
    near: float
    far: float
    eps2d: float
    antialiased: bool

    def packed(self) -> View:
        """`View` of rasterize_project.cpp."""
        (a, b, c, x), (d, e, f, y), (g, h, i, z) = self.viewmat.tolist()[:3]
        k = self.intrinsics.tolist()
        centre = (-(a * x + d * y + g * z), -(b * x + e * y + h * z), -(c * x + f * y + i * z))
        turn = (a, b, c, d, e, f, g, h, i, x, y, z)
        lens = (k[0][0], k[1][1], k[0][2], k[1][2], self.near, self.far, self.eps2d)
        return (ctypes.c_double * 22)(*turn, *lens, *centre)


Drawn = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # image, records, tiles, pointer, entries
View = ctypes.Array[ctypes.c_double]
# Gradients for the channels of an image, alpha last: each for so many of them, [height, width, channels] or
# [height, width], with any strides; None where they are zero.
Flows = Sequence[tuple[Tensor | None, int]]


def tile_count(width: int, height: int) -> int:
    """Tiles of an image."""
    return -(-width // TILE) * -(-height // TILE)


def record_floats(channels: int) -> int:
    """Floats of the record of a Gaussian with so many channels."""
    return SPLAT_FLOATS + -(-channels // 4) * 4


def _sizes(*numbers: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _plain(scene: Scene) -> Scene:
    return Scene(*(None if tensor is None else tensor.contiguous() for tensor in scene))  # type: ignore[arg-type]


def _addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _scene_sizes(scene: Scene, camera: Camera) -> ctypes.Array[ctypes.c_int64]:
    bases = 0 if scene.sh is None else scene.sh.shape[1]
    n, channels = scene.values.shape
    return _sizes(n, bases, channels, camera.width, camera.height, int(camera.antialiased))


def _channels(scene: Scene) -> int:
    return (0 if scene.sh is None else 3) + scene.values.shape[1] + 1


def forward(scene: Scene, camera: Camera, view: View, most_pairs: int) -> tuple[int, int, Drawn]:
    """Draw float32 Gaussians: outcome, the culprit's row or the number of pairs, and what was drawn.

    `view` is `camera.packed()`.
    """
    scene = _plain(scene)
    count, channels, threads = scene.means.shape[0], _channels(scene), _native.threads()
    result = (ctypes.c_int64 * 3)()
    records = torch.empty(count, record_floats(channels))
    tiles = torch.empty(count, dtype=torch.int32)
    depths = torch.empty(count, dtype=torch.float64)
    covers = torch.empty(count, COVER_BYTES, dtype=torch.uint8)
    _native.function("zoo_rasterize_project", "p" * 14 + "i")(
        *_addresses(scene),
        view,
        _scene_sizes(scene, camera),
        records.data_ptr(),
        depths.data_ptr(),
        tiles.data_ptr(),
        covers.data_ptr(),
        result,
        threads,
    )
    status, row, pairs = result
    if pairs > most_pairs:
        status, row = TOO_MANY, pairs
    fine = status == DONE  # of what is refused no memory is asked for
    image = torch.empty(channels + 1, camera.height if fine else 0, camera.width)
    pointer = torch.empty(tile_count(camera.width, camera.height) + 1 if fine else 0, dtype=torch.int64)
    entries = torch.empty(pairs if fine else 0, 2, dtype=torch.int32)
    if fine:
        _native.function("zoo_rasterize_draw", "p" * 8 + "i")(
            records.data_ptr(),
            depths.data_ptr(),
            tiles.data_ptr(),
            covers.data_ptr(),
            _sizes(count, camera.width, camera.height, channels),
            pointer.data_ptr(),
            entries.data_ptr(),
            image.data_ptr(),
            threads,
        )
    return status, row, (image, records, tiles, pointer, entries)


def backward(
    scene: Scene, camera: Camera, view: View, drawn: Drawn, flows: Flows
) -> tuple[Tensor | None, ...]:
    """Gradients of a drawn image for the tensors of the scene, None where it has none."""
    image, records, tiles, pointer, entries = drawn
    scene = _plain(scene)
    count, channels, threads = scene.means.shape[0], _channels(scene), _native.threads()
    partial = torch.empty(entries.shape[0], MOMENTS + channels)
    places: list[int] = []
    for flow, planes in flows:
        address, strides = (0, (0, 0)) if flow is None else (flow.data_ptr(), flow.stride())
        places += [address, planes, *strides, 0][:5]
    _native.function("zoo_rasterize_trace", "p" * 6 + "ipi")(
        records.data_ptr(),
        _sizes(count, camera.width, camera.height, channels),
        pointer.data_ptr(),
        entries.data_ptr(),
        image.data_ptr(),
        _sizes(*places),
        len(flows),
        partial.data_ptr(),
        threads,
    )
    grads = [None if tensor is None else torch.empty(tensor.shape) for tensor in scene]
    _native.function("zoo_rasterize_pull_back", "p" * 18 + "i")(
        *_addresses(scene),
        view,
        _scene_sizes(scene, camera),
        tiles.data_ptr(),
        partial.data_ptr(),
        *_addresses(grads),
        threads,
    )
    return tuple(grads)
