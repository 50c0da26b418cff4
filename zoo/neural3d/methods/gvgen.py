"""GVGEN's volumes: as many Gaussians as a grid has nodes, exactly, each at a node plus an offset.

He et al., "GVGEN: Text-to-3D Generation with Volumetric Representation", ECCV 2024: the fitting of a
GaussianVolume with a candidate pool. A Gaussian that is pruned gives its node back to the pool; one that is
cloned or split must claim the nearest node of the pool, at most 1.5 nodes away along each axis, or is not
made. At three quarters of the training all pooled nodes come back, so that the count is that of the grid:
dynamic sparse training of points. The loss of 3DGS has 20 mean ReLU(|offset| - 1.5 nodes).

Differs from the released code: rotation stays a quaternion; the schedule is in shares of the training; what
is "too large" is a scale above 0.1 of the volume. Volumes from text: `zoo.neural3d.methods.gvgen_text`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.neural3d.cameras import Camera
from zoo.neural3d.metrics import ssim_map_mean
from zoo.neural3d.refine import RATES, RECIPE
from zoo.neural3d.splats import SH_C0, Splats
from zoo.neural3d.views import View, ViewBatches
from zoo.shared.ops.rasterize import rasterize
from zoo.shared.ops.rasterize_reference import rotations
from zoo.shared.structure.resize import RowResizer
from zoo.shared.train import Job, Recipe
from zoo.shared.train.fit import Fit

NAMES = ("offsets", "quats", "scales", "opacities", "sh0")
LIMITS = {
    "offsets": (-0.15, 0.15),
    "sh0": (-2, 5),
    "scales": (-6, -2),
    "quats": (-1, 1),
    "opacities": (-7, 7),
}
REACH = 1.5  # nodes that an offset may span along an axis


class GaussianVolume(nn.Module):
    """Gaussians at the nodes of a grid over [-0.5, 0.5]^3.

    Args:
        side: nodes along an axis.
        background: colour where nothing is.
        offsets: whether Gaussians may leave their nodes.

    Raises:
        ConfigError: fewer than two nodes a side.
    """

    def __init__(self, side: int, background: tuple[float, float, float], offsets: bool = True) -> None:
        super().__init__()
        if side < 2:
            raise ConfigError(f"a volume has two nodes a side or more; received {side}")
        self.side, self.movable = side, offsets
        line = torch.linspace(-0.5, 0.5, side)
        grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
        count = len(grid)
        self.register_buffer("grid", grid)
        self.register_buffer("nodes", torch.arange(count))
        self.register_buffer("background", torch.tensor(background))
        self.grid: Tensor
        self.nodes: Tensor
        self.background: Tensor
        self.offsets = nn.Parameter(torch.zeros(count, 3), requires_grad=offsets)
        self.quats = nn.Parameter(torch.tensor([1.0, 0, 0, 0]).repeat(count, 1))
        self.scales = nn.Parameter(torch.full((count, 3), 0.5 / (side - 1)).log())
        self.opacities = nn.Parameter(torch.full((count,), 0.1).logit())
        self.sh0 = nn.Parameter(torch.zeros(count, 1, 3))
        self.clamp()

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def reach(self) -> float:
        """How far an offset may go along an axis."""
        return REACH / (self.side - 1)

    @property
    def means(self) -> Float[Tensor, "n 3"]:
        """Nodes plus offsets."""
        return self.grid[self.nodes] + self.offsets

    @torch.no_grad()
    def clamp(self) -> None:
        """Hold every attribute in its published range."""
        for name, (low, high) in LIMITS.items():
            self.get_parameter(name).clamp_(low, high)

    def excess(self) -> Float[Tensor, ""]:
        """What offsets go beyond their reach, on average: part of the loss."""
        return (self.offsets.abs() - self.reach).clamp_min(0).mean()

    def forward(self, camera: Camera, shift: Tensor | None = None) -> Float[Tensor, "h w 3"]:
        """The colours that the camera sees."""
        return rasterize(
            self.means,
            self.quats,
            self.scales.exp(),
            self.opacities.sigmoid(),
            self.sh0,
            camera.viewmat,
            camera.intrinsics,
            camera.width,
            camera.height,
            sh_degree=0,
            shift=shift,
            background=self.background,
        ).colour

    def pooled(self) -> Int[Tensor, " k"]:
        """The nodes that no Gaussian has."""
        free = torch.ones(len(self.grid), dtype=torch.bool)
        free[self.nodes] = False
        return free.nonzero()[:, 0]

    @property
    def splats(self) -> Splats:
        """The volume as a scene."""
        parts = self.means, self.quats, self.scales, self.opacities, self.sh0
        return Splats(*(part.detach() for part in parts))

    def placed(self, centre: Tensor, width: float) -> Splats:
        """The scene where the box of that centre [3] and width was before `boxed`."""
        own = self.splats
        return replace(own, means=own.means * width + centre, scales=own.scales + math.log(width))


def boxed(views: Sequence[View], centre: Tensor, width: float) -> list[View]:
    """The views of an object, moved and scaled so that it is in [-0.5, 0.5]^3."""
    out = []
    for view in views:
        camera, viewmat = view.camera, view.camera.viewmat.clone()
        viewmat[:3, 3] = (viewmat[:3, 3] + viewmat[:3, :3] @ centre) / width
        moved = Camera(viewmat, camera.intrinsics, camera.width, camera.height)
        out.append(replace(view, camera=moved, depth=None))
    return out


def claimed(
    places: Float[Tensor, "m 3"], pool: Float[Tensor, "k 3"], reach: float
) -> tuple[Int[Tensor, " c"], Int[Tensor, " c"]]:
    """Which places get which node of the pool: each wants the nearest, no further than `reach` along any
    axis; of several that want the same the closest gets it. A pool that is empty gives none."""
    empty = torch.zeros(0, dtype=torch.int64)
    if not len(places) or not len(pool):
        return empty, empty
    distance, wanted = cKDTree(pool.numpy()).query(places.numpy())
    near = (places - pool[torch.from_numpy(wanted)]).abs().amax(1) <= reach
    taken: dict[int, int] = {}
    for place in distance.argsort(kind="stable"):
        if near[place]:
            taken.setdefault(int(wanted[place]), int(place))
    return torch.tensor([*taken.values()], dtype=torch.int64), torch.tensor([*taken], dtype=torch.int64)


@dataclass(frozen=True)
class VolumeFit:
    """How a volume is fitted.

    Attributes:
        side: nodes along an axis.
        steps: on one view each.
        pool: whether Gaussians are pruned, cloned and split through the pool.
        offsets: whether they may leave their nodes.
        every: steps between changes.
        gradient: of the place on a screen of side 2 above which a Gaussian is cloned or split.
        seed: of everything random.
    """

    side: int = 12
    steps: int = 800
    pool: bool = True
    offsets: bool = True
    every: int = 40
    gradient: float = 2e-4
    seed: int = 0

    def fit(self, views: Sequence[View], background: tuple[float, float, float]) -> GaussianVolume:
        """A volume of side^3 Gaussians for an object inside [-0.5, 0.5]^3."""
        volume = GaussianVolume(self.side, background, self.offsets)
        rates = {**RATES, "offsets": 2e-3, "scales": 1e-2, "sh0": 2e-2}
        trained = [name for name in NAMES if volume.get_parameter(name).requires_grad]
        groups = [{"params": [volume.get_parameter(n)], "lr": rates[n], "name": n} for n in trained]
        growth = _Growth(self, volume)
        job = Job(ViewBatches(list(views)), loss=growth.loss, recipe=Recipe(**RECIPE), seed=self.seed)
        fit = job.fit(
            volume,
            parameters=groups,
            penalty=lambda: 20 * volume.excess(),
            macs=lambda: 0.0,
            steps=self.steps,
        )
        growth.start(fit)
        fit.run(after_step=growth.after_step)
        return volume


class _Growth:
    """What a step descends, and the pool."""

    def __init__(self, method: VolumeFit, volume: GaussianVolume) -> None:
        self.method, self.volume = method, volume
        self.generator = torch.Generator().manual_seed(method.seed)
        self.shift = torch.zeros(0, 2)
        self.pull, self.seen = torch.zeros(len(volume)), torch.zeros(len(volume))

    def start(self, fit: Fit) -> None:
        self.fit = fit
        self.resizer = RowResizer(self.volume, NAMES, [fit.optimizer])

    def loss(self, volume: nn.Module, view: View) -> Tensor:
        """0.8 L1 + 0.2 (1 - SSIM), of 3DGS."""
        self.shift = torch.zeros(len(self.volume), 2, requires_grad=True)
        found = volume(view.camera, self.shift)
        self.side = max(view.camera.width, view.camera.height)
        return 0.8 * (found - view.image).abs().mean() + 0.2 * (1 - ssim_map_mean(found, view.image))

    def after_step(self) -> None:
        self.volume.clamp()
        step, steps = self.fit.step, self.method.steps
        if not self.method.pool or step > 0.75 * steps:
            return
        if self.shift.grad is not None:
            pull = self.shift.grad.norm(dim=1) * self.side / 2
            self.pull += pull
            self.seen += pull > 0
        if step == int(0.75 * steps):
            self.refill()
        elif step >= 0.025 * steps and step % self.method.every == 0:
            self.prune()
            self.densify()
        if len(self.pull) != len(self.volume):
            self.pull, self.seen = torch.zeros(len(self.volume)), torch.zeros(len(self.volume))

    def prune(self) -> None:
        """Give faint and very large Gaussians' nodes to the pool."""
        volume = self.volume
        good = (volume.opacities.sigmoid() >= 0.005) & (volume.scales.exp().amax(1) <= 0.1)
        if not bool(good.any()):
            return
        self.resizer.keep(good)
        volume.nodes, self.pull, self.seen = volume.nodes[good], self.pull[good], self.seen[good]

    def densify(self) -> None:
        """Clone small and split large Gaussians whose place matters, as far as the pool has nodes."""
        volume = self.volume
        wanted = self.pull / self.seen.clamp_min(1) > self.method.gradient
        large = volume.scales.detach().exp().amax(1) > 0.01
        small, split = (wanted & ~large).nonzero()[:, 0], (wanted & large).nonzero()[:, 0].repeat(2)
        values = {name: volume.get_parameter(name).detach() for name in NAMES}
        draws = torch.randn(len(split), 3, generator=self.generator) * values["scales"][split].exp()
        turned = (rotations(values["quats"][split]) @ draws[:, :, None])[:, :, 0]
        means = volume.means.detach()
        rows = torch.cat([small, split])
        places = torch.cat([means[small], means[split] + turned])
        pool = volume.pooled()
        which, node = claimed(places, volume.grid[pool], volume.reach)
        new = {name: value[rows[which]] for name, value in values.items()}
        new["offsets"] = places[which] - volume.grid[pool[node]]
        shrunk = (which >= len(small)).float()[:, None] * torch.tensor(1.6).log()
        new["scales"] = new["scales"] - shrunk
        self._append(new, pool[node])

    def refill(self) -> None:
        """Bring all nodes of the pool back, faint and dark."""
        pool = self.volume.pooled()
        count = len(pool)
        dark = torch.rand(count, 1, 3, generator=self.generator) * 0.1
        new = {
            "offsets": torch.zeros(count, 3),
            "quats": torch.tensor([1.0, 0, 0, 0]).repeat(count, 1),
            "scales": torch.full((count, 3), 0.5 * torch.tensor(0.0032).log().item()),
            "opacities": torch.full((count,), 1e-4).logit(),
            "sh0": (dark - 0.5) / SH_C0,
        }
        self._append(new, pool)

    def _append(self, new: dict[str, Tensor], nodes: Tensor) -> None:
        if len(nodes):
            self.resizer.append(new)
            self.volume.nodes = torch.cat([self.volume.nodes, nodes])
        self.pull, self.seen = torch.zeros(len(self.volume)), torch.zeros(len(self.volume))
