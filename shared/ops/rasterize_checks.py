"""What `rasterize` refuses, and why."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OpError
from . import rasterize_native
from .rasterize_reference import SH_BASES


def check_arguments(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmat: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
) -> None:
    """Refuse shapes, dtypes and devices that do not fit, and cameras that are none."""
    n, dtype, device = len(means), means.dtype, means.device
    given = (
        ("means", means, (n, 3)),
        ("quats", quats, (n, 4)),
        ("scales", scales, (n, 3)),
        ("opacities", opacities, (n,)),
        ("viewmat", viewmat, (4, 4)),
        ("intrinsics", intrinsics, (3, 3)),
    )
    for name, tensor, wanted in given:
        if tensor.shape != wanted or not tensor.is_floating_point():
            raise OpError(
                f"{name} must be {wanted} and floating-point. "
                f"Received: {tuple(tensor.shape)}, {tensor.dtype}."
            )
        if tensor.dtype != dtype or tensor.device != device:
            raise OpError(
                f"{name} must be {means.dtype} on {means.device}, as means are. "
                f"Received: {tensor.dtype} on {tensor.device}."
            )
    if width < 1 or height < 1 or width * height >= 2**31:
        raise OpError(f"an image has at least one pixel and fewer than 2^31. Received: {width} x {height}.")
    _check_camera(viewmat, intrinsics)


def check_options(near: float, far: float, eps2d: float) -> None:
    """Refuse depths behind the camera and a blur that is none."""
    if not 0 <= near < far:
        raise OpError(f"depths are seen from near >= 0 to far > near. Received: near {near}, far {far}.")
    if not 0 <= eps2d <= 1e9:
        raise OpError(f"eps2d is a variance of 0 to 1e9 square pixels. Received: {eps2d}.")


def _check_camera(viewmat: Tensor, intrinsics: Tensor) -> None:
    rows, k = viewmat.detach().tolist(), intrinsics.detach().tolist()
    (a, b, c), (d, e, f), (g, h, i) = (row[:3] for row in rows[:3])
    det = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    if det < 0:
        raise OpError(
            f"viewmat mirrors the world (determinant {det:.3g}): negate one axis of its rotation; OpenGL to "
            "OpenCV negates columns 1 and 2 of the camera-to-world rotation"
        )
    dots = [a * a + b * b + c * c, d * d + e * e + f * f, g * g + h * h + i * i]
    dots += [a * d + b * e + c * f, a * g + b * h + c * i, d * g + e * h + f * i]
    turns = all(abs(dot - ideal) < 1e-3 for dot, ideal in zip(dots, (1, 1, 1, 0, 0, 0), strict=True))
    if not turns or rows[3] != [0, 0, 0, 1] or not all(abs(row[3]) < float("inf") for row in rows[:3]):
        raise OpError(
            "viewmat must be a rotation and a finite translation above the row 0 0 0 1; scale the scene "
            f"instead. Received: {rows}."
        )
    fine = k[0][0] > 0 and k[1][1] > 0 and k[2] == [0, 0, 1] and k[0][1] == k[1][0] == 0
    if not fine or not all(abs(value) < float("inf") for row in k for value in row):
        raise OpError(
            "intrinsics must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with positive focal lengths. "
            f"Received: {k}."
        )


def split_channels(
    means: Tensor, colours: Tensor, sh_degree: int | None, features: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Harmonics in use, if any, and all other values per Gaussian."""
    for name, tensor, dims in (
        ("colours", colours, 2 if sh_degree is None else 3),
        ("features", features, 2),
    ):
        if tensor is None:
            continue
        if tensor.ndim != dims or len(tensor) != len(means) or tensor.dtype != means.dtype:
            shape = "[n, bases, 3] with sh_degree" if dims == 3 else "[n, channels]"
            raise OpError(
                f"{name} must be {shape}, n = {len(means)}, of {means.dtype}. "
                f"Received: {tuple(tensor.shape)}, {tensor.dtype}."
            )
    if sh_degree is None:
        return None, colours if features is None else torch.cat([colours, features], 1)
    if not 0 <= sh_degree <= 4 or colours.shape[1] < SH_BASES[sh_degree] or colours.shape[2] != 3:
        raise OpError(
            f"sh_degree {sh_degree} needs colours [n, {SH_BASES[min(max(sh_degree, 0), 4)]} or more, 3] and "
            f"a degree from 0 to 4. Received: {tuple(colours.shape)}."
        )
    return colours[:, : SH_BASES[sh_degree]], means.new_empty(len(means), 0) if features is None else features


def check_values(named: dict[str, Tensor | None]) -> None:
    """Refuse Gaussians that are not finite or have no rotation."""
    for name, tensor in named.items():
        if tensor is None:
            continue
        wrong = tensor.detach().isfinite().logical_not()
        if bool(wrong.any()):
            raise refusal(rasterize_native.NOT_FINITE, int(wrong.nonzero()[0, 0]), name)
    quats = named["quats"]
    assert quats is not None
    empty = (quats.detach() == 0).all(1)
    if bool(empty.any()):
        raise refusal(rasterize_native.NO_ROTATION, int(empty.nonzero()[0, 0]))


def refusal(status: int, row: int, name: str = "it") -> OpError:
    """The error for a Gaussian that cannot be drawn."""
    if status == rasterize_native.NO_ROTATION:
        return OpError(f"Gaussian {row}: its quaternion has length zero. Set it to 1, 0, 0, 0 or drop it.")
    return OpError(
        f"Gaussian {row}: {name} has a NaN or infinite value. Drop the row, or lower the learning rate."
    )


def too_many(pairs: int, of: str, count: int, width: int, height: int, most: int) -> OpError:
    """The error for a list that would not fit."""
    return OpError(
        f"{count} Gaussians at {width} x {height} make {pairs} pairs with {of}, the most is {most}: render "
        "the image in strips (move the principal point), at a lower resolution, or drop large Gaussians"
    )
