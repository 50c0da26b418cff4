"""SparseNeRF: few views, and depth of which only the order and the continuity are trusted.

Wang et al., "SparseNeRF: Distilling Depth Ranking for Few-shot Novel View Synthesis", ICCV 2023. Of two
pixels of a view the one that the prior calls nearer shall be rendered nearer; a pixel whose prior is like
that of its neighbour shall be as deep.

Differs from the paper in: the model is a scene of Gaussians, whose rendered depth the losses act on, not
mip-NeRF; depths are in units of the cameras' distance, where the paper has those of NDC; ties and pixels
without a prior are left out (the reference ranks them).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, stated_options
from zoo.neural3d.priors import MOBILITY, expected_depth, given, known_depth, ranking
from zoo.neural3d.refine import RECIPE, picture_loss, refine, views_of
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.views import View, middle_of_views
from zoo.shared.masks import MaskSet
from zoo.shared.train import Job

REACH = 3  # pixels between a pixel and its partner of continuity
BEST = 0.3  # share of that crop, the most alike, from which the partner is drawn


@dataclass
class SparseNeRF:
    """Fit a scene to few views whose depth tells only what is nearer."""

    needs_job: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {**RECIPE, "steps": 300}

    near_is_larger: bool | None = None
    """Whether larger values of the prior are nearer (inverse depth) or farther (depth); must be said."""

    weight: float = 0.5
    """Weight of the depth losses."""

    continuity: float = 0.01
    """Weight of continuity beside ranking (k)."""

    margin: float = 1e-4
    """Margins of both, in units of the cameras' distance."""

    quadruples: int = 512
    """Pairs of pixels a step, each with its partners."""

    box: int = 30
    """Side of the squares from which a pair is drawn, in pixels."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """A scene fitted to the job's views, whose depth is the prior; the one given stays as it is.

        Raises:
            ConfigError: no scene, no views with a prior, an order that was not said, an option out of range.
        """
        scene, job = given(model, job, self)
        if self.near_is_larger is None:
            raise ConfigError("say near_is_larger: whether larger values of the prior are nearer or farther")
        if self.quadruples < 1 or self.box < 2 or min(self.weight, self.continuity, self.margin) < 0:
            raise ConfigError(
                "SparseNeRF needs quadruples >= 1, box >= 2 and weights and margin of 0 or more; received "
                f"{self}"
            )
        fitted = copy.deepcopy(scene)
        _, extent = middle_of_views(views_of(job))
        refine(
            fitted, job.replace(loss=lambda model, view: self.loss(model, view, extent)), mobility=MOBILITY
        )
        return Sparsified(fitted.eval(), MaskSet({}), hyperparameters=stated_options(self, job))

    def loss(self, model: nn.Module, view: View, extent: float) -> Tensor:
        """The picture's loss and those of depth; pixels are drawn with torch's random state."""
        assert isinstance(model, GaussianScene)
        seen = model.render(view.camera)
        depth = self.depth_loss(expected_depth(seen) / extent, known_depth(view))
        return picture_loss(seen.colour, view) + self.weight * depth

    def depth_loss(self, depth: Tensor, prior: Tensor) -> Tensor:
        """Ranking and continuity of a rendered depth [h, w], in units of the cameras' distance."""
        pixels = quadruples(prior, self.quadruples, self.box, bool(self.near_is_larger))
        near, far, near_partner, far_partner = depth.flatten()[pixels].unbind(1)
        total = ranking(near, far, self.margin)
        for one, other in ((near, near_partner), (far, far_partner)):
            total = total + self.continuity * ((one - other).abs() - self.margin).clamp_min(0).mean()
        return total


def quadruples(prior: Tensor, count: int, box: int, near_is_larger: bool) -> Tensor:
    """Pixels [n, 4] as (nearer, farther, partner of the nearer, partner of the farther), n at most `count`.

    Args:
        prior: [h, w], 0 where unknown; only its order counts.
        count: pairs to draw; ties and unknown pixels are then left out.
        box: side of the square in which a pair lies.
        near_is_larger: what the order means.
    """
    height, width = prior.shape
    flat = prior.flatten()
    high, wide = min(box, height), min(box, width)
    corner = torch.stack(
        [torch.randint(height - high + 1, (count,)), torch.randint(width - wide + 1, (count,))], 1
    )
    places = [corner + torch.stack([torch.randint(high, (count,)), torch.randint(wide, (count,))], 1)]
    places += [corner + torch.stack([torch.randint(high, (count,)), torch.randint(wide, (count,))], 1)]
    one, other = (place[:, 0] * width + place[:, 1] for place in places)
    useful = (flat[one] != flat[other]) & (flat[one] != 0) & (flat[other] != 0)
    one, other = one[useful], other[useful]
    first = (flat[one] > flat[other]) == near_is_larger
    near, far = torch.where(first, one, other), torch.where(first, other, one)
    return torch.stack([near, far, _partner(prior, near), _partner(prior, far)], 1)


def _partner(prior: Tensor, pixels: Tensor) -> Tensor:
    """A neighbour of each pixel, one of those whose prior is most like its own."""
    height, width = prior.shape
    steps = torch.arange(-REACH, REACH + 1)
    down, right = torch.meshgrid(steps, steps, indexing="ij")
    rows = (pixels // width)[:, None] + down.flatten()
    columns = (pixels % width)[:, None] + right.flatten()
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    around = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    flat = prior.flatten()
    unlike = (flat[around] - flat[pixels][:, None]).abs()
    usable = inside & (flat[around] != 0) & (around != pixels[:, None])
    unlike = torch.where(usable, unlike, torch.inf)
    most = (BEST * usable.sum(1)).long().clamp_min(1)
    drawn = (torch.rand(len(pixels)) * most).long()
    chosen = unlike.argsort(dim=1, stable=True).gather(1, drawn[:, None])
    found = around.gather(1, chosen)[:, 0]
    return torch.where(usable.any(1), found, pixels)
