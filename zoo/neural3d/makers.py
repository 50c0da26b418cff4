"""Makers of recipe rows (`zoo make`) that are particular to scenes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified
from zoo.neural3d.refine import refine, scene_job
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import SH_C0, Splats
from zoo.neural3d.views import Views, load_views
from zoo.shared.masks import MaskSet


def from_points(points: Tensor, colours: Tensor, sh_degree: int) -> Splats:
    """Round Gaussians at points [n, 3], as wide as the mean distance to the three nearest others (3DGS)."""
    distance = torch.cdist(points, points)
    distance.fill_diagonal_(torch.inf)
    near = distance.topk(min(3, len(points) - 1), largest=False).values.mean(1).clamp_min(1e-6)
    n = len(points)
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(n, 1)
    opacities = torch.full((n,), 0.1).logit()
    splats = Splats(
        points, quats, near.log()[:, None].repeat(1, 3), opacities, (colours[:, None] - 0.5) / SH_C0
    )
    return splats.with_degree(sh_degree)


def start_of(views: Views, count: int, sh_degree: int, seed: int) -> GaussianScene:
    """A scene to train: `count` of the points of the surface, or, without any, of a cube round the centre."""
    generator = torch.Generator().manual_seed(seed)
    if views.points is not None and views.colours is not None:
        rows = torch.randperm(len(views.points), generator=generator)[:count]
        points, colours = views.points[rows], views.colours[rows]
    else:
        points = views.centre + (torch.rand(count, 3, generator=generator) - 0.5) * 0.6 * views.extent
        colours = torch.rand(count, 3, generator=generator)
    if len(points) < count:
        raise ConfigError(f"{views.name} has {len(points)} points to start from; received count {count}")
    return GaussianScene.from_splats(from_points(points, colours, sh_degree), views.background)


def gaussians(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A scene fitted to the row's views, of as many Gaussians as its architecture says."""
    views = load_views(str(row.dataset))
    scene = start_of(views, row.arguments["count"], row.arguments.get("sh_degree", 0), seed)
    refine(scene, scene_job(views.train, seed=seed, **row.recipe))
    return Sparsified(scene.eval(), MaskSet({}))
