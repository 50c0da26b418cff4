"""A jointed toy body: a skeleton of 15 joints with a mesh of tubes, posed, seen and drawn.

It stands in for SMPL, whose files cannot be shipped: poses are rotations at joints, shapes are lengths of
torso, arms and legs, and every vertex moves with one bone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

PARENTS = (-1, 0, 1, 1, 3, 4, 1, 6, 7, 0, 9, 10, 0, 12, 13)
OFFSETS = torch.tensor(  # from the parent, at rest; y points down
    [
        [0, 0, 0],
        [0, -0.5, 0],
        [0, -0.24, 0],
        *([0.17, 0.03, 0], [0.05, 0.27, 0], [0.0, 0.25, 0]),
        *([-0.17, 0.03, 0], [-0.05, 0.27, 0], [0.0, 0.25, 0]),
        *([0.1, 0.03, 0], [0.02, 0.38, 0], [0.0, 0.38, 0]),
        *([-0.1, 0.03, 0], [-0.02, 0.38, 0], [0.0, 0.38, 0]),
    ]
)
JOINTS = len(PARENTS)
TURNING = (0, 1, 3, 4, 6, 7, 9, 10, 12, 13)  # joints that turn: the root first
PARTS = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 2, 2, 0, 2, 2])  # torso, arms, legs
RADII = torch.tensor([0.0, 0.1, 0.09, 0.05, 0.05, 0.04, 0.05, 0.05, 0.04, 0.06, 0.07, 0.05, 0.06, 0.07, 0.05])
RING = 6  # vertices round each end of a bone
SIZE = 32  # pixels of a crop


@dataclass(frozen=True)
class Bodies:
    """Posed bodies.

    Attributes:
        turns: rotations at the turning joints [b, 10, 3, 3], the root's first.
        shape: logarithms of the lengths of torso, arms and legs [b, 3].
        camera: scale and shift of the crop [b, 3]: pixel = 16 + 16 (scale x + shift).
    """

    turns: Float[Tensor, "b 10 3 3"]
    shape: Float[Tensor, "b 3"]
    camera: Float[Tensor, "b 3"]

    def frames(self) -> tuple[Float[Tensor, "b 15 3"], Float[Tensor, "b 15 3 3"]]:
        """Where the joints are, and the rotation of what hangs at each."""
        offsets = OFFSETS * self.shape.exp()[:, PARTS][..., None]
        still = torch.eye(3).expand(len(self.shape), 3, 3)
        places, turned = [torch.zeros_like(offsets[:, 0])], [self.turns[:, 0]]
        for joint in range(1, JOINTS):
            parent = PARENTS[joint]
            own = self.turns[:, TURNING.index(joint)] if joint in TURNING else still
            places.append(places[parent] + (turned[parent] @ offsets[:, joint, :, None])[..., 0])
            turned.append(turned[parent] @ own)
        return torch.stack(places, 1), torch.stack(turned, 1)

    def vertices(self) -> Float[Tensor, "b 168 3"]:
        """The mesh: two rings a bone, turned with the joint that the bone hangs at."""
        places, turned = self.frames()
        rings = _rings()[None] * self.shape.exp()[:, PARTS[1:]][:, :, None, None]
        parents = list(PARENTS[1:])
        return (places[:, parents, None] + rings @ turned[:, parents].mT).flatten(1, 2)

    def seen(self, points: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n 2"]:
        """Where points are in the crop, in pixels."""
        flat = self.camera[:, None, :1] * points[..., :2] + self.camera[:, None, 1:]
        return SIZE / 2 * (1 + flat)


def faces() -> Tensor:
    """Triangles [f, 3] of the tubes, fronts outwards."""
    step = torch.arange(RING)
    ahead = (step + 1) % RING
    side = torch.cat(
        [torch.stack([step, ahead, step + RING], 1), torch.stack([ahead, ahead + RING, step + RING], 1)]
    )
    ends = [[0, k + 1, k] for k in range(1, RING - 1)]
    ends += [[RING, RING + k, RING + k + 1] for k in range(1, RING - 1)]
    one = torch.cat([side, torch.tensor(ends)])
    return (one + 2 * RING * torch.arange(JOINTS - 1)[:, None, None]).flatten(0, 1)


def _rings() -> Float[Tensor, "14 12 3"]:
    """Vertices of each bone in the frame of its upper joint, at rest."""
    ahead = OFFSETS[1:]
    along = functional.normalize(ahead, dim=1)
    side = torch.tensor([0.0, 0.0, 1.0]).expand_as(along)
    other = torch.linalg.cross(along, side)
    angle = 2 * math.pi * torch.arange(RING) / RING
    ring = angle.cos()[None, :, None] * side[:, None] + angle.sin()[None, :, None] * other[:, None]
    ring = ring * RADII[1:, None, None]
    return torch.cat([ring, ring + ahead[:, None]], 1)


def rotations(vectors: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3 3"]:
    """Rotations about axes by their lengths in radians."""
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    rows = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    return torch.linalg.matrix_exp(rows)


def from_six(six: Float[Tensor, "*n 6"]) -> Float[Tensor, "*n 3 3"]:
    """Rotations of two directions that are made orthogonal (Zhou et al. 2019)."""
    one = functional.normalize(six[..., :3], dim=-1)
    two = six[..., 3:] - (one * six[..., 3:]).sum(-1, keepdim=True) * one
    two = functional.normalize(two, dim=-1)
    return torch.stack([one, two, torch.linalg.cross(one, two)], -1)


def random_bodies(count: int, generator: torch.Generator) -> Bodies:
    """Bodies in random poses, bent mostly in the picture's plane, seen from the front."""
    bend = torch.tensor([0.15, 0.15, 0.5]) * torch.randn(count, len(TURNING), 3, generator=generator)
    bend[:, 0] = torch.rand(count, 3, generator=generator) * torch.tensor([0.3, 1.0, 0.6])
    bend[:, 0] -= torch.tensor([0.15, 0.5, 0.3])
    shape = 0.12 * torch.randn(count, 3, generator=generator)
    camera = torch.rand(count, 3, generator=generator) * torch.tensor([0.2, 0.1, 0.1])
    return Bodies(rotations(bend), shape, camera + torch.tensor([0.85, -0.05, -0.05]))


def draw(bodies: Bodies, covered: Bool[Tensor, "b 32 32"]) -> Float[Tensor, "b 3 32 32"]:
    """Crops: every bone a stroke in a colour of its own, nearer ones over farther ones, then covers in
    grey."""
    places, _ = bodies.frames()
    flat, parents = bodies.seen(places), list(PARENTS[1:])
    start, ahead = flat[:, parents], flat[:, 1:] - flat[:, parents]
    line = torch.arange(SIZE) + 0.5
    pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(1, 1, -1, 2)
    away = pixels - start[:, :, None]
    share = (away * ahead[:, :, None]).sum(-1) / ahead.square().sum(-1)[..., None].clamp_min(1e-6)
    gap = (away - share.clamp(0, 1)[..., None] * ahead[:, :, None]).norm(dim=-1)
    hit = gap < (RADII[1:] * SIZE / 2)[:, None] * bodies.camera[:, :1, None]
    depth = 0.5 * (places[:, 1:, 2] + places[:, parents, 2])[..., None]
    nearest = torch.where(hit, depth, torch.inf).min(1)
    hue = torch.linspace(0, 2 * math.pi, JOINTS)[:-1, None] + torch.tensor([0.0, 2.1, 4.2])
    colour = (0.55 + 0.4 * hue.cos())[nearest.indices]
    colour = torch.where(nearest.values.isfinite()[..., None], colour, 1.0)
    colour = torch.where(covered.flatten(1)[..., None], 0.5, colour)
    return colour.mT.unflatten(2, (SIZE, SIZE))
