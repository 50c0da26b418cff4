"""The visual hull: what lies inside the masks of posed views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import DataError
from zoo.neural3d.cameras import Camera
from zoo.neural3d.views import View


def pixels_of(camera: Camera, points: Tensor) -> tuple[Tensor, Tensor]:
    """Where the camera sees points [n, 3]: pixel coordinates [n, 2] and depths along its axis [n]."""
    seen = points @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
    flat = seen @ camera.intrinsics.T
    return flat[:, :2] / flat[:, 2:].clamp_min(1e-9), seen[:, 2]


def sampled(image: Tensor, camera: Camera, points: Tensor) -> Tensor:
    """Values [n, c] of a picture [h, w, c] where the camera sees points [n, 3]; zero outside and behind."""
    pixels, depth = pixels_of(camera, points)
    place = pixels / torch.tensor([camera.width, camera.height]) * 2 - 1
    place = torch.where((depth > 0)[:, None], place, 2.0)
    found = functional.grid_sample(
        image.permute(2, 0, 1)[None], place[None, None], mode="bilinear", align_corners=False
    )
    return found[0, :, 0].T


def cube(centre: Tensor, half: float, side: int) -> Tensor:
    """Middles [side^3, 3] of the cells of a cube, x fastest."""
    steps = ((torch.arange(side) + 0.5) / side * 2 - 1) * half
    z, y, x = torch.meshgrid(steps, steps, steps, indexing="ij")
    return torch.stack([x, y, z], -1).reshape(-1, 3) + centre


def visual_hull(views: Sequence[View], points: Tensor, misses: int = 0) -> Tensor:
    """Which points [n, 3] project inside the masks of all views but at most `misses`.

    Raises:
        DataError: no views, a view without a mask or with an empty one, values outside 0..1, fewer than 3
            views for a miss, or an empty hull; names the view that empties it.
    """
    if not views or misses and len(views) < 3:
        raise DataError(f"a hull with {misses} misses needs 3 views; received {len(views)}")
    inside = []
    for view in views:
        mask = view.mask
        if mask is None or not bool((mask > 0.5).any()) or float(mask.min()) < 0 or float(mask.max()) > 1:
            raise DataError(f"view {view.name!r}: a hull needs a mask from 0 to 1 that is not empty")
        inside.append(sampled(mask[..., None], view.camera, points)[:, 0] > 0.5)
    votes = torch.stack(inside)
    found = votes.sum(0) >= len(views) - misses
    if not bool(found.any()):
        most = votes.sum(1)
        worst = views[int(most.argmin())].name
        raise DataError(
            f"the hull is empty: no point is in the masks of all views; {worst!r} holds the fewest "
            f"({int(most.min())} of {len(points)}): check its pose and its mask"
        )
    return found


def shell(inside: Tensor) -> Tensor:
    """The cells of a body [side, side, side] that have an empty neighbour."""
    padded = functional.pad(inside.float()[None, None], (1,) * 6)
    full = -functional.max_pool3d(-padded, 3, 1)[0, 0]
    return inside & (full < 1)
