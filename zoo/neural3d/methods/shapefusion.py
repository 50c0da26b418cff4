"""ShapeFusion: edits of a region of a mesh by diffusion that leaves all other vertices as they are.

Potamias et al., "ShapeFusion: A 3D diffusion model for localized shape editing", ECCV 2024. Noise is added to
a mask M of vertices only,

    x_t = (1 - M) x_0 + M (sqrt(a_t) x_0 + sqrt(1 - a_t) e),

and a network of spiral convolutions on two levels of the mesh says e from x_t, M, a code of the vertex and
one of t. In training M is a ball of edges round a random anchor, without the anchor itself; so an edit is:
move the anchor, sample the rest of the ball. What is not in M is put back at every step, hence the same bits.

Differs from the paper, of which the notes at hand give no lengths: 50 times, spirals of 9, balls of 1 to 4
edges, two levels, a toy family of shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError, DataError
from zoo.neural3d.networks import fresh
from zoo.neural3d.spirals import ball, edges_of, grown, icosphere, spirals
from zoo.shared.train import Drawn, Job, Recipe

SPIRAL, TIMES, HOPS = 9, 50, 4
SCALE = 0.16  # deviation of a vertex from the sphere
RECIPE = Recipe(lr=3e-3, optimizer="adam", weight_decay=0.0, warmup=0.05, decay="cosine", clip=1.0, epochs=1)


class Sphere(NamedTuple):
    """The mesh of a family of shapes, and its edges."""

    rest: Tensor
    faces: Tensor
    parents: list[Tensor]
    edges: Tensor


def sphere(levels: int) -> Sphere:
    """A refined icosahedron: 162 vertices at level two."""
    rest, faces, parents = icosphere(levels)
    return Sphere(rest, faces, parents, edges_of(faces))


def shapes(rest: Float[Tensor, "v 3"], count: int, generator: torch.Generator) -> Float[Tensor, "b v 3"]:
    """Random shapes of one family: spheres stretched along random axes, with three bumps or dents each."""
    stretch = 0.1 * torch.randn(count, 3, 3, generator=generator)
    places = rest @ (torch.eye(3) + stretch + stretch.mT)
    for _ in range(3):
        middle = functional.normalize(torch.randn(count, 1, 3, generator=generator), dim=2)
        height = 0.2 * torch.randn(count, 1, 1, generator=generator)
        near = (8 * ((rest * middle).sum(2, keepdim=True) - 1)).exp()
        places = places + height * near * rest
    return places


def schedule() -> Float[Tensor, " 51"]:
    """a_t at t = 0 (no noise) to 50, the squared cosine of Nichol and Dhariwal."""
    angle = (torch.arange(TIMES + 1) / TIMES * 0.99 + 0.008) / 1.008 * math.pi / 2
    found = angle.cos().square()
    return found / found[0]


def noised(
    clean: Float[Tensor, "b v 3"], mask: Bool[Tensor, "b v"], share: Float[Tensor, " b"], noise: Tensor
) -> Float[Tensor, "b v 3"]:
    """Noise in the mask, and nothing else changed."""
    share = share[:, None, None]
    return torch.where(mask[..., None], share.sqrt() * clean + (1 - share).sqrt() * noise, clean)


def check_region(edges: Tensor, mask: Bool[Tensor, " v"], anchor: int) -> None:
    """Refuse what is no region round an anchor.

    Raises:
        DataError: an empty mask, one that holds the anchor, or one that is not connected.
    """
    if not bool(mask.any()):
        raise DataError("the mask is empty, or holds the anchor only: there is nothing to sample")
    if bool(mask[anchor]):
        raise DataError(f"the anchor, vertex {anchor}, is in the mask: it is what the edit holds on to")
    region = mask.clone()
    region[anchor] = True
    reached = torch.zeros_like(region)
    reached[anchor] = True
    while not torch.equal(more := grown(edges, reached) & region, reached):
        reached = more
    if not torch.equal(reached, region):
        raise DataError(
            f"the mask is not connected: {int((region & ~reached).sum())} of its {int(mask.sum())} vertices "
            f"are not reached from the anchor {anchor}"
        )


class SpiralNet(nn.Module):
    """The noise in masked vertices of shapes on a refined sphere.

    Args:
        levels: of the sphere's refinement.
        width: channels of the fine level; the coarse one has twice as many.
        code: numbers learned for each vertex.
    """

    def __init__(self, levels: int = 2, width: int = 32, code: int = 8) -> None:
        super().__init__()
        with torch.device("cpu"):  # also where a card's arguments are checked without memory
            mesh, coarse = sphere(levels), sphere(levels - 1)
            fine_spirals, coarse_spirals = spirals(mesh.faces, SPIRAL), spirals(coarse.faces, SPIRAL)
        self.few = len(coarse.rest)
        self.rest = mesh.rest  # no buffer: storing weights in half precision must not round the mesh
        self.register_buffer("edges", mesh.edges, persistent=False)
        self.register_buffer("parents", mesh.parents[-1], persistent=False)
        self.register_buffer("fine", fine_spirals, persistent=False)
        self.register_buffer("coarse", coarse_spirals, persistent=False)
        self.edges: Tensor
        self.parents: Tensor
        self.fine: Tensor
        self.coarse: Tensor
        self.codes = nn.Parameter(0.1 * torch.randn(len(mesh.rest), code))
        self.time = nn.Linear(16, 3 * width)
        self.into = nn.Linear(SPIRAL * (7 + code), width)
        self.one = nn.Linear(SPIRAL * width, width)
        self.down = nn.Linear(SPIRAL * width, 2 * width)
        self.low = nn.Linear(SPIRAL * 2 * width, 2 * width)
        self.up = nn.Linear(SPIRAL * 3 * width, width)
        self.out = nn.Linear(SPIRAL * width, 3)

    @classmethod
    def trained(cls, seed: int, **options: Any) -> SpiralNet:
        """The network as `ShapeFusion(**options)` trains it."""
        return ShapeFusion(**options).fit(seed)

    def forward(
        self, places: Float[Tensor, "b v 3"], mask: Bool[Tensor, "b v"], time: Float[Tensor, " b"]
    ) -> Float[Tensor, "b v 3"]:
        """The noise; places are offsets from the sphere over their deviation, times from 0 to 1.

        Raises:
            DataError: shapes of another mesh.
        """
        if places.shape[1] != len(self.rest):
            raise DataError(f"shapes of {places.shape[1]} vertices; the mesh has {len(self.rest)}")
        rates = 2.0 ** torch.arange(8)
        when = torch.cat([(time[:, None] * rates).sin(), (time[:, None] * rates).cos()], 1)
        early, late = self.time(when)[:, None].split([len(self.into.bias), len(self.low.bias)], 2)
        own = torch.cat([self.rest, self.codes], 1).expand(len(places), -1, -1)
        value = torch.cat([places, mask[..., None].float(), own], 2)
        value = functional.silu(_gather(self.into, value, self.fine) + early)
        fine = value + functional.silu(_gather(self.one, value, self.fine))
        # A level's vertices are the first of the next one's.
        value = functional.silu(_gather(self.down, fine[:, : self.few], self.coarse) + late)
        value = value + functional.silu(_gather(self.low, value, self.coarse))
        wide = torch.cat([value, value[:, self.parents].mean(2)], 1)
        value = fine + functional.silu(_gather(self.up, torch.cat([fine, wide], 2), self.fine))
        return _gather(self.out, value, self.fine)

    @torch.no_grad()
    def edit(
        self,
        shape: Float[Tensor, "v 3"],
        mask: Bool[Tensor, " v"],
        anchor: int,
        to: Float[Tensor, " 3"],
        samples: int,
        generator: torch.Generator,
    ) -> Float[Tensor, "samples v 3"]:
        """Shapes with the anchor at a new place and new vertices in the mask; all others keep their bits.

        Raises:
            DataError: as for `check_region`; a shape of another mesh.
        """
        if shape.shape[0] != len(self.rest):
            raise DataError(f"a shape of {shape.shape[0]} vertices; the mesh has {len(self.rest)}")
        check_region(self.edges, mask, anchor)
        moved = shape.clone()
        moved[anchor] = to
        known = ((moved - self.rest) / SCALE).expand(samples, -1, -1)
        masks, shares = mask.expand(samples, -1), schedule()
        value = torch.where(masks[..., None], torch.randn(known.shape, generator=generator), known)
        for step in range(TIMES, 0, -1):
            share, less = shares[step], shares[step - 1]
            noise = self(value, masks, torch.full((samples,), step / TIMES))
            clean = ((value - (1 - share).sqrt() * noise) / share.sqrt()).clamp(-5, 5)
            beta = 1 - share / less
            mean = (less.sqrt() * beta * clean + (share / less).sqrt() * (1 - less) * value) / (1 - share)
            spread = (beta * (1 - less) / (1 - share)).sqrt()
            value = mean + spread * torch.randn(value.shape, generator=generator)
            value = torch.where(masks[..., None], value, known)
        return torch.where(masks[..., None], self.rest + SCALE * value, moved)


def _gather(layer: nn.Linear, value: Float[Tensor, "b v c"], spiral: Tensor) -> Float[Tensor, "b v d"]:
    """A spiral convolution: a linear map of the values along each vertex's spiral."""
    found: Tensor = layer(value[:, spiral].flatten(2))
    return found


@dataclass(frozen=True)
class ShapeFusion:
    """How the network is trained.

    Attributes:
        levels: of the sphere's refinement.
        steps: of the training.
        batch: shapes of a step.
    """

    levels: int = 2
    steps: int = 300
    batch: int = 16

    def __post_init__(self) -> None:
        if min(self.levels, self.steps, self.batch) < 1:
            raise ConfigError("give at least one level, step and shape")

    def fit(self, seed: int = 0) -> SpiralNet:
        """A trained network."""
        model = fresh(SpiralNet, seed, levels=self.levels)
        mesh, shares = sphere(self.levels), schedule()
        balls = torch.stack(
            [
                torch.stack([ball(mesh.edges, len(mesh.rest), centre, hops + 1) for hops in range(HOPS)])
                for centre in range(len(mesh.rest))
            ]
        )
        balls[torch.arange(len(balls)), :, torch.arange(len(balls))] = False

        def make(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            clean = (shapes(mesh.rest, count, generator) - mesh.rest) / SCALE
            anchors = torch.randint(len(balls), (count,), generator=generator)
            mask = balls[anchors, torch.randint(HOPS, (count,), generator=generator)]
            time = torch.randint(1, TIMES + 1, (count,), generator=generator)
            return clean, mask, time, torch.randn(clean.shape, generator=generator)

        def loss(net: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
            clean, mask, time, noise = batch
            found = net(noised(clean, mask, shares[time], noise), mask, time / TIMES)
            wrong = ((found - noise).square().mean(2) * mask).sum() / mask.sum()
            return wrong

        Job(Drawn(make, self.batch, self.steps), loss=loss, recipe=RECIPE, seed=seed).fit(
            model, macs=lambda: 0.0
        ).run()
        return model.eval()


@dataclass(frozen=True)
class Components:
    """What the diffusion is compared with: the mean and the first principal components of the family, fitted
    to all vertices that an edit does not sample."""

    mean: Tensor
    basis: Tensor

    @classmethod
    def of(cls, known: Float[Tensor, "n v 3"], count: int) -> Components:
        """The first components of shapes."""
        mean = known.mean(0)
        return cls(mean, torch.linalg.svd((known - mean).flatten(1), full_matrices=False).Vh[:count])

    def edit(
        self, shape: Float[Tensor, "v 3"], mask: Bool[Tensor, " v"], anchor: int, to: Float[Tensor, " 3"]
    ) -> Float[Tensor, "v 3"]:
        """The shape of the components' span that is nearest to the moved anchor and the vertices outside the
        mask."""
        wanted = shape.clone()
        wanted[anchor] = to
        rows = (~mask).repeat_interleave(3)
        away = (wanted - self.mean).flatten()
        found = torch.linalg.lstsq(self.basis[:, rows].T, away[rows, None]).solution[:, 0]
        return self.mean + (found @ self.basis).reshape(-1, 3)
