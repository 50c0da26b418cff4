"""Depth that is known only up to scale, shift or order: losses against it, and the views that it comes
with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.methods.contract import required
from zoo.neural3d.refine import views_of
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import from_points
from zoo.neural3d.views import View, Views
from zoo.shared.ops.rasterize import Rendering
from zoo.shared.train import Job

NOISE = 0.03  # deviation of a noisy cloud's points, in units of their mean depth
MOBILITY = 10.0  # of scenes fitted to few views, see `refine`


def given(model: object, job: Job | None, method: object, *, depth: bool = True) -> tuple[GaussianScene, Job]:
    """What a method of few views starts from: a scene and a job of views, checked.

    Raises:
        ConfigError: no scene of Gaussians, no job of views, a view without depth.
    """
    name = type(method).__name__
    if not isinstance(model, GaussianScene):
        raise ConfigError(f"{name} takes a scene of Gaussians to start from; received {type(model).__name__}")
    job = required(job, method)
    for view in views_of(job) if depth else []:
        known_depth(view)
    return model, job


def known_depth(view: View) -> Tensor:
    """The view's depth [h, w], positive where it is known and 0 elsewhere.

    Raises:
        ConfigError: there is none, a value that is negative or not finite, or the same one everywhere.
    """
    depth = view.depth
    if depth is None:
        raise ConfigError(f"view {view.name!r} has no depth to learn from")
    known = depth[depth != 0]
    if not bool(known.isfinite().all()) or bool((known < 0).any()):
        raise ConfigError(
            f"view {view.name!r}: depth below zero or not finite; set it to 0 where it is unknown"
        )
    if not len(known) or bool((known == known[0]).all()):
        raise ConfigError(f"view {view.name!r}: depth that is the same everywhere tells nothing")
    return depth


def expected_depth(seen: Rendering) -> Tensor:
    """Mean depth [h, w] of what a rendering shows."""
    return seen.depth / seen.alpha.clamp_min(1e-3)


def pearson(found: Tensor, wanted: Tensor) -> Tensor:
    """1 less the correlation of two lists of values [n] (LM-Gaussian); 1 where one of them is constant."""
    one, other = found - found.mean(), wanted - wanted.mean()
    return 1 - (one * other).mean() / (one.std(correction=0) * other.std(correction=0) + 1e-6)


def ranking(near: Tensor, far: Tensor, margin: float) -> Tensor:
    """Mean excess of depths [n] that should be the nearer ones over their partners (SparseNeRF)."""
    return (near - far + margin).clamp_min(0).mean()


def back_projected(view: View) -> tuple[Tensor, Tensor]:
    """Points [n, 3] of the pixels whose depth is known, and their colours [n, 3]."""
    depth = known_depth(view)
    origin, rays = view.camera.rays()
    along = depth / (rays @ view.camera.viewmat[2, :3])
    return (origin + rays * along[..., None])[depth > 0], view.image[depth > 0]


def with_depth(view: View, depth: Tensor) -> View:
    """A view with another depth; unknown stays unknown."""
    assert view.depth is not None
    return dataclasses.replace(view, depth=torch.where(view.depth > 0, depth, 0.0))


def monotone(views: Sequence[View], seed: int) -> list[View]:
    """The views with depth of another, wrong scale of which the order is right but for noise of 5 %."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for view in views:
        assert view.depth is not None
        power, scale = (0.5 + torch.rand(2, generator=generator)).tolist()
        noise = 1 + 0.05 * torch.randn(view.depth.shape, generator=generator)
        found.append(with_depth(view, scale * (view.depth.clamp_min(1e-6) * noise.clamp_min(0.1)) ** power))
    return found


def affine(views: Sequence[View], seed: int) -> list[View]:
    """The views with depth scaled by up to 20 % and shifted by up to a tenth of its mean, by view."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for view in views:
        assert view.depth is not None
        scale, shift = (2 * torch.rand(2, generator=generator) - 1).tolist()
        mean = float(view.depth[view.depth > 0].mean())
        found.append(with_depth(view, (1 + 0.2 * scale) * view.depth + 0.1 * shift * mean))
    return found


def scattered(views: Views, count: int, seed: int) -> GaussianScene:
    """Gaussians on random rays of the training views at random depths within the range of all, with the
    colours of their pixels: what is known without depth."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.cat([view.depth[view.depth > 0] for view in views.train if view.depth is not None])
    low, high = known.quantile(torch.tensor([0.02, 0.98])).tolist()
    blind = [
        with_depth(view, low + (high - low) * torch.rand(view.image.shape[:2], generator=generator))
        for view in views.train
    ]
    return cloud(blind, count, seed, views.background)


def cloud(
    views: Sequence[View], count: int, seed: int, background: tuple[float, float, float]
) -> GaussianScene:
    """Gaussians at `count` of the points that the views' depths give."""
    parts = [back_projected(view) for view in views]
    points, colours = (torch.cat(values) for values in zip(*parts, strict=True))
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:count]
    return GaussianScene.from_splats(from_points(points[order], colours[order], 0), background)


def noisy_cloud(
    views: Sequence[View], count: int, seed: int, background: tuple[float, float, float]
) -> GaussianScene:
    """The same cloud with its points moved by `NOISE` of their mean depth, as structure from few pictures
    is."""
    scene, generator = cloud(views, count, seed, background), torch.Generator().manual_seed(seed)
    known = torch.cat([view.depth[view.depth > 0] for view in views if view.depth is not None])
    with torch.no_grad():
        noise = torch.randn(scene.means.shape, generator=generator)
        scene.means.add_(NOISE * float(known.mean()) * noise)
    return scene
