"""Which Gaussians a scene can do without: scores, of which the largest are kept.

The sum of a Gaussian's weights over the pixels of a view is the gradient of a picture of ones with respect to
one more value per Gaussian: a backward pass tells it for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from zoo.errors import ConfigError
from zoo.neural3d.cameras import Camera, orbit
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import Splats

Score = Callable[[GaussianScene, Sequence[Camera], int], Tensor]


def contributions(scene: GaussianScene, camera: Camera) -> Float[Tensor, " n"]:
    """Sum over the view's pixels of the weight with which each Gaussian is blended."""
    marks = torch.ones(len(scene), 1, requires_grad=True)
    with torch.enable_grad():
        seen = scene.render(camera, features=marks, sh_degree=0).features
        assert seen is not None
        (found,) = torch.autograd.grad(seen.sum(), marks)
    weights: Tensor = found[:, 0]
    return weights


def _some(cameras: Sequence[Camera]) -> Sequence[Camera]:
    if not cameras:
        raise ConfigError("this score looks at the scene and received no view; opacity-volume needs none")
    return cameras


def most_in_a_view(scene: GaussianScene, cameras: Sequence[Camera], seed: int) -> Float[Tensor, " n"]:
    """The contribution in the view where it is largest: nothing is lost that matters somewhere."""
    return torch.stack([contributions(scene, camera) for camera in _some(cameras)]).amax(0)


def over_views(scene: GaussianScene, cameras: Sequence[Camera], seed: int) -> Float[Tensor, " n"]:
    """The contribution summed over the views (LightGaussian's without its volume, Fan et al. 2024)."""
    return torch.stack([contributions(scene, camera) for camera in _some(cameras)]).sum(0)


def removal_error(scene: GaussianScene, cameras: Sequence[Camera], seed: int) -> Float[Tensor, " n"]:
    """The squared error that the pictures would have without each Gaussian alone, estimated.

    A picture is linear in each alpha, so that without Gaussian i a pixel would change by alpha_i dC /
    dalpha_i. The square of its product with random signs, one a pixel and colour, has the sum of the squares
    as its mean (Hutchinson's estimate): one backward pass a view.
    """
    generator, total = torch.Generator().manual_seed(seed), torch.zeros(len(scene))
    left = (1 - scene.opacities.detach().sigmoid()).clamp_min(1e-6)  # alpha d/dalpha = d/dlogit / (1 - alpha)
    for camera in _some(cameras):
        with torch.enable_grad():
            colour = scene.render(camera).colour
            signs = torch.randint(0, 2, colour.shape, generator=generator).to(colour) * 2 - 1
            (slope,) = torch.autograd.grad((colour * signs).sum(), scene.opacities)
        total += (slope / left).square()
    return total


def opacity(scene: GaussianScene, cameras: Sequence[Camera], seed: int) -> Float[Tensor, " n"]:
    """The opacity alone."""
    return scene.opacities.detach().sigmoid()


def opacity_volume(scene: GaussianScene, cameras: Sequence[Camera], seed: int) -> Float[Tensor, " n"]:
    """Opacity times volume^0.1, which needs no view."""
    return scene.opacities.detach().sigmoid() * (0.1 * scene.scales.detach().sum(1)).exp()


def chance(scene: GaussianScene, cameras: Sequence[Camera], seed: int) -> Float[Tensor, " n"]:
    """A random number, to compare with."""
    return torch.rand(len(scene), generator=torch.Generator().manual_seed(seed))


SCORES: dict[str, Score] = {
    "removal-error": removal_error,
    "max-contribution": most_in_a_view,
    "contribution": over_views,
    "opacity-volume": opacity_volume,
    "opacity": opacity,
    "random": chance,
}


def kept_rows(scores: Float[Tensor, " n"], keep: float) -> Bool[Tensor, " n"]:
    """Exactly round(keep * n) Gaussians, those of the largest scores; of equals those that come first.

    Raises:
        ConfigError: a share outside (0, 1], or one that keeps none.
    """
    count = round(keep * len(scores))
    if not 0 < keep <= 1 or count < 1:
        raise ConfigError(
            f"keep must be above 0, at most 1, and leave one of {len(scores)} Gaussians; received {keep}"
        )
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:count]] = True
    return mask


def pruned(
    scene: GaussianScene,
    score: Score,
    keep: float,
    cameras: Sequence[Camera],
    *,
    rounds: int = 1,
    seed: int = 0,
) -> Bool[Tensor, " n"]:
    """Which Gaussians stay of a scene, exactly round(keep * n).

    Args:
        rounds: how often the rest is scored again; what one round drops makes others matter more. Each keeps
            the same share.
    """
    rows = torch.arange(len(scene))
    for number in range(1, rounds + 1):
        wanted = max(round(keep ** (number / rounds) * len(scene)), round(keep * len(scene)))
        rest = scene.like(scene.splats.rows(rows))
        rows = rows[kept_rows(score(rest, cameras, seed + number), wanted / len(rows))]
    mask = torch.zeros(len(scene), dtype=torch.bool)
    mask[rows] = True
    return mask


def middle_of(splats: Splats) -> tuple[Tensor, float]:
    """The median position, and the distance within which 98 of 100 Gaussians (by opacity) lie."""
    centre = splats.means.median(0).values
    distance, order = (splats.means - centre).norm(dim=1).sort()
    weight = splats.opacities.sigmoid()[order].cumsum(0)
    last = int(torch.searchsorted(weight, 0.98 * weight[-1]))
    return centre, max(float(distance[min(last, len(distance) - 1)]), 1e-6)


def cameras_around(splats: Splats, count: int, size: int, *, held_out: bool = False) -> list[Camera]:
    """Cameras round a scene whose own are unknown; `held_out` ones stand between the others."""
    centre, reach = middle_of(splats)
    start = math.pi / count if held_out else 0.0
    heights = (0.15, 0.6) if held_out else (0.0, 0.35, 0.8)
    return orbit(centre, 2.6 * reach, count, (size, size), elevations=heights, start=start)
