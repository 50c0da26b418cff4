"""GaussianObject: an object from four views with masks, begun from their visual hull, floaters removed.

Yang et al., "GaussianObject: High-Quality 3D Object Reconstruction from Four Views with Gaussian
Splatting", SIGGRAPH Asia 2024: stages 1 (hull) and 2 (coarse fit). The repair of renderings by a diffusion
model (stages 3 to 5) is `zoo.neural3d.methods.repair`, with a small model: Stable Diffusion's weights are
not here.

Differs from the paper in: no monocular depth and no densification; the background is the views' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, stated_options
from zoo.neural3d.hull import cube, sampled, visual_hull
from zoo.neural3d.priors import MOBILITY, given
from zoo.neural3d.refine import RECIPE, picture_loss, refine, views_of
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import Splats, from_points
from zoo.neural3d.views import View, middle_of_views
from zoo.shared.masks import MaskSet
from zoo.shared.structure.resize import RowResizer
from zoo.shared.train import Fit, Job

MISSES = 1  # views that a point of the hull may be outside of
LAST = 2.326  # 1 % of a normal distribution lies above


@dataclass
class GaussianObject:
    """Fit Gaussians to a few views of an object, from the hull of its masks."""

    needs_job: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {**RECIPE, "steps": 400}

    hull: bool = True
    """Begin with points of the visual hull, as many as the given scene has Gaussians, rather than with it."""

    floaters: bool = True
    """Drop Gaussians that are far from their neighbours."""

    every: int = 50
    """Steps between two looks at them."""

    mask_weight: float = 0.01
    """Weight of the cross entropy of alpha and mask."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """A scene fitted to the job's views; the one given tells the number of Gaussians.

        Raises:
            ConfigError: no scene, no job of views, an option out of range.
            DataError: a view without a usable mask, or an empty hull.
        """
        scene, job = given(model, job, self, depth=False)
        if self.every < 1 or self.mask_weight < 0:
            raise ConfigError(f"GaussianObject needs every >= 1 and mask_weight >= 0; received {self}")
        views = views_of(job)
        start = hull_points(views, len(scene), scene.sh_degree, job.seed) if self.hull else scene.splats
        fitted = scene.like(start)

        def clean(fit: Fit) -> None:
            if fit.step % self.every == 0 and fit.step < fit.steps:
                limit = 1 + (LAST - 1) * fit.step / fit.steps
                names = [name for name, _ in fitted.named_parameters()]
                RowResizer(fitted, names, [fit.optimizer]).keep(~stray(fitted.means.detach(), limit))

        refine(fitted, job.replace(loss=self.loss), clean if self.floaters else None, mobility=MOBILITY)
        arguments: dict[str, Any] = {"count": len(fitted), "sh_degree": fitted.sh_degree}
        arguments |= {"background": fitted.background.tolist(), "antialiased": fitted.antialiased}
        options = stated_options(self, job)
        return Sparsified(fitted.eval(), MaskSet({}), hyperparameters=options, arguments=arguments)

    def loss(self, model: nn.Module, view: View) -> Tensor:
        """Loss of the picture and of the mask."""
        assert isinstance(model, GaussianScene) and view.mask is not None
        seen = model.render(view.camera)
        alpha = seen.alpha.clamp(1e-4, 1 - 1e-4)
        masked = functional.binary_cross_entropy(alpha, view.mask.clamp(0, 1))
        return picture_loss(seen.colour, view) + self.mask_weight * masked


def hull_points(views: Sequence[View], count: int, sh_degree: int, seed: int, side: int = 64) -> Splats:
    """Gaussians at `count` cells of the hull of the views' masks, with the mean of their colours.

    The hull is sought in a cube of the cameras' distance, then again in twice its bounding box.
    """
    centre, extent = middle_of_views(views)
    points = cube(centre, extent / 2, side)
    for _ in range(2):
        found = points[visual_hull(views, points, MISSES)]
        low, high = found.amin(0), found.amax(0)
        points = cube((low + high) / 2, float((high - low).max()) / 2 * 1.1, side)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]
    chosen = found[order]
    colours = torch.stack([sampled(view.image, view.camera, chosen) for view in views]).mean(0)
    return from_points(chosen, colours, sh_degree)


def stray(means: Tensor, limit: float) -> Tensor:
    """Which points [n, 3] are farther from their neighbours than others.

    Squared distances to the floor(sqrt(n)) nearest, the point itself included; a point strays if the mean of
    its own is `limit` standard deviations above the mean of all.
    """
    near = torch.cdist(means, means).square().topk(max(1, int(len(means) ** 0.5)), largest=False).values
    return near.mean(1) >= near.mean() + limit * near.std()
