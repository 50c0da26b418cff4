"""A radiance field on a hash grid, marched along rays; a saliency grid may say where space is empty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.neural3d.cameras import Camera
from zoo.neural3d.refine import mean_psnr
from zoo.neural3d.views import View, refuse_none
from zoo.shared.ops.hash_encode import HashGrid, hash_encode
from zoo.shared.ops.rasterize_reference import sh_bases
from zoo.shared.train import Job, Recipe

GEOMETRY = 15  # values that the density network hands to the colour network (torch-ngp)
BASES = 16  # spherical harmonics of the viewing direction
CHUNK = 1 << 13  # rays marched at once
TOLD = 0.01  # saliency below which a cell counts as empty


class Marched(NamedTuple):
    """What rays see: colour [n, 3], expected depth along the ray [n], alpha [n]."""

    colour: Tensor
    depth: Tensor
    alpha: Tensor


class HashField(nn.Module):
    """Density and colour at any point of a cube, from a hash grid and two small networks without biases.

    With a saliency grid G the features f of a point x become v = sigmoid(G(x)) f(x), and its density is
    multiplied by tanh(gate ||v||), so that nothing is where v is zero (HollowNeRF, section 3). The parameter
    `saliency` holds the logits less that of 0.01, so that a zero is a cell on the verge of being empty. In a
    `hardened` field cells of exactly zero are empty: their samples are neither looked up nor computed.

    Args:
        centre: of the cube, in the world.
        half: half of its side.
        levels, log2_size, coarsest, finest: of the hash grid, see `HashGrid`.
        hidden: width of both networks.
        saliency: cells of the saliency grid on a side; 0 for none.
        gate: steepness of the soft gate.
        hardened: whether cells of saliency zero are skipped.
        background: colour where nothing is.
        samples: per ray.
        near: no sample is nearer to the camera, in units of the world.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.
    """

    full_precision: ClassVar[bool] = True

    def __init__(
        self,
        centre: Sequence[float] = (0.0, 0.0, 0.0),
        half: float = 1.0,
        levels: int = 8,
        log2_size: int = 12,
        coarsest: int = 8,
        finest: int = 128,
        hidden: int = 32,
        saliency: int = 0,
        gate: float = 10.0,
        hardened: bool = False,
        background: Sequence[float] = (1.0, 1.0, 1.0),
        samples: int = 64,
        near: float = 0.0,
    ) -> None:
        super().__init__()
        if saliency == 1 or saliency < 0 or hardened and not saliency:
            raise ConfigError(
                "a saliency grid has at least 2 cells on a side, and only a field with one hardens; "
                f"received saliency {saliency}, hardened {hardened}"
            )
        if half <= 0 or samples < 1 or near < 0 or gate <= 0:
            raise ConfigError(
                f"a field needs half > 0, samples >= 1, near >= 0, gate > 0; received {half}, {samples}, "
                f"{near}, {gate}"
            )
        self.grid = HashGrid(levels, 2, log2_size, coarsest, finest)
        self.half_side, self.samples, self.near, self.gate = half, samples, near, gate
        self.hardened = hardened
        self.arguments: dict[str, Any] = {
            "centre": list(centre),
            "half": half,
            "levels": levels,
            "log2_size": log2_size,
            "coarsest": coarsest,
            "finest": finest,
            "hidden": hidden,
            "saliency": saliency,
            "gate": gate,
            "hardened": hardened,
            "background": list(background),
            "samples": samples,
            "near": near,
        }
        self.table = nn.Parameter(torch.empty(self.grid.entries, 2).uniform_(-1e-2, 1e-2))
        self.density = _network(2 * levels, hidden, 1 + GEOMETRY)
        self.colour = _network(GEOMETRY + BASES, hidden, 3)
        self.saliency: nn.Parameter | None = None
        if saliency:
            self.saliency = nn.Parameter(torch.full((saliency,) * 3, -_logit(TOLD)))  # p = 1/2
        self.register_buffer("background", torch.tensor(list(background)), persistent=False)
        self.register_buffer("centre", torch.tensor(list(centre)), persistent=False)
        self.background: Tensor
        self.centre: Tensor

    def like(self, seed: int, **changes: Any) -> HashField:
        """A fresh field of the same arguments but for the changes, its weights drawn with a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return HashField(**{**self.arguments, **changes})

    @property
    def salient(self) -> Tensor:
        """Share of salience of each cell [side, side, side] in (0, 1), z before y before x; zero where
        hardened away.

        Raises:
            ConfigError: the field has no saliency grid.
        """
        if self.saliency is None:
            raise ConfigError("this field has no saliency grid; make it with saliency=32, say")
        shares = (self.saliency + _logit(TOLD)).sigmoid()
        return shares * (self.saliency != 0) if self.hardened else shares

    def harden(self, keep: Tensor) -> None:
        """Empty all cells but those of `keep` [side, side, side], in place."""
        if self.saliency is None or keep.shape != self.saliency.shape or keep.dtype != torch.bool:
            raise ConfigError("harden takes a bool for each cell of the field's saliency grid")
        with torch.no_grad():
            self.saliency[~keep] = 0
            # A kept cell of exactly zero would count as empty.
            self.saliency[keep & (self.saliency == 0)] = 1e-6
        self.hardened = self.arguments["hardened"] = True

    def reachable(self) -> Tensor:
        """Which entries of the table [entries] a sample in a salient cell can look up."""
        kept = self.salient.detach() >= TOLD if not self.hardened else self.salient.detach() > 0
        cells = kept.nonzero().flip(1)  # x, y, z
        side, found = len(kept), torch.zeros(self.grid.entries, dtype=torch.bool)
        for level, resolution in enumerate(self.grid.resolutions):
            low = (cells * resolution).div(side, rounding_mode="floor")
            span = -(-resolution // side) + 2  # vertices on a side that a cell can touch
            steps = torch.arange(span)
            offset = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
            vertices = (low[:, None] + offset).reshape(-1, 3)
            last = -(-(cells + 1) * resolution // side)
            inside = (vertices.reshape(len(cells), -1, 3) <= last[:, None]).all(2).flatten()
            found[self.grid.entry(level, vertices[inside])] = True
        return found

    def forward(self, camera: Camera) -> Tensor:
        """The colours [height, width, 3] that the camera sees."""
        return self.render(camera).colour

    def render(self, camera: Camera) -> Marched:
        """What the camera sees: colour [h, w, 3], depth along the camera's axis [h, w], alpha [h, w]."""
        origin, rays = camera.rays()
        flat = rays.reshape(-1, 3)
        parts = [self.march(origin.expand_as(part), part) for part in flat.split(CHUNK)]
        colour, depth, alpha = (torch.cat(values) for values in zip(*parts, strict=True))
        size = (camera.height, camera.width)
        depth = depth * (flat @ camera.viewmat[2, :3])
        return Marched(colour.reshape(*size, 3), depth.reshape(size), alpha.reshape(size))

    def march(self, origins: Tensor, rays: Tensor) -> Marched:
        """Volume rendering of rays [n, 3] with unit directions; samples are jittered in training mode."""
        points, widths, distances = self._samples(origins, rays)
        n, count = widths.shape
        density, colours = self.at(points.reshape(-1, 3), rays.repeat_interleave(count, 0))
        thickness = density.reshape(n, count) * widths / (2 * self.half_side)
        before = functional.pad(thickness.cumsum(1)[:, :-1], (1, 0))
        weights = (-before).exp() * -torch.expm1(-thickness)
        alpha = weights.sum(1)
        colour = (weights[..., None] * colours.reshape(n, count, 3)).sum(1)
        depth = (weights * distances).sum(1) / alpha.clamp_min(1e-6)
        return Marched(colour + (1 - alpha)[:, None] * self.background, depth, alpha)

    def at(self, points: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
        """Density [n] per side of the cube and colour [n, 3] at points of the world [n, 3]; both zero outside
        the cube and, in a hardened field, in empty cells."""
        unit = (points - self.centre) / (2 * self.half_side) + 0.5
        rows = self._live(unit).nonzero()[:, 0]
        density, colour = points.new_zeros(len(points)), points.new_zeros(len(points), 3)
        if not len(rows):
            return density, colour
        inner, towards = unit[rows], rays[rows]
        found, gate = self._features(inner)
        out = self.density(found)
        dense = out[:, 0].clamp(max=12).exp() * gate
        bright = self.colour(torch.cat([out[:, 1:], sh_bases(towards, BASES)], 1)).sigmoid()
        return density.index_copy(0, rows, dense), colour.index_copy(0, rows, bright)

    def _live(self, unit: Tensor) -> Tensor:
        """Which points [n, 3] are in the unit cube and not in an empty cell."""
        inside = ((unit >= 0) & (unit <= 1)).all(1)
        if self.saliency is None or not self.hardened:
            return inside
        side = len(self.saliency)
        x, y, z = (unit * side).long().clamp(0, side - 1).unbind(1)
        return inside & (self.saliency.detach()[z, y, x] != 0)

    def _features(self, unit: Tensor) -> tuple[Tensor, Tensor | float]:
        """Features of points of the unit cube, and the factor of their density."""
        if self.saliency is None:
            return hash_encode(unit, self.table, self.grid), 1.0
        logits = functional.grid_sample(
            self.saliency[None, None],
            (2 * unit - 1)[None, None, None],
            padding_mode="border",
            align_corners=False,
        ).flatten()
        found = hash_encode(unit, self.table, self.grid, (logits + _logit(TOLD)).sigmoid())
        return found, (self.gate * (found.square().sum(1) + 1e-20).sqrt()).tanh()

    def _samples(self, origins: Tensor, rays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points [n, samples, 3] between a ray's entry into the cube and its exit, their spacing and their
        distances [n, samples]."""
        inverse = 1 / torch.where(rays.abs() < 1e-9, 1e-9, rays)
        one, other = (self.centre + sign * self.half_side - origins for sign in (-1, 1))
        first, second = one * inverse, other * inverse
        start = torch.minimum(first, second).amax(1).clamp_min(self.near)
        end = torch.maximum(torch.maximum(first, second).amin(1), start)
        step = (end - start)[:, None] / self.samples
        jitter = torch.rand(len(rays), self.samples) if self.training else 0.5
        distances = start[:, None] + (torch.arange(self.samples) + jitter) * step
        return origins[:, None] + rays[:, None] * distances[..., None], step.expand_as(distances), distances

    def operations(self, camera: Camera) -> tuple[int, int]:
        """Operations of drawing a view without and with skipping: two a multiply-accumulate of the networks,
        and 8 corners of 4 + 2 x 2 operations a level of the grid."""
        origin, rays = camera.rays()
        points = self.eval()._samples(origin.expand(rays[..., 0].numel(), 3), rays.reshape(-1, 3))[0]
        each = 2 * sum(p.numel() for p in (*self.density.parameters(), *self.colour.parameters()))
        each += self.grid.levels * 8 * 8
        unit = (points.reshape(-1, 3) - self.centre) / (2 * self.half_side) + 0.5
        return each * len(unit), each * int(self._live(unit).sum())


def _network(given: int, hidden: int, wanted: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(given, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, wanted, bias=False)
    )


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


class Rays(NamedTuple):
    """Rays of pictures: origins, unit directions and colours, [n, 3] each."""

    origins: Tensor
    directions: Tensor
    colours: Tensor


def rays_of(view: View) -> Rays:
    """The rays of a view, row by row."""
    origin, directions = view.camera.rays()
    flat = directions.reshape(-1, 3)
    return Rays(origin.expand_as(flat), flat, view.image.reshape(-1, 3))


@dataclass(frozen=True)
class RayBatches:
    """Rays drawn over all views, each pixel once an epoch: what `zoo.shared.train.Fit` draws.

    Attributes:
        views: whose pixels are drawn.
        batch: rays a step.
    """

    views: list[View] = field(default_factory=list)
    batch: int = 256

    def __post_init__(self) -> None:
        refuse_none(self.views)

    def __len__(self) -> int:
        return max(1, sum(view.image[..., 0].numel() for view in self.views) // self.batch)

    def draw(self, generator: torch.Generator) -> Iterator[Rays]:
        rays = Rays(*(torch.cat(parts) for parts in zip(*map(rays_of, self.views), strict=True)))
        order = torch.randperm(len(rays.colours), generator=generator)
        for number in range(len(self)):
            rows = order[number * self.batch : (number + 1) * self.batch]
            yield Rays(*(values[rows] for values in rays))

    def example(self) -> tuple[Camera]:
        return (self.views[0].camera,)


def ray_loss(model: nn.Module, rays: Rays) -> Tensor:
    """Mean squared error of the colours of rays."""
    assert isinstance(model, HashField)
    return (model.march(rays.origins, rays.directions).colour - rays.colours).square().mean()


# Of a field's training: torch-ngp's optimiser; the rate falls to zero as a cosine.
RECIPE: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.0,
    "optimizer": "adam",
    "warmup": 0.0,
    "decay": "cosine",
    "options": {"eps": 1e-15, "betas": (0.9, 0.99)},
}


def field_job(
    train: Sequence[View],
    test: Sequence[View] = (),
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    batch: int = 256,
    **changes: Any,
) -> Job:
    """The job of fitting a field to views, some rays a step.

    Args:
        test: views that score a field.
        recipe: by default `RECIPE`.
        batch: rays a step.
        changes: fields of the recipe to replace, e.g. `steps=300`.
    """
    judged = list(test)
    score = (lambda model: mean_psnr(model, judged)) if judged else None
    recipe = replace(recipe or Recipe(**RECIPE), **changes)
    return Job(RayBatches(list(train), batch), loss=ray_loss, score=score, recipe=recipe, seed=seed)
