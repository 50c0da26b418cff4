"""Pinhole cameras: where they stand, what they see, and the conventions that files write them in.

A camera here is OpenCV's (x right, y down, z forward); `from_opengl` takes what NeRF, Blender and nerfstudio
write (x right, y up, z backward). The centre of the first pixel is at (0.5, 0.5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import DataError

Up = tuple[float | int, float | int, float | int]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Attributes:
        viewmat: [4, 4], world to camera, OpenCV axes.
        intrinsics: [3, 3] K in pixels.
        width, height: of the image.
    """

    viewmat: Tensor
    intrinsics: Tensor
    width: int
    height: int

    def __post_init__(self) -> None:
        turn = self.viewmat[:3, :3].double()
        if self.viewmat.shape != (4, 4) or self.intrinsics.shape != (3, 3):
            raise DataError(
                f"a camera has a viewmat [4, 4] and a K [3, 3]; received {tuple(self.viewmat.shape)} and "
                f"{tuple(self.intrinsics.shape)}"
            )
        if not torch.allclose(turn @ turn.T, torch.eye(3, dtype=torch.float64), atol=1e-3) or turn.det() < 0:
            raise DataError(
                f"a camera that mirrors or scales (determinant {float(turn.det()):.3g}): its convention is "
                "another one than was said"
            )
        k = self.intrinsics
        if (
            not (k[0, 0] > 0 and k[1, 1] > 0)
            or not bool(k.isfinite().all())
            or min(self.width, self.height) < 1
        ):
            raise DataError(f"a camera needs positive focal lengths and a size; received {k.tolist()}")

    @property
    def centre(self) -> Tensor:
        """[3], where it stands."""
        return -self.viewmat[:3, :3].T @ self.viewmat[:3, 3]

    @property
    def to_world(self) -> Tensor:
        """[4, 4], camera to world, OpenCV axes."""
        out = torch.eye(4, dtype=self.viewmat.dtype)
        out[:3, :3], out[:3, 3] = self.viewmat[:3, :3].T, self.centre
        return out

    def resized(self, width: int, height: int) -> Camera:
        """The same view in another number of pixels."""
        scale = torch.tensor(
            [[width / self.width], [height / self.height], [1.0]], dtype=self.intrinsics.dtype
        )
        return Camera(self.viewmat, self.intrinsics * scale, width, height)

    def rays(self) -> tuple[Tensor, Tensor]:
        """Origin [3] and unit directions [height, width, 3] in the world, through the pixels' centres."""
        k = self.intrinsics
        y, x = torch.meshgrid(
            (torch.arange(self.height) + 0.5 - k[1, 2]) / k[1, 1],
            (torch.arange(self.width) + 0.5 - k[0, 2]) / k[0, 0],
            indexing="ij",
        )
        ahead = torch.stack([x, y, torch.ones_like(x)], -1).to(self.viewmat.dtype) @ self.viewmat[:3, :3]
        return self.centre, ahead / ahead.norm(dim=-1, keepdim=True)


def from_world(to_world: Tensor, intrinsics: Tensor, width: int, height: int) -> Camera:
    """The camera of a camera-to-world matrix [4, 4] (or [3, 4]) with OpenCV axes."""
    turn = to_world[:3, :3].T
    viewmat = torch.eye(4, dtype=torch.float32)
    viewmat[:3, :3], viewmat[:3, 3] = turn, -turn @ to_world[:3, 3]
    return Camera(viewmat, intrinsics.float(), width, height)


def from_opengl(to_world: Tensor, intrinsics: Tensor, width: int, height: int) -> Camera:
    """The camera of a camera-to-world matrix [4, 4] with OpenGL axes (those of transforms.json)."""
    flip = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=to_world.dtype)
    return from_world(to_world * flip, intrinsics, width, height)


def lens(width: int, height: int, field_of_view: float) -> Tensor:
    """K [3, 3] with the given horizontal field of view in radians, the principal point at the middle."""
    focal = width / 2 / math.tan(field_of_view / 2)
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def look_at(eye: Tensor, target: Tensor, intrinsics: Tensor, width: int, height: int, up: Up) -> Camera:
    """A camera at `eye` [3] that looks at `target` [3]; `up` is the world's upward direction.

    Raises:
        DataError: `up` is along the view, or eye and target are one point.
    """
    ahead = (target - eye).double()
    right = torch.linalg.cross(ahead, torch.tensor(up, dtype=torch.float64))
    if float(right.norm()) < 1e-9 * max(1.0, float(ahead.norm())):
        raise DataError(f"no camera at {eye.tolist()} looks at {target.tolist()} with {up} upward")
    ahead, right = ahead / ahead.norm(), right / right.norm()
    to_world = torch.eye(4, dtype=torch.float64)
    to_world[:3, :3] = torch.stack([right, torch.linalg.cross(ahead, right), ahead], 1)
    to_world[:3, 3] = eye
    return from_world(to_world.float(), intrinsics, width, height)


def orbit(
    centre: Tensor,
    radius: float,
    count: int,
    size: tuple[int, int],
    *,
    field_of_view: float = 0.8,
    elevations: tuple[float, ...] = (0.35,),
    up: Up = (0.0, -1.0, 0.0),
    start: float = 0.0,
) -> list[Camera]:
    """`count` cameras round `centre` at `radius`, evenly spaced, that look at it.

    Args:
        size: width and height.
        elevations: angles above the horizon in radians, taken in turn.
        up: the world's upward direction, along an axis.
        start: azimuth of the first, in radians.
    """
    above = torch.tensor(up)
    axis = int(above.abs().argmax())
    first, second = torch.eye(3)[(axis + 1) % 3], torch.eye(3)[(axis + 2) % 3]
    cameras = []
    for number in range(count):
        azimuth, height = start + 2 * math.pi * number / count, elevations[number % len(elevations)]
        around = first * math.cos(azimuth) + second * math.sin(azimuth)
        eye = centre + radius * (around * math.cos(height) + above / above.norm() * math.sin(height))
        cameras.append(look_at(eye, centre, lens(*size, field_of_view), *size, up))
    return cameras
