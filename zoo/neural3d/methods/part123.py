"""Part123: parts of an object, from masks of single views that know nothing of each other.

Liu et al., "Part123: Part-aware 3D Reconstruction from a Single-view Image", SIGGRAPH 2024. A field of
the object gets a head of features, rendered along rays with the weights detached, and trained by contrast: of
the rays of a view, those of one mask attract and those of different masks repel each other, so that the
masks' numbers mean nothing beyond their view. Features of surface points are then clustered. How many
clusters: masks of neighbouring views that cover each other, through the rendered depth, are joined; every
threshold gives a count and features to start from, and the clustering with the lowest Davies-Bouldin score is
taken.

Differs from the paper: the views are given rather than made by diffusion, the masks rather than by SAM; the
geometry is a density on a hash grid in place of NeuS, fitted before the features, which the detached weights
allow; a component's centre is its largest mask's feature nearest to the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from sklearn.metrics import davies_bouldin_score
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import DataError
from zoo.neural3d.cameras import Camera
from zoo.neural3d.fields import rays_of
from zoo.neural3d.hull import pixels_of
from zoo.neural3d.networks import fresh
from zoo.neural3d.views import View
from zoo.neural3d.weighed import WeighedField
from zoo.shared.train import Drawn, Job, Recipe

SHARES = (0.2, *(0.05 * step for step in range(5, 13)), 0.7)  # of the masks' overlap
FEWEST, LEAST = 20, 0.02  # pixels of a mask, and its share of the foreground


class Lifted(NamedTuple):
    """Foreground rays of a view: rendered points [n, s, 3] with weights [n, s], distances [n], masks [n]."""

    points: Tensor
    weights: Tensor
    distances: Tensor
    masks: Tensor


class PartHead(nn.Module):
    """Features of points of [-1, 1]^3.

    Args:
        size: of a feature.
        width: of the hidden layers.
    """

    def __init__(self, size: int = 16, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(27, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, size)
        )

    def forward(self, points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n d"]:
        """Features, of no particular length."""
        waves = points[..., None] * 2.0 ** torch.arange(4)
        seen = torch.cat([points, waves.sin().flatten(-2), waves.cos().flatten(-2)], -1)
        found: Tensor = self.layers(seen)
        return found

    def rendered(self, points: Float[Tensor, "n s 3"], weights: Float[Tensor, "n s"]) -> Float[Tensor, "n d"]:
        """Features of rays, of length one."""
        return functional.normalize((weights[..., None] * self(points)).sum(1), dim=1)


def cleaned(masks: Int[Tensor, "h w"], name: str = "") -> Int[Tensor, "h w"]:
    """Masks of a view, 0 for none, without those that are too small to be one.

    Raises:
        DataError: nothing is left.
    """
    out, foreground = masks.clone(), int((masks > 0).sum())
    for label, count in zip(*torch.unique(masks, return_counts=True), strict=True):
        if count < max(FEWEST, LEAST * foreground):
            out[masks == label] = 0
    if not bool((out > 0).any()):
        raise DataError(f"view {name!r} has no mask of {FEWEST} pixels: leave the view out, or segment it")
    return out


def lifted(model: WeighedField, view: View, masks: Int[Tensor, "h w"]) -> Lifted:
    """What the field shows at the pixels of a view's masks."""
    rows = (masks.flatten() > 0).nonzero()[:, 0]
    origins, directions, _ = rays_of(view)
    with torch.no_grad():
        seen = model.weigh(origins[rows], directions[rows])
    return Lifted(seen.points, seen.weights, seen.depth(), masks.flatten()[rows])


def contrast(
    features: Float[Tensor, "n d"],
    masks: Int[Tensor, " n"],
    generator: torch.Generator,
    negatives: int = 2,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """InfoNCE over rays of one view: each with another ray of its mask against rays of other masks.

    Raises:
        DataError: all rays are of one mask, so that nothing repels.
    """
    same = masks[:, None] == masks
    if bool(same.all()):
        raise DataError(f"all {len(masks)} rays are of one mask; such a view gives no pairs: leave it out")
    positive = torch.multinomial(
        (same & ~torch.eye(len(masks)).bool()).float() + 1e-9, 1, generator=generator
    )
    others = torch.multinomial((~same).float() + 1e-9, negatives, generator=generator, replacement=True)
    alike = features @ features.mT / temperature
    logits = torch.cat([alike.gather(1, positive), alike.gather(1, others)], 1)
    return functional.cross_entropy(logits, torch.zeros(len(masks), dtype=torch.long))


def overlaps(
    views: Sequence[View], masks: Sequence[Tensor], rendered: Sequence[Lifted], depths: Sequence[Tensor]
) -> tuple[list[tuple[int, int]], Float[Tensor, "n n"]]:
    """The masks of all views as (view, label), and how much each covers another in a neighbouring view: the
    smaller of the shares of both, seen through the rendered distances `depths` [h, w]."""
    nodes = [(number, int(label)) for number, one in enumerate(masks) for label in one.unique() if label > 0]
    index = {node: place for place, node in enumerate(nodes)}
    shares = torch.zeros(len(nodes), len(nodes))
    for here, (view, seen) in enumerate(zip(views, rendered, strict=True)):
        rows = (masks[here].flatten() > 0).nonzero()[:, 0]
        origins, directions, _ = rays_of(view)
        points = origins[rows] + seen.distances[:, None] * directions[rows]
        for there in {(here - 1) % len(views), (here + 1) % len(views)} - {here}:
            label = _labels(views[there].camera, points, masks[there], depths[there])
            for own in seen.masks.unique().tolist():
                mine = seen.masks == own
                for other in label[mine & (label > 0)].unique().tolist():
                    common = float((mine & (label == other)).sum())
                    share = min(common / float(mine.sum()), common / float((masks[there] == other).sum()))
                    one, two = index[here, own], index[there, other]
                    shares[one, two] = shares[two, one] = max(share, float(shares[one, two]))
    return nodes, shares


def _labels(camera: Camera, points: Tensor, masks: Tensor, depths: Tensor) -> Int[Tensor, " n"]:
    """Masks that points are seen in; 0 where something is before them."""
    pixels, _ = pixels_of(camera, points)
    column, row = pixels.long().unbind(1)
    inside = (column >= 0) & (column < camera.width) & (row >= 0) & (row < camera.height)
    column, row = column.clamp(0, camera.width - 1), row.clamp(0, camera.height - 1)
    near = (points - camera.centre).norm(dim=1) < 1.05 * depths[row, column]
    return torch.where(inside & near, masks[row, column], 0)


def clustered(
    features: Float[Tensor, "v d"],
    shares: Float[Tensor, "n n"],
    sizes: Sequence[int],
    centres: Float[Tensor, "n d"],
) -> Int[Tensor, " v"]:
    """Clusters of surface features, their number chosen.

    Args:
        features: of the surface.
        shares: how much masks cover each other.
        sizes: pixels of each mask.
        centres: a feature of each mask.
    """
    best: tuple[float, Tensor] | None = None
    tried: set[tuple[int, ...]] = set()
    for least in SHARES:
        _, of = connected_components(coo_matrix((shares > least).numpy()), directed=False)
        groups = [[node for node in range(len(of)) if of[node] == group] for group in range(of.max() + 1)]
        largest = [max(group, key=lambda node: sizes[node]) for group in groups]
        firm = [node for node, group in zip(largest, groups, strict=True) if len(group) > 1]
        alone = sorted(set(largest) - set(firm), key=lambda node: -sizes[node])
        for extra in range(len(alone) + 1):
            start = (*firm, *alone[:extra])
            if len(start) < 2 or len(start) > 12 or start in tried:
                continue
            tried.add(start)
            found = KMeans(len(start), init=centres[list(start)].numpy(), n_init=1).fit(features.numpy())
            if len(set(found.labels_)) < 2:
                continue
            score = float(davies_bouldin_score(features.numpy(), found.labels_))
            if best is None or score < best[0]:
                best = score, torch.from_numpy(found.labels_.astype(numpy.int64))
    if best is None:
        raise DataError("no two parts: the masks of all views join to one")
    return best[1]


@dataclass(frozen=True)
class Part123:
    """How the features are trained.

    Attributes:
        steps: of the training; none leaves the head as it is.
        rays: of one view, a step.
        recipe: of its optimiser.
    """

    steps: int = 300
    rays: int = 128
    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            lr=3e-3, epochs=1, optimizer="adam", weight_decay=0.0, warmup=0.05, decay="cosine"
        )
    )

    def fit(self, views: Sequence[Lifted], seed: int = 0) -> PartHead:
        """A head whose features tell apart what the masks of any one view do.

        Raises:
            DataError: no view has two masks.
        """
        telling = [view for view in views if len(view.masks.unique()) > 1]
        if not telling:
            raise DataError(f"none of {len(views)} views has two masks: nothing tells parts apart")

        def make(count: int, generator: torch.Generator) -> tuple[Lifted, torch.Generator]:
            view = telling[int(torch.randint(len(telling), (), generator=generator))]
            while True:
                rows = torch.randint(len(view.masks), (count,), generator=generator)
                if len(view.masks[rows].unique()) > 1:
                    return Lifted(*(values[rows] for values in view)), generator

        def loss(model: nn.Module, batch: tuple[Lifted, torch.Generator]) -> Tensor:
            assert isinstance(model, PartHead)
            view, generator = batch
            return contrast(model.rendered(view.points, view.weights), view.masks, generator)

        model = fresh(PartHead, seed)
        if self.steps:
            batches = Drawn(make, self.rays, self.steps)
            Job(batches, loss=loss, recipe=self.recipe, seed=seed).fit(model, macs=lambda: 0.0).run()
        return model.eval()


class PartScene(nn.Module):
    """A field and the features of its surface.

    Args:
        arguments: of the field, see `zoo.neural3d.fields.HashField`.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.
    """

    full_precision: ClassVar[bool] = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.field, self.head = WeighedField(**arguments), PartHead()

    def forward(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n d"]:
        """Features of length one."""
        return functional.normalize(self.head(points), dim=1)


def parts(
    model: WeighedField,
    head: PartHead,
    views: Sequence[View],
    masks: Sequence[Int[Tensor, "h w"]],
    points: Float[Tensor, "v 3"],
) -> Int[Tensor, " v"]:
    """The part of each surface point, their number found."""
    rendered = [lifted(model, view, mask) for view, mask in zip(views, masks, strict=True)]
    depths = []
    for view in views:
        origins, directions, _ = rays_of(view)
        with torch.no_grad():
            depths.append(model.weigh(origins, directions).depth().reshape(view.image.shape[:2]))
    nodes, shares = overlaps(views, masks, rendered, depths)
    centres, sizes = [], []
    with torch.no_grad():
        for number, label in nodes:
            own = rendered[number].masks == label
            features = head.rendered(rendered[number].points[own], rendered[number].weights[own])
            centres.append(features[int((features @ features.mean(0)).argmax())])
            sizes.append(int(own.sum()))
        surface = functional.normalize(head(points), dim=1)
    return clustered(surface, shares, sizes, torch.stack(centres))
