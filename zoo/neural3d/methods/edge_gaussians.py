"""EdgeGaussians: points on the edges of an object, with directions, from edge maps of posed pictures.

Chelani et al., "EdgeGaussians -- 3D Edge Mapping via Gaussian Splatting", WACV 2025. White Gaussians are
splatted (anti-aliased) until their alpha is the edge maps. Three losses:

    projection   |alpha - map|, every so often over edge pixels plus as many of the background
    ratio        mean of second largest over largest scale: Gaussians become needles
    direction    1 - mean |needle . unit vector to each of the nearest neighbours|: needles lie along the edge

The last two are steps of their own every fifth step, each as large as 1 % of the projection loss. Where the
screen gradient is large Gaussians are tripled with jitter; what is faint or off the maps in nearly all views
goes. Times of the schedule are shares of the released 400 epochs.

Differs from the released code, following the paper's text where they disagree: the nearest neighbour counts,
the background sample is of the background, and Gaussians off the maps do go. `zoo.neural3d.edges` makes
curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.neural3d.cameras import Camera
from zoo.neural3d.views import View, ViewBatches
from zoo.shared.ops.rasterize import rasterize
from zoo.shared.ops.rasterize_reference import rotations
from zoo.shared.structure.resize import RowResizer
from zoo.shared.train import Job, Recipe
from zoo.shared.train.fit import Fit

EDGE = 0.2  # of a map: what counts as an edge pixel
NAMES = ("means", "quats", "scales", "opacities")
RECIPE = Recipe(
    lr=1.0,
    steps=1200,
    weight_decay=0.0,
    optimizer="adam",
    warmup=0.0,
    decay="cosine",
    options={"eps": 1e-15},
)


class EdgePoints(nn.Module):
    """White Gaussians whose alpha is an edge map.

    Parameters as of `zoo.neural3d.scene.GaussianScene`, without colours.

    Args:
        count: at random in a cube round (0.5, 0.5, 0.5) of side 1.1.
        size: standard deviation at the start, in units of the scene.
        seed: of places and rotations.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.
    """

    full_precision: ClassVar[bool] = True

    def __init__(self, count: int, size: float = 0.01, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.means = nn.Parameter((torch.rand(count, 3, generator=generator) - 0.5) * 1.1 + 0.5)
        self.quats = nn.Parameter(torch.randn(count, 4, generator=generator))
        self.scales = nn.Parameter(torch.full((count, 3), size).log())
        self.opacities = nn.Parameter(torch.full((count,), 0.08).logit())

    def __len__(self) -> int:
        return len(self.means)

    def forward(self, camera: Camera, shift: Tensor | None = None) -> Float[Tensor, "h w"]:
        """The edge map that the camera sees."""
        return rasterize(
            self.means,
            self.quats,
            self.scales.exp(),
            self.opacities.sigmoid(),
            self.means.new_ones(len(self), 1),
            camera.viewmat,
            camera.intrinsics,
            camera.width,
            camera.height,
            shift=shift,
            antialiased=True,
        ).alpha

    def rows(self, keep: Bool[Tensor, " n"]) -> EdgePoints:
        """Some of the points."""
        found = EdgePoints(int(keep.sum()))
        found.load_state_dict({name: value[keep] for name, value in self.state_dict().items()})
        return found

    def directions(self) -> Float[Tensor, "n 3"]:
        """Unit vectors along the longest axes."""
        longest = self.scales.detach().argmax(1)
        return rotations(self.quats)[torch.arange(len(self)), :, longest]


def ratio_loss(scales: Float[Tensor, "n 3"]) -> Float[Tensor, ""]:
    """Mean of the second largest over the largest scale, of logarithms."""
    sizes = scales.sort(dim=1, descending=True).values
    return (sizes[:, 1] - sizes[:, 0]).exp().mean()


def neighbours(means: Float[Tensor, "n 3"], count: int) -> Tensor:
    """[n, count], the nearest others of each point."""
    found = cKDTree(means.detach().numpy()).query(means.detach().numpy(), k=count + 1)[1]
    return torch.from_numpy(found[:, 1:])


def direction_loss(
    means: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], near: Tensor
) -> Float[Tensor, ""]:
    """1 - mean |direction . unit vector to each neighbour|; `near` [n, k] are their indices."""
    links = nn.functional.normalize(means[near] - means[:, None], dim=2)
    return 1 - (links * directions[:, None]).sum(2).abs().mean()


@dataclass(frozen=True)
class EdgeGaussians:
    """How edge points are found.

    Attributes:
        count: Gaussians at the start.
        steps: on one view each.
        direction, ratio: whether these losses are used.
        seed: of everything random.
    """

    count: int = 4000
    steps: int = 1200
    direction: bool = True
    ratio: bool = True
    seed: int = 0

    def fit(self, views: Sequence[View]) -> EdgePoints:
        """Edge points of edge maps: images [h, w, 1] from 0 to 1, edges bright.

        Raises:
            ConfigError: fewer than three views, maps out of range or inverted, or no edge pixel.
        """
        check_maps(views)
        points = EdgePoints(self.count, seed=self.seed)
        rates = {"means": 2e-3, "quats": 2e-2, "scales": 5e-3, "opacities": 3e-2}
        groups = [{"params": [points.get_parameter(name)], "lr": rates[name], "name": name} for name in NAMES]
        schedule = _Schedule(self, views)
        job = Job(ViewBatches(list(views)), loss=schedule.loss, recipe=RECIPE, seed=self.seed)
        fit = job.fit(points, parameters=groups, macs=lambda: 0.0, steps=self.steps)
        schedule.start(fit)
        fit.run(after_step=schedule.after_step)
        return points


class _Schedule:
    """What a step descends, and when Gaussians come and go."""

    def __init__(self, method: EdgeGaussians, views: Sequence[View]) -> None:
        self.method, self.views = method, list(views)
        self.generator = torch.Generator().manual_seed(method.seed)
        self.shift: Tensor | None = None
        self.projection = 0.0

    def start(self, fit: Fit) -> None:
        assert isinstance(fit.model, EdgePoints)
        self.fit, self.points = fit, fit.model
        self.resizer = RowResizer(fit.model, NAMES, [fit.optimizer])
        self.pull = torch.zeros(len(self.resizer))
        share = self.method.steps / 400  # steps of a released epoch
        self.triple = {round(share * e) for e in (40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150, 160)}
        self.triple |= {round(share * e) for e in (210, 220, 350, 375)}
        self.faint = {round(share * e) for e in (125, 310)}
        self.astray = {round(share * e) for e in (145, 175, 190)}

    def loss(self, points: nn.Module, view: View) -> Tensor:
        """The loss of a step: of the pictures, or every fifth time of the shape."""
        assert isinstance(points, EdgePoints)
        step, steps, self.shift = self.fit.step, self.method.steps, None
        turn = step % 10
        if turn == 4 and self.method.ratio and step > steps * 100 / 400:
            return self._scaled(ratio_loss(points.scales))
        if turn == 9 and self.method.direction and step > steps * 250 / 400:
            near = neighbours(points.means, 5)
            return self._scaled(direction_loss(points.means, points.directions(), near))
        self.shift = torch.zeros(len(points), 2, requires_grad=True)
        off = (points(view.camera, self.shift) - view.image[..., 0]).abs()
        found = off.mean()
        if step > steps * 50 / 400 and turn in (2, 7):
            edges = view.image[..., 0] > EDGE
            ground = off[~edges]
            drawn = torch.randint(len(ground), (int(edges.sum()),), generator=self.generator)
            found = off[edges].mean() + ground[drawn].mean()
        else:
            self.projection += float(found.detach())
        return found

    def _scaled(self, value: Tensor) -> Tensor:
        size, self.projection = self.projection, 0.0
        return value * (0.01 * size / max(float(value.detach()), 1e-9))

    def after_step(self) -> None:
        if self.shift is not None and self.shift.grad is not None:
            self.pull += self.shift.grad.norm(dim=1)
        step = self.fit.step
        if step in self.faint:
            self._keep(self.points.opacities.detach().sigmoid() >= 0.05)
        if step in self.astray:
            self._keep(on_edges(self.points.means.detach(), self.views) >= 0.1)
        if step in self.triple and len(self.resizer):
            low, high = self.pull.min(), self.pull.max()
            rows = ((self.pull - low) / (high - low).clamp_min(1e-30) > 0.5).nonzero()[:, 0].repeat(2)
            new = {name: self.points.get_parameter(name).detach()[rows] for name in NAMES}
            new["means"] = new["means"] + 0.05 * torch.randn(len(rows), 3, generator=self.generator)
            self.resizer.append(new)
            self.pull = torch.zeros(len(self.resizer))

    def _keep(self, rows: Bool[Tensor, " n"]) -> None:
        self.resizer.keep(rows)
        self.pull = self.pull[rows]


def on_edges(means: Float[Tensor, "n 3"], views: Sequence[View], least: float = EDGE) -> Float[Tensor, " n"]:
    """In which share of the views each point lands on an edge pixel."""
    return (edge_values(means, views) > least).float().mean(0)


def edge_values(means: Float[Tensor, "n 3"], views: Sequence[View]) -> Float[Tensor, "views n"]:
    """The map's value where each point lands in each view, 0 outside."""
    found = []
    for view in views:
        camera = view.camera
        seen = means @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
        flat = seen @ camera.intrinsics.T
        x, y = (flat[:, :2] / flat[:, 2:]).floor().long().unbind(1)
        inside = (x >= 0) & (x < camera.width) & (y >= 0) & (y < camera.height) & (seen[:, 2] > 0)
        values = view.image[y.clamp(0, camera.height - 1), x.clamp(0, camera.width - 1), 0]
        found.append(torch.where(inside, values, 0.0))
    return torch.stack(found)


def check_maps(views: Sequence[View]) -> None:
    """Refuse what are no edge maps.

    Raises:
        ConfigError: fewer than three views, maps out of range or inverted, or no edge pixel.
    """
    if len(views) < 3:
        raise ConfigError(f"edges need three views or more; received {len(views)}")
    for view in views:
        if view.image.shape[2] != 1 or not 0 <= float(view.image.min()) <= float(view.image.max()) <= 1:
            raise ConfigError(f"view {view.name!r}: an edge map is [h, w, 1] with values from 0 to 1")
        if float((view.image > EDGE).float().mean()) > 0.5:
            raise ConfigError(f"view {view.name!r}: more edge than ground; invert the map: edges are bright")
    if not any(bool((view.image > EDGE).any()) for view in views):
        raise ConfigError(f"no edge pixel (above {EDGE}) in any of {len(views)} maps")
