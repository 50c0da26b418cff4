"""LM-Gaussian: few views, a noisy cloud of points, and three regularisers of a scene's depth and views.

Yu et al., "LM-Gaussian: Boost Sparse-view 3D Gaussian Splatting with Large Model Priors", 2024, stage 1:
correlation of rendered depth with a prior, agreement of the normals of both, and renderings from between the
views compared with the cloud's. Poses and cloud come with the job and the scene (the paper has them from
DUSt3R); the repair of renderings by diffusion (stage 2) needs weights that are not here.

Differs from the paper in: normals are those of the prior's depth, not of a second estimator; the cloud is
drawn as small opaque Gaussians.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, stated_options
from zoo.neural3d.cameras import Camera, from_world
from zoo.neural3d.priors import MOBILITY, expected_depth, given, known_depth, pearson
from zoo.neural3d.refine import RECIPE, picture_loss, refine, views_of
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.views import View
from zoo.shared.masks import MaskSet
from zoo.shared.train import Job


@dataclass
class LMGaussian:
    """Fit a scene, which begins as a noisy cloud, to few views with depth."""

    needs_job: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {**RECIPE, "steps": 300}

    depth: float = 0.1
    """Weight of the correlation with the prior, over the picture and over boxes of it."""

    normal: float = 0.01
    """Weight of the normals' disagreement."""

    virtual: float = 0.6
    """Weight of renderings from between the views."""

    between: int = 10
    """How many such views there are."""

    box: int = 16
    """Side of the boxes in pixels."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """A scene fitted to the job's views; the one given, the cloud, stays as it is.

        Raises:
            ConfigError: no scene, no views with depth, an option out of range.
        """
        scene, job = given(model, job, self)
        if min(self.depth, self.normal, self.virtual) < 0 or self.box < 2:
            raise ConfigError(
                f"LM-Gaussian needs weights of 0 or more and a box of 2 pixels; received {self}"
            )
        pictures = cloud_pictures(scene, views_of(job), self.between) if self.virtual else []
        fitted = copy.deepcopy(scene)
        refine(
            fitted, job.replace(loss=lambda model, view: self.loss(model, view, pictures)), mobility=MOBILITY
        )
        return Sparsified(fitted.eval(), MaskSet({}), hyperparameters=stated_options(self, job))

    def loss(self, model: nn.Module, view: View, pictures: Sequence[View]) -> Tensor:
        """The picture's loss and the regularisers; boxes and virtual views are drawn with torch's random
        state."""
        assert isinstance(model, GaussianScene)
        seen = model.render(view.camera)
        total = picture_loss(seen.colour, view)
        prior, found = known_depth(view), expected_depth(seen)
        known = (prior > 0) & (seen.alpha.detach() > 0.5)
        if self.depth and int(known.sum()) > 2:
            total = total + self.depth * pearson(found[known], prior[known])
            total = total + self.depth * self._boxes(found, prior, known)
        if self.normal:
            one, other = normals(found, view.camera), normals(prior, view.camera)
            flat = known[:-1, :-1] & known[1:, :-1] & known[:-1, 1:]
            if bool(flat.any()):
                total = total + self.normal * (1 - (one * other).sum(-1)[flat]).mean()
        if pictures:
            other_view = pictures[int(torch.randint(len(pictures), ()))]
            there = model.render(other_view.camera).colour
            total = total + self.virtual * (there - other_view.image).abs().mean()
        return total

    def _boxes(self, found: Tensor, prior: Tensor, known: Tensor) -> Tensor:
        """Mean loss of correlation over boxes that cover half of the picture."""
        height, width = prior.shape
        side = min(self.box, height, width)
        losses = []
        for _ in range(max(1, round(height * width / (2 * side * side)))):
            row = int(torch.randint(height - side + 1, ()))
            column = int(torch.randint(width - side + 1, ()))
            part = (slice(row, row + side), slice(column, column + side))
            inside = known[part]
            if int(inside.sum()) > 2:
                losses.append(pearson(found[part][inside], prior[part][inside]))
        return torch.stack(losses).mean() if losses else found.sum() * 0


def normals(depth: Tensor, camera: Camera) -> Tensor:
    """Unit normals [h - 1, w - 1, 3] of the surface that depth [h, w] along the axis describes."""
    origin, rays = camera.rays()
    points = origin + rays * (depth / (rays @ camera.viewmat[2, :3]))[..., None]
    down, right = points[1:, :-1] - points[:-1, :-1], points[:-1, 1:] - points[:-1, :-1]
    return nn.functional.normalize(torch.linalg.cross(right, down), dim=-1, eps=1e-9)


def between(one: Camera, other: Camera, share: float) -> Camera:
    """A camera on the way from one to another: the place in a straight line, the turn by the nearest rotation
    of the mean."""
    place = one.centre + share * (other.centre - one.centre)
    mixed = (1 - share) * one.to_world[:3, :3] + share * other.to_world[:3, :3]
    left, _, right = torch.linalg.svd(mixed)
    turn = left @ torch.diag(torch.tensor([1.0, 1.0, float(torch.det(left @ right))])) @ right
    world = torch.eye(4)
    world[:3, :3], world[:3, 3] = turn, place
    return from_world(world, one.intrinsics, one.width, one.height)


def cloud_pictures(scene: GaussianScene, views: Sequence[View], count: int) -> list[View]:
    """What cameras between neighbouring views see of the scene's points, drawn small and opaque.

    Raises:
        ConfigError: fewer than two views, no pictures asked for, or none that sees a point.
    """
    if len(views) < 2 or count < 1:
        raise ConfigError(f"virtual views lie between two views; received {len(views)} views, {count} wanted")
    cloud = copy.deepcopy(scene)
    with torch.no_grad():
        cloud.opacities.fill_(6.0)
        found = []
        for number in range(count):
            at = (number + 0.5) / count * (len(views) - 1)
            first = int(at)
            camera = between(views[first].camera, views[first + 1].camera, at - first)
            seen = cloud.render(camera)
            if float(seen.alpha.max()) > 0.5:
                found.append(View(camera, seen.colour, name=f"virtual {number}"))
    if not found:
        raise ConfigError("no virtual view sees a point of the cloud: the views do not look at it")
    return found
