"""One-2-3-45: an object from a few views, by the elevation of the first one and a sparse cost volume.

Liu et al., "One-2-3-45: Any Single Image to 3D Mesh in 45 Seconds without Per-Shape Optimization", NeurIPS
2023. Views made near the given one are known relative to it, but not the elevation of them all. So for every
candidate the matched pixels of each pair of views are triangulated, and the errors of the points in the other
views averaged; first in steps of ten degrees, then of one. With poses at hand, the features of all views are
brought to the voxels that at least two of them see; mean and variance over the views feed a U-Net of sparse
convolutions, which says what is inside.

Differs from the paper: views and matches are given in place of Zero123's and LoFTR's; occupancy of toy shapes
is learned directly in place of a signed distance through rendering; voxels outside a mask are dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError, DataError
from zoo.neural3d.cameras import Camera, look_at
from zoo.neural3d.hull import cube, pixels_of
from zoo.neural3d.networks import fresh
from zoo.shared.ops.sparse_conv import inverse_conv, sparse_conv, subm_conv
from zoo.shared.ops.sparse_tensor import SparseConvTensor
from zoo.shared.train import Drawn, Job, Recipe

NEAR = ((0.0, 0.0), (10.0, 0.0), (-10.0, 0.0), (0.0, 10.0), (0.0, -10.0))  # degrees of elevation, azimuth
RECIPE = Recipe(lr=5e-3, epochs=1, optimizer="adam", weight_decay=0.0, warmup=0.05, decay="cosine", clip=1.0)


def near_views(elevation: float, distance: float, intrinsics: Tensor, size: int) -> list[Camera]:
    """Five cameras that look at the origin: one at an elevation in degrees, four some degrees beside it."""
    found = []
    for up, around in NEAR:
        high, turn = math.radians(elevation + up), math.radians(around)
        eye = torch.tensor(
            [math.cos(high) * math.sin(turn), -math.sin(high), -math.cos(high) * math.cos(turn)]
        )
        found.append(look_at(distance * eye, torch.zeros(3), intrinsics, size, size, (0.0, -1.0, 0.0)))
    return found


def reprojection(cameras: Sequence[Camera], pixels: Float[Tensor, "c n 2"]) -> float:
    """Mean distance in pixels between what a camera saw and the points that pairs of the others saw.

    Raises:
        DataError: no matches, fewer than three views, or cameras with several lenses.
    """
    if pixels.shape[1] == 0:
        raise DataError("no matched pixels: nothing tells the elevation; match the views again")
    if len(cameras) < 3 or any(not torch.equal(c.intrinsics, cameras[0].intrinsics) for c in cameras):
        raise DataError(f"needs three views or more with one lens; received {len(cameras)}")
    centres = torch.stack([camera.centre for camera in cameras]).double()
    turns = torch.stack([camera.viewmat[:3, :3] for camera in cameras]).double()
    k = cameras[0].intrinsics.double()
    flat = functional.pad((pixels.double() - k[:2, 2]) / k.diagonal()[:2], (0, 1), value=1.0)
    rays = functional.normalize(flat @ turns, dim=2)
    across = torch.eye(3, dtype=torch.float64) - rays[..., :, None] * rays[..., None, :]
    wanted = (across @ centres[:, None, :, None])[..., 0]
    total = []
    for one, other in itertools.combinations(range(len(cameras)), 2):
        system = across[one] + across[other] + 1e-9 * torch.eye(3, dtype=torch.float64)
        points = torch.linalg.solve(system, wanted[one] + wanted[other])
        for third in set(range(len(cameras))) - {one, other}:
            seen = (points - centres[third]) @ turns[third].T
            shown = seen[:, :2] / seen[:, 2:].clamp_min(1e-3) * k.diagonal()[:2] + k[:2, 2]
            total.append((shown - pixels[third].double()).norm(dim=1).mean())
    return float(torch.stack(total).mean())


def elevation_of(pixels: Float[Tensor, "5 n 2"], cameras_at: Callable[[float], Sequence[Camera]]) -> float:
    """The elevation in degrees, from -50 to 60, at which matched pixels fit together best.

    Raises:
        DataError: as for `reprojection`.
    """

    def best(candidates: Sequence[float]) -> float:
        return min(candidates, key=lambda degrees: reprojection(cameras_at(degrees), pixels))

    coarse = best([float(degrees) for degrees in range(-50, 61, 10)])
    return best([coarse + step for step in range(-10, 11)])


class Seen(NamedTuple):
    """Pictures of shapes with their masks [b, views, 4, h, w], and which voxels are inside [b, side^3]."""

    pictures: Tensor
    inside: Tensor


class CostVolumeNet(nn.Module):
    """What is inside a shape, from posed views with masks.

    Args:
        side: voxels on a side of the cube [-1, 1]^3.
        width: channels of the finest level.
        features: of a pixel.
        colours: whether pictures are looked at, or masks only.
    """

    def __init__(self, side: int = 24, width: int = 16, features: int = 8, colours: bool = True) -> None:
        super().__init__()
        self.side, self.colours = side, colours
        self.pixels = nn.Sequential(
            nn.Conv2d(4, features, 3, padding=1), nn.ReLU(), nn.Conv2d(features, features, 3, padding=1)
        )
        one, two = width, 2 * width
        shapes = {
            "into": (one, 3, 2 * features + 3),
            "first": (one, 3, one),
            "down": (two, 2, one),
            "low": (two, 3, two),
            "lower": (two, 2, two),
            "lowest": (two, 3, two),
            "rise": (two, 2, two),
            "mid": (two, 3, 2 * two),
            "up": (one, 2, two),
            "last": (one, 3, 2 * one),
        }
        self.weights, self.norms = nn.ParameterDict(), nn.ModuleDict()
        for name, (out, kernel, given) in shapes.items():
            scale = (2 / (given * kernel**3 / 2)) ** 0.5  # about half of the neighbours are there
            self.weights[name] = nn.Parameter(scale * torch.randn(out, kernel, kernel, kernel, given))
            self.norms[name] = nn.BatchNorm1d(out)
        self.out = nn.Linear(one, 1)

    def forward(
        self, pictures: Float[Tensor, "b n 4 h w"], cameras: Sequence[Camera]
    ) -> tuple[Float[Tensor, "b v"], Bool[Tensor, "b v"]]:
        """Logits of the voxels, x fastest, that all masks hold; and which these are.

        Raises:
            DataError: cameras with several lenses, or a shape with no voxel that two views see.
        """
        kept, places = self.voxels(pictures, cameras)
        batch, count = pictures.shape[:2]
        given = (
            pictures
            if self.colours
            else torch.cat([torch.zeros_like(pictures[:, :, :3]), pictures[:, :, 3:]], 2)
        )
        features = self.pixels(given.flatten(0, 1))
        grid = places.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
        found = functional.grid_sample(features, grid, align_corners=False)[:, :, 0].unflatten(
            0, (batch, count)
        )
        mean, variance = found.mean(1).mT, found.var(1, unbiased=False).mT
        own = cube(torch.zeros(3), 1.0, self.side).expand(batch, -1, -1)
        at = kept.nonzero()
        volume = torch.cat([mean, variance, own], 2)[kept]
        z, y, x = at[:, 1] // self.side**2, at[:, 1] // self.side % self.side, at[:, 1] % self.side
        sites = torch.stack([at[:, 0], z, y, x], 1).int()
        logits = self.unet(SparseConvTensor(volume, sites, (self.side,) * 3, batch))
        return torch.full(kept.shape, -20.0).masked_scatter(kept, logits), kept

    def voxels(
        self, pictures: Tensor, cameras: Sequence[Camera]
    ) -> tuple[Bool[Tensor, "b v"], Float[Tensor, "1 n v 2"]]:
        """Which voxels are in all masks that see them, and at least two; where the views see each."""
        if any(not torch.equal(camera.intrinsics, cameras[0].intrinsics) for camera in cameras):
            raise DataError("the views have several lenses: resample them to one")
        points, size = cube(torch.zeros(3), 1.0, self.side), pictures.shape[-1]
        places = torch.stack([pixels_of(camera, points)[0] for camera in cameras]) / size * 2 - 1
        grid = places.expand(len(pictures), -1, -1, -1).flatten(0, 1)[:, None]
        masks = pictures[:, :, 3:].flatten(0, 1)
        held = functional.grid_sample(masks, grid, align_corners=False)[:, 0, 0].unflatten(
            0, pictures.shape[:2]
        )
        inside = (places.abs() < 1).all(2)
        kept = ((held > 0.5) | ~inside).all(1) & (inside.sum(0) >= 2)
        if not bool(kept.any(1).all()):
            row = int((~kept.any(1)).int().argmax())
            raise DataError(
                f"no voxel of shape {row} is seen by two of {len(cameras)} views: check their poses"
            )
        return kept, places[None]

    def unet(self, volume: SparseConvTensor) -> Float[Tensor, " sites"]:
        """Submanifold convolutions on three levels of sites."""

        def act(features: Tensor, name: str) -> Tensor:
            return functional.relu(self.norms[name](features))

        def same(x: SparseConvTensor, name: str) -> SparseConvTensor:
            return x.replace_feature(act(subm_conv(x, self.weights[name]).features, name))

        def down(x: SparseConvTensor, name: str) -> SparseConvTensor:
            made: SparseConvTensor = sparse_conv(x, self.weights[name], stride=2)
            return made.replace_feature(act(made.features, name))

        def up(x: SparseConvTensor, fine: SparseConvTensor, name: str) -> SparseConvTensor:
            made = inverse_conv(x, self.weights[name], fine=fine, stride=2)
            return fine.replace_feature(torch.cat([act(made.features, name), fine.features], 1))

        one = same(same(volume, "into"), "first")
        two = same(down(one, "down"), "low")
        three = same(down(two, "lower"), "lowest")
        two = same(up(three, two, "rise"), "mid")
        one = same(up(two, one, "up"), "last")
        found: Tensor = self.out(one.features)[:, 0]
        return found


@dataclass(frozen=True)
class One2345:
    """How the network is trained.

    Attributes:
        steps: of the training.
        batch: shapes of a step.
        colours: whether pictures are looked at, or masks only.
        width: channels of the network's finest level.
    """

    steps: int = 120
    batch: int = 4
    colours: bool = True
    width: int = 16

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.width) < 1:
            raise ConfigError("give at least one step, shape and channel")

    def fit(self, shapes: Seen, cameras: Sequence[Camera], seed: int = 0) -> CostVolumeNet:
        """A network trained on shapes whose inside is known."""
        side = round(shapes.inside.shape[1] ** (1 / 3))
        model = fresh(CostVolumeNet, seed, side=side, width=self.width, colours=self.colours)

        def make(count: int, generator: torch.Generator) -> Seen:
            rows = torch.randint(len(shapes.pictures), (count,), generator=generator)
            return Seen(shapes.pictures[rows], shapes.inside[rows])

        def loss(net: nn.Module, batch: Seen) -> Tensor:
            logits, kept = net(batch.pictures, cameras)
            return functional.binary_cross_entropy_with_logits(logits[kept], batch.inside[kept].float())

        batches = Drawn(make, self.batch, self.steps)
        Job(batches, loss=loss, recipe=RECIPE, seed=seed).fit(model, macs=lambda: 0.0).run()
        return model.eval()
