"""OReX: a closed surface through planar cross-sections, by a small network that corrects itself.

Sawdayee et al., "OReX: Object Reconstruction from Planar Cross-sections Using Neural Fields", CVPR 2023. One
network, applied several times over to the same point, adds to the logit of "outside" and renews a hidden
state; the loss is the mean over these iterations of

    BCE(logit, label)    0 inside, 1 outside, 1/2 on the contour

and 1e-4 max(0, |gradient of the last logit| - 100), which holds it back from steps between the planes.
Samples come nearer to the contours from level to level, each training stage takes the last three levels.

Differs from the released code: float32, marching tetrahedra in place of dual contouring, Adam begins anew at
each stage, and hulls are of the vertices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy
import torch
from jaxtyping import Bool, Float
from matplotlib.path import Path as Polygon
from scipy.interpolate import RBFInterpolator
from scipy.spatial import ConvexHull, cKDTree
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import DataError
from zoo.neural3d.meshes import isosurface
from zoo.neural3d.views import data_folder
from zoo.shared.train import Job, Recipe

RADII = [0.5**power for power in (4, 5, 5, 6, 6, 7)]  # of the samples of each level
AROUND = (2, 2, 3, 3, 4, 5)  # samples round each vertex and edge
EPOCHS = (50, 50, 100, 100, 150, 200)  # of the released stages
UNIFORM = 2048  # points of a plane
HULL = 4096  # points round the whole


@dataclass(frozen=True)
class Sections:
    """Closed contours on planes, inside [-1, 1]^3.

    Attributes:
        planes: [p, 4], n . x + d = 0.
        contours: [k, 3] vertices each, in order, the last joined to the first.
        plane_of: of each contour.
        name: for messages.
    """

    planes: Tensor
    contours: list[Tensor]
    plane_of: list[int]
    name: str = ""

    def __post_init__(self) -> None:
        if not len(self.planes) or not self.contours:
            raise DataError(f"{self.name}: {len(self.planes)} planes and {len(self.contours)} contours")
        for number, (contour, plane) in enumerate(zip(self.contours, self.plane_of, strict=True)):
            if len(contour) < 3:
                raise DataError(f"{self.name}: contour {number} has {len(contour)} vertices, no closed loop")
            off = float((contour.double() @ self.planes[plane, :3] + self.planes[plane, 3]).abs().max())
            if off > 1e-3:
                raise DataError(f"{self.name}: contour {number} is {off:.3g} off its plane {plane}")
            if float(contour.abs().max()) > 1:
                raise DataError(f"{self.name}: contour {number} leaves [-1, 1]^3; scale the sections")

    @property
    def vertices(self) -> Float[Tensor, "n 3"]:
        """Those of all contours."""
        return torch.cat(self.contours)

    def frame(self, plane: int) -> tuple[Tensor, Tensor]:
        """A point [3] of a plane and two directions [2, 3] in it."""
        normal = self.planes[plane, :3]
        basis = torch.linalg.svd(normal[None], full_matrices=True).Vh[1:]
        return -normal * self.planes[plane, 3], basis

    def inside(self, plane: int, flat: Float[Tensor, "n 2"]) -> Bool[Tensor, " n"]:
        """Which points of a plane, in its frame, are inside an odd number of its contours."""
        origin, basis = self.frame(plane)
        count = numpy.zeros(len(flat), numpy.int64)
        for contour, own in zip(self.contours, self.plane_of, strict=True):
            if own == plane:
                polygon = Polygon(((contour.double() - origin) @ basis.T).numpy())
                count += polygon.contains_points(flat.numpy())
        return torch.from_numpy(count % 2 == 1)


def load_sections(name: str) -> tuple[Sections, tuple[Tensor, Tensor] | None]:
    """The sections `name` of ZOO_DATA/orex-csl, and the vertices and faces of the true surface if known.

    Raises:
        DataError: not there, or refused by `Sections`.
    """
    path = data_folder("orex-csl") / f"{name}.npz"
    if not path.exists():
        raise DataError(f"no sections {name!r} in {path.parent}")
    with numpy.load(path, allow_pickle=False) as data:
        vertices, starts = torch.from_numpy(data["vertices"]), data["contour_start"]
        index = torch.from_numpy(data["contour_index"]).long()
        contours = [vertices[index[a:b]] for a, b in zip(starts[:-1], starts[1:], strict=True)]
        sections = Sections(torch.from_numpy(data["planes"]), contours, data["contour_plane"].tolist(), name)
        if "ref_vertices" not in data:
            return sections, None
        return sections, (torch.from_numpy(data["ref_vertices"]), torch.from_numpy(data["ref_faces"]).long())


def samples(sections: Sections, level: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points [n, 3] of a level of the schedule and their labels [n]: 0 inside, 1 outside, 1/2 between."""
    radius, each = RADII[level], AROUND[level]
    points, labels = [], []

    def add(plane: int, flat: Tensor, on_contour: bool = False) -> None:
        origin, basis = sections.frame(plane)
        points.append((origin + flat @ basis).float())
        known = torch.full((len(flat),), 0.5) if on_contour else (~sections.inside(plane, flat)).float()
        labels.append(known)

    for contour, plane in zip(sections.contours, sections.plane_of, strict=True):
        origin, basis = sections.frame(plane)
        flat = (contour.double() - origin) @ basis.T
        angle = 2 * math.pi * (torch.arange(each) / each + torch.rand(len(flat), 1, generator=generator))
        add(plane, (flat[:, None] + radius * torch.stack([angle.cos(), angle.sin()], 2)).reshape(-1, 2))
        ahead = flat.roll(-1, 0) - flat
        across = functional.normalize(torch.stack([-ahead[:, 1], ahead[:, 0]], 1), dim=1)
        share = torch.rand(len(flat), each, 1, generator=generator)
        on = (flat[:, None] + share * ahead[:, None]).reshape(-1, 2)
        away = radius * across.repeat_interleave(each, 0)
        add(plane, on, on_contour=True)
        add(plane, on + away)
        add(plane, on - away)
    for plane in range(len(sections.planes)):
        add(plane, torch.rand(UNIFORM, 2, generator=generator).double() * 2 - 1)
    corners = sections.vertices
    hull = corners[torch.from_numpy(ConvexHull(corners.numpy()).simplices).long()].mean(1)
    drawn = hull[torch.randint(len(hull), (HULL,), generator=generator)]
    middle = sections.vertices.mean(0)
    points.append(middle + 1.05 * (drawn - middle))
    labels.append(torch.ones(HULL))
    return torch.cat(points), torch.cat(labels)


class IterativeField(nn.Module):
    """The logit of "outside" at points of [-1, 1]^3, corrected in several iterations by one network.

    Args:
        iterations: of it; one for a plain network.
        width, depth: of the hidden layers.
        memory: numbers of the hidden state.
        frequencies: of the encoding, learned, from one doubling.
    """

    def __init__(
        self, iterations: int = 10, width: int = 64, depth: int = 7, memory: int = 32, frequencies: int = 5
    ) -> None:
        super().__init__()
        self.iterations = iterations
        self.sines = nn.Parameter(2.0 ** torch.arange(frequencies))
        self.cosines = nn.Parameter(2.0 ** torch.arange(frequencies))
        self.logit, self.state = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(memory))
        sizes = [3 + 6 * frequencies + 1 + memory, *[width] * depth, 1 + memory]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.uniform_(layer.bias)
        rates = 10000.0 ** (-torch.arange(0, memory, 2) / memory)
        turns = torch.arange(iterations)[:, None] * rates
        codes = torch.stack([turns.sin(), turns.cos()], 2).reshape(iterations, memory)
        self.register_buffer("codes", codes, persistent=False)
        self.codes: Tensor

    def steps(self, points: Float[Tensor, "n 3"]) -> list[Float[Tensor, " n"]]:
        """The logit after each iteration."""
        waves = [(points[:, :, None] * self.sines).sin(), (points[:, :, None] * self.cosines).cos()]
        seen = torch.cat([points, *(wave.flatten(1) for wave in waves)], 1)
        logit, state, found = self.logit.expand(len(points), 1), self.state.expand(len(points), -1), []
        for code in self.codes:
            value = torch.cat([seen, logit, state + code], 1)
            for layer in self.layers[:-1]:
                value = functional.leaky_relu(layer(value))
            value = self.layers[-1](value)
            logit, state = logit + value[:, :1], value[:, 1:]
            found.append(logit[:, 0])
        return found

    def forward(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """The last logit."""
        return self.steps(points)[-1]


@dataclass(frozen=True)
class OReX:
    """How the field is trained.

    Attributes:
        iterations: of the network.
        hinge: whether steep gradients are held back.
        steps: in all, divided over the stages as the released epochs.
        batch: points of a step.
        lr: at the start, times 0.9 every ten released epochs.
    """

    iterations: int = 10
    hinge: bool = True
    steps: int = 600
    batch: int = 4096
    lr: float = 1e-2

    def fit(self, sections: Sections, seed: int = 0) -> IterativeField:
        """A field that agrees with the sections."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = IterativeField(self.iterations)
        levels = [samples(sections, level, generator) for level in range(len(RADII))]
        for stage, epochs in enumerate(EPOCHS):
            own = levels[max(0, stage - 2) : stage + 1]
            steps = max(1, round(self.steps * epochs / sum(EPOCHS)))
            points, labels = (torch.cat(parts) for parts in zip(*own, strict=True))
            batches = PointBatches(points, labels, self.batch)
            recipe = Recipe(
                lr=self.lr * 0.9 ** (sum(EPOCHS[:stage]) / 10),
                steps=steps,
                optimizer="adam",
                weight_decay=1e-3,
                warmup=0.0,
                decay="linear" if stage + 1 == len(EPOCHS) else "constant",
                clip=1.0,
            )
            Job(batches, loss=self.loss, recipe=recipe, seed=seed + 1000 * stage).fit(
                model, macs=lambda: 0.0
            ).run()
        return model.eval()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of points and labels."""
        assert isinstance(model, IterativeField)
        points, labels = batch
        found = torch.stack(
            [functional.binary_cross_entropy_with_logits(one, labels) for one in model.steps(points)]
        )
        if not self.hinge:
            return found.mean()
        some = points[:: max(1, len(points) // 256)].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(some).sum(), some, create_graph=True)
        return found.mean() + 1e-4 * (slope.norm(dim=1) - 100).clamp_min(0).mean()


@dataclass(frozen=True)
class PointBatches:
    """Batches of points and labels, in a new order each epoch."""

    points: Tensor
    labels: Tensor
    batch: int = field(default=4096)

    def __len__(self) -> int:
        return max(1, len(self.points) // self.batch)

    def draw(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.points), generator=generator)
        for number in range(len(self)):
            rows = order[number * self.batch : (number + 1) * self.batch]
            yield self.points[rows], self.labels[rows]

    def example(self) -> tuple[Tensor]:
        return (self.points[:1],)


def volume(values_at: nn.Module | RBFInterpolator, size: int) -> Float[Tensor, "n n n"]:
    """A field on a grid of [-1, 1]^3, positive outside; at the border it is outside."""
    line = torch.linspace(-1, 1, size)
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    with torch.no_grad():
        parts = [
            values_at(part)
            if isinstance(values_at, nn.Module)
            else torch.from_numpy(values_at(part.double().numpy())).float()
            for part in points.split(16384)
        ]
    found = torch.cat(parts).reshape(size, size, size)
    inner = torch.zeros(size, size, size, dtype=torch.bool)
    inner[1:-1, 1:-1, 1:-1] = True
    return torch.where(inner, found, found.abs().clamp_min(1e-6))


def surface(values: Float[Tensor, "n n n"]) -> tuple[Tensor, Tensor]:
    """The closed surface of a volume of [-1, 1]^3: vertices and faces, fronts outwards.

    Raises:
        DataError: there is none.
    """
    return isosurface(values, torch.full((3,), -1.0), torch.full((3,), 1.0))


def rbf(sections: Sections, points: int = 2500, seed: int = 0) -> RBFInterpolator:
    """What the field is compared with: the biharmonic interpolation of signed distances to the contours,
    measured in the planes, positive outside (Carr et al. 2001)."""
    generator = torch.Generator().manual_seed(seed)
    known, values = [], []
    for plane in range(len(sections.planes)):
        own = [c for c, p in zip(sections.contours, sections.plane_of, strict=True) if p == plane]
        if not own:
            continue
        origin, basis = sections.frame(plane)
        flat = [(contour.double() - origin) @ basis.T for contour in own]
        dense = torch.cat([a + s * (a.roll(-1, 0) - a) for a in flat for s in (0.0, 0.25, 0.5, 0.75)])
        near = torch.cat(flat)
        near = near + 0.05 * torch.randn(near.shape, generator=generator).double()
        here = torch.cat([torch.rand(200, 2, generator=generator).double() * 2 - 1, near, *flat])
        distance = torch.from_numpy(cKDTree(dense.numpy()).query(here.numpy())[0])
        known.append(origin + here @ basis)
        values.append(torch.where(sections.inside(plane, here), -distance, distance))
    at, value = torch.cat(known), torch.cat(values)
    rows = torch.randperm(len(at), generator=generator)[:points]
    return RBFInterpolator(at[rows].numpy(), value[rows].numpy(), kernel="linear", smoothing=1e-6)
