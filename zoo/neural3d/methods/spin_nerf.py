"""SPIn-NeRF: an object taken out of posed pictures, and what is behind it made up.

Mirzaei et al., "SPIn-NeRF: Multiview Segmentation and Perceptual Inpainting with Neural Radiance Fields",
CVPR 2023. Rough masks of single views become consistent ones by a logit that is rendered with the weights
detached. Then a field of the whole scene gives disparities; colours and disparities are inpainted view by
view inside the dilated masks; and a new field is fitted to

    colours outside the masks
    + colours inside them, with the weights detached, so that they never move geometry
    + disparities inside them, from which alone the geometry there comes
    + distances that are known of some pixels outside.

Differs from the paper: one density on a hash grid, no second one of finer samples; harmonic filling is the
inpainter that is at hand offline, any other can be given; no LPIPS, whose weights are not available.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch
from jaxtyping import Bool, Float
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import spsolve
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError, DataError
from zoo.neural3d.fields import RECIPE, rays_of
from zoo.neural3d.methods.part123 import PartHead
from zoo.neural3d.networks import fresh
from zoo.neural3d.views import View
from zoo.neural3d.weighed import WeighedField
from zoo.shared.train import Drawn, Job, Recipe

MOST = 0.9  # of a view that a mask may cover
Inpainter = Callable[[Tensor, Tensor], Tensor]


class Masked(NamedTuple):
    """Rays of pictures: origins, directions and colours [n, 3], which are in a hole [n], disparities [n], and
    distances that are known [n], 0 where not."""

    origins: Tensor
    directions: Tensor
    colours: Tensor
    hole: Tensor
    disparities: Tensor
    distances: Tensor


def dilated(mask: Bool[Tensor, "h w"], times: int) -> Bool[Tensor, "h w"]:
    """The mask, grown by one pixel in every direction each time."""
    found = mask.float()[None]
    for _ in range(times):
        found = functional.max_pool2d(found, 3, 1, 1)
    return found[0] > 0


def harmonic(image: Float[Tensor, "h w c"], hole: Bool[Tensor, "h w"]) -> Float[Tensor, "h w c"]:
    """The picture with every pixel of the hole the mean of its neighbours: the smoothest filling."""
    rows = hole.flatten().nonzero()[:, 0].numpy()
    if not len(rows):
        return image
    height, width = hole.shape
    place = numpy.full(height * width, -1)
    place[rows] = numpy.arange(len(rows))
    known, sums, counts = image.reshape(height * width, -1).double().numpy(), 0.0, numpy.zeros(len(rows))
    pairs: list[tuple[numpy.ndarray, numpy.ndarray]] = []
    for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        y, x = rows // width + down, rows % width + right
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        other = numpy.where(inside, y * width + x, 0)
        counts += inside
        free = inside & (place[other] >= 0)
        pairs.append((free.nonzero()[0], place[other[free]]))
        sums = sums + (inside & ~free)[:, None] * known[other]
    at, to = (numpy.concatenate(side) for side in zip(*pairs, strict=True))
    system = diags(counts) - coo_matrix((numpy.ones(len(at)), (at, to)), (len(rows), len(rows)))
    filled = known.copy()
    filled[rows] = spsolve(system.tocsc(), sums).reshape(len(rows), -1)
    return torch.from_numpy(filled).float().reshape(image.shape)


def check_masks(views: Sequence[View], masks: Sequence[Bool[Tensor, "h w"]]) -> None:
    """Refuse masks from which nothing can be learned.

    Raises:
        DataError: another number or size of masks, one that covers nine tenths of a view, or no view in which
            anything is masked.
    """
    if len(views) != len(masks):
        raise DataError(f"{len(views)} views and {len(masks)} masks")
    for view, mask in zip(views, masks, strict=True):
        if mask.shape != view.image.shape[:2]:
            raise DataError(
                f"view {view.name!r} is {tuple(view.image.shape[:2])} and its mask {tuple(mask.shape)}: "
                "resize the mask without interpolation"
            )
        if float(mask.float().mean()) > MOST:
            raise DataError(
                f"the mask of view {view.name!r} covers {100 * float(mask.float().mean()):.0f} % of it: "
                "nothing is left to learn from; leave the view out"
            )
    if not any(bool(mask.any()) for mask in masks):
        raise DataError(f"nothing is masked in any of {len(views)} views: there is no object to take out")


def segmented(
    model: WeighedField,
    views: Sequence[View],
    masks: Sequence[Bool[Tensor, "h w"]],
    steps: int,
    seed: int = 0,
) -> list[Bool[Tensor, "h w"]]:
    """Masks that agree across views, from rough ones: where a rendered logit is above zero."""
    check_masks(views, masks)
    seen = []
    for view, mask in zip(views, masks, strict=True):
        origins, directions, _ = rays_of(view)
        with torch.no_grad():
            samples = model.weigh(origins, directions)
        seen.append((samples.points, samples.weights, mask.flatten().float()))
    points, weights, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))

    def make(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(labels), (count,), generator=generator)
        return points[rows], weights[rows], labels[rows]

    def logits(head: nn.Module, points: Tensor, weights: Tensor) -> Tensor:
        # Where nothing is the mask is empty.
        return (weights * head(points)[..., 0]).sum(1) - 2 * (1 - weights.sum(1))

    def loss(head: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits(head, *batch[:2]), batch[2])

    head = fresh(PartHead, seed, size=1)
    recipe = Recipe(lr=3e-3, epochs=1, optimizer="adam", weight_decay=0.0, warmup=0.05, decay="cosine")
    Job(Drawn(make, 256, steps), loss=loss, recipe=recipe, seed=seed).fit(head, macs=lambda: 0.0).run()
    with torch.no_grad():
        return [
            (logits(head, *samples[:2]) > 0).reshape(mask.shape)
            for samples, mask in zip(seen, masks, strict=True)
        ]


@dataclass(frozen=True)
class SPInNeRF:
    """How the field without the object is fitted.

    Attributes:
        hole: colours inside the holes: not used, with `detached` weights, or like all others ("plain").
        disparity: weight of the disparities inside the holes.
        depth: weight of distances that are known (of points that structure from motion found, say).
        steps: of either field.
        rays: a step.
        grow: pixels that masks are dilated by.
        inpainter: (picture [h, w, c], hole [h, w]) -> picture.
        arguments: of the field.
    """

    hole: str = "detached"
    disparity: float = 10.0
    depth: float = 0.1
    steps: int = 400
    rays: int = 256
    grow: int = 2
    inpainter: Inpainter = harmonic
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.hole not in ("none", "detached", "plain") or min(self.disparity, self.depth, self.grow) < 0:
            raise ConfigError(
                f"hole is none, detached or plain, and weights are not negative; received {self.hole!r}, "
                f"{self.disparity}, {self.depth}, {self.grow}"
            )

    def scene(self, views: Sequence[View], seed: int = 0) -> WeighedField:
        """A field of the scene as it is."""
        whole = [
            _masked(view, torch.zeros(view.image.shape[:2], dtype=torch.bool), view.image) for view in views
        ]
        return self._fit(whole, seed)

    def fit(
        self, scene: WeighedField, views: Sequence[View], masks: Sequence[Bool[Tensor, "h w"]], seed: int = 0
    ) -> WeighedField:
        """A field of the scene without what is masked.

        Args:
            scene: a field of it as it is.
            views, masks: pictures, and the object in them.
            seed: of weights and rays.

        Raises:
            DataError: as for `check_masks`.
        """
        check_masks(views, masks)
        rays = []
        for view, mask in zip(views, masks, strict=True):
            hole = dilated(mask, self.grow)
            disparity, known = _disparities(scene, view)
            filled = self.inpainter(disparity[..., None], hole | ~known)
            rays.append(_masked(view, hole, self.inpainter(view.image, hole), filled))
        return self._fit(rays, seed)

    def _fit(self, parts: Sequence[Masked], seed: int) -> WeighedField:
        rays = Masked(*(torch.cat(values) for values in zip(*parts, strict=True)))
        if self.hole == "none":
            rays = Masked(*(values[~rays.hole] for values in rays))

        def make(count: int, generator: torch.Generator) -> Masked:
            rows = torch.randint(len(rays.hole), (count,), generator=generator)
            return Masked(*(values[rows] for values in rays))

        def loss(model: nn.Module, batch: Masked) -> Tensor:
            assert isinstance(model, WeighedField)
            return self.loss(model, batch)

        model = fresh(WeighedField, seed, **self.arguments)
        recipe = Recipe(**{**RECIPE, "epochs": 1})
        Job(Drawn(make, self.rays, self.steps), loss=loss, recipe=recipe, seed=seed).fit(
            model, macs=lambda: 0.0
        ).run()
        return model.eval()

    def loss(self, model: WeighedField, batch: Masked) -> Float[Tensor, ""]:
        """Colours outside and inside the holes, disparities inside."""
        seen, hole = model.weigh(batch.origins, batch.directions), batch.hole
        plain, held = seen.colour(model.background), seen.colour(model.background, detached=True)
        colour = plain if self.hole == "plain" else torch.where(hole[:, None], held, plain)
        total = (colour - batch.colours).square().mean()
        depth, known = seen.depth(), batch.distances > 0
        if self.depth and bool(known.any()):
            total = total + self.depth * ((depth - batch.distances).square() * known).mean()
        if self.disparity and self.hole == "detached" and bool(hole.any()):
            wrong = 1 / depth.clamp_min(1e-3) - batch.disparities
            # What the rays do not hit has no depth: they have to hit something.
            missed = 1 - seen.weights.sum(1)
            total = total + self.disparity * ((wrong.square() + 0.1 * missed.square()) * hole).sum() / len(
                hole
            )
        return total


def _masked(view: View, hole: Tensor, colours: Tensor, disparity: Tensor | None = None) -> Masked:
    origins, directions, _ = rays_of(view)
    found = torch.zeros(hole.numel()) if disparity is None else disparity.flatten()
    known = torch.zeros(hole.numel())
    if view.depth is not None:
        known = view.depth.flatten() / (directions @ view.camera.viewmat[2, :3]) * ~hole.flatten()
    return Masked(origins, directions, colours.reshape(-1, 3), hole.flatten(), found, known)


def _disparities(scene: WeighedField, view: View) -> tuple[Tensor, Tensor]:
    """One over the distance of what each pixel shows [h, w], and whether it shows anything."""
    origins, directions, _ = rays_of(view)
    with torch.no_grad():
        seen = [scene.weigh(*some) for some in zip(origins.split(4096), directions.split(4096), strict=True)]
    depth, alpha = (
        torch.cat(parts) for parts in ([s.depth() for s in seen], [s.weights.sum(1) for s in seen])
    )
    size = view.image.shape[:2]
    return (1 / depth.clamp_min(1e-3)).reshape(size), (alpha > 0.5).reshape(size)
