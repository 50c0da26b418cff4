"""SpaRP's poses: pictures of an object, without cameras, to maps of object coordinates, to cameras.

Xu et al., "SpaRP: Fast 3D Object Reconstruction and Pose Estimation from Sparse Views", ECCV 2024. A network
says for every pixel of the object where in the object it is (NOCS, Wang et al. 2019: coordinates in
[0, 1]^3 of the object's box). Each pixel is then a pair of a point in space and one on the screen; the camera
follows from them (PnP) in spite of wrong pairs (RANSAC), and of several answers the one that the others agree
with most is kept. The hull of the posed masks is the object.

Differs from the paper: the network is a small one, trained here on toy objects, in place of a finetuned
diffusion model, and the reconstruction is the hull in place of a 3D diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import DataError
from zoo.neural3d.cameras import Camera

LEAST = 6  # pairs that decide a projection


def pnp(
    points: Float[Tensor, "n 3"],
    pixels: Float[Tensor, "n 2"],
    intrinsics: Float[Tensor, "3 3"],
    rounds: int = 10,
) -> Float[Tensor, "4 4"]:
    """The camera (world to camera, float64) that sees points at pixels: a linear solution, then steps
    on the distances on the screen.

    Raises:
        DataError: fewer than six pairs.
    """
    if len(points) < LEAST:
        raise DataError(f"a pose needs {LEAST} pixels of the object; received {len(points)}")
    points, flat = points.double()[None], _rays(pixels, intrinsics)[None]
    turns, moves, errors = _refined(
        points.expand(2, -1, -1), flat.expand(2, -1, -1), *_starts(points, flat), rounds
    )
    best = int(errors.argmin())
    return _pose(turns[best], moves[best])


def pnp_ransac(
    points: Float[Tensor, "n 3"],
    pixels: Float[Tensor, "n 2"],
    intrinsics: Float[Tensor, "3 3"],
    reach: float = 2.0,
    tries: int = 64,
    seed: int = 0,
) -> tuple[Float[Tensor, "4 4"], Bool[Tensor, " n"]]:
    """The camera that most pairs agree with to `reach` pixels, refined on those, and which they are.

    Raises:
        DataError: fewer than six pairs, or no try that six agree with.
    """
    if len(points) < LEAST:
        raise DataError(f"a pose needs {LEAST} pixels of the object; received {len(points)}")
    generator = torch.Generator().manual_seed(seed)
    flat = _rays(pixels, intrinsics)
    rows = torch.stack([torch.randperm(len(points), generator=generator)[:LEAST] for _ in range(tries)])
    some = points.double()[rows], flat[rows]
    turns, moves, _ = _refined(some[0].repeat(2, 1, 1), some[1].repeat(2, 1, 1), *_starts(*some), 5)
    good = _near(points.double(), flat, turns, moves, reach / float(intrinsics[0, 0]))
    best = int(good.sum(1).argmax())
    inside, turn, move = good[best], turns[best][None], moves[best][None]
    for _ in range(3):
        if int(inside.sum()) < LEAST:
            raise DataError(f"no pose that {LEAST} of {len(points)} pixels agree with to {reach} pixels")
        turn, move, _ = _refined(points.double()[inside][None], flat[inside][None], turn, move, 10)
        inside = _near(points.double(), flat, turn, move, reach / float(intrinsics[0, 0]))[0]
    return _pose(turn[0], move[0]), inside


def agreed(turns: Sequence[Float[Tensor, "3 3"]]) -> int:
    """Of several rotations the one with the smallest sum of angles to the others (mixture of experts)."""
    angles = torch.stack([torch.stack([angle_between(a, b) for b in turns]) for a in turns])
    return int(angles.sum(1).argmin())


def angle_between(one: Float[Tensor, "3 3"], other: Float[Tensor, "3 3"]) -> Float[Tensor, ""]:
    """Degrees of the rotation from one to the other."""
    trace = (one.double() * other.double()).sum()
    return torch.rad2deg(((trace - 1) / 2).clamp(-1, 1).arccos())


def encode(points: Float[Tensor, "*n 3"], low: Tensor, high: Tensor) -> Float[Tensor, "*n 3"]:
    """Object coordinates in [0, 1] of points in the box from `low` to `high`."""
    return (points - low) / (high - low)


def decode(coordinates: Float[Tensor, "*n 3"], low: Tensor, high: Tensor) -> Float[Tensor, "*n 3"]:
    """Points of object coordinates.

    Raises:
        DataError: coordinates outside [0, 1], or a box that is turned inside out, which mirrors.
    """
    if not bool((high > low).all()):
        raise DataError(f"the box from {low.tolist()} to {high.tolist()} is mirrored or flat")
    if len(coordinates) and not 0 <= float(coordinates.min()) <= float(coordinates.max()) <= 1:
        raise DataError(
            f"object coordinates lie in [0, 1]; received {float(coordinates.min()):.3g} to "
            f"{float(coordinates.max()):.3g}"
        )
    return low + coordinates * (high - low)


def pose_of(
    coordinates: Float[Tensor, "h w 3"],
    mask: Bool[Tensor, "h w"],
    low: Tensor,
    high: Tensor,
    intrinsics: Tensor,
    reach: float = 2.0,
) -> Camera:
    """The camera that took a picture, from its map of object coordinates; `reach` as for `pnp_ransac`.

    Raises:
        DataError: as for `decode` and `pnp_ransac`.
    """
    row, column = mask.nonzero(as_tuple=True)
    pixels = torch.stack([column, row], 1) + 0.5
    points = decode(coordinates[row, column], low, high)
    pose, _ = pnp_ransac(points, pixels, intrinsics, reach)
    return Camera(pose.float(), intrinsics, mask.shape[1], mask.shape[0])


class CoordinateNet(nn.Module):
    """A small U-Net from a picture with its mask [b, 4, h, w] to object coordinates [b, 3, h, w] in [0, 1].

    Args:
        width: channels of the first level.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [4, width, 2 * width, 4 * width]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.middle = _block(4 * width, 4 * width)
        self.up = nn.ModuleList(
            [_block(8 * width, 2 * width), _block(4 * width, width), _block(2 * width, width)]
        )
        self.out = nn.Conv2d(width, 3, 1)

    def forward(self, picture: Float[Tensor, "b 4 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Object coordinates; height and width are multiples of eight."""
        kept, value = [], picture
        for block in self.down:
            value = block(value)
            kept.append(value)
            value = functional.avg_pool2d(value, 2)
        value = self.middle(value)
        for block, old in zip(self.up, reversed(kept), strict=True):
            value = functional.interpolate(value, scale_factor=2.0)
            value = block(torch.cat([value, old], 1))
        return self.out(value).sigmoid()


class PoseNet(nn.Module):
    """What the map is compared with: the same encoder, then the rotation itself as two directions (6D).

    Args:
        width: channels of the first level.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [4, width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.out = nn.Linear(8 * width * 4, 6)

    def forward(self, picture: Float[Tensor, "b 4 h w"]) -> Float[Tensor, "b 3 3"]:
        """Rotation matrices."""
        value = picture
        for block in self.down:
            value = functional.avg_pool2d(block(value), 2)
        one, two = self.out(functional.adaptive_avg_pool2d(value, 2).flatten(1)).split(3, 1)
        one = functional.normalize(one, dim=1)
        two = functional.normalize(two - (one * two).sum(1, keepdim=True) * one, dim=1)
        return torch.stack([one, two, torch.linalg.cross(one, two)], 1)


def _block(given: int, wanted: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(given, wanted, 3, padding=1), nn.GroupNorm(4, wanted), nn.ReLU())


def _rays(pixels: Tensor, intrinsics: Tensor) -> Tensor:
    """Pixels as slopes x / z, y / z."""
    k = intrinsics.double()
    return (pixels.double() - k[:2, 2]) / k.diagonal()[:2]


def _pose(turn: Tensor, move: Tensor) -> Tensor:
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3], out[:3, 3] = turn, move
    return out


def _starts(points: Float[Tensor, "b n 3"], flat: Float[Tensor, "b n 2"]) -> tuple[Tensor, Tensor]:
    """Rotations [2 b, 3, 3] and translations [2 b, 3] of both linear solutions: the first has no preference,
    the second one stands noise where the object is far away for its size."""
    pairs = zip(_linear(points, flat), _scaled(points, flat), strict=True)
    turn, move = (torch.cat(pair) for pair in pairs)
    return turn, move


def _scaled(points: Float[Tensor, "b n 3"], flat: Float[Tensor, "b n 2"]) -> tuple[Tensor, Tensor]:
    """Rotations [b, 3, 3] and translations [b, 3] by scaled orthography, four times with the perspective of
    the time before put back (POSIT, DeMenthon and Davis 1995)."""
    middle = points.mean(1, keepdim=True)
    own = torch.cat([points - middle, torch.ones_like(points[..., :1])], 2)
    inverse, deeper = torch.linalg.pinv(own), torch.ones_like(points[..., :1])
    for _ in range(4):
        rows = (inverse @ (flat * deeper)).mT
        scale = rows[:, :, :3].norm(dim=2).mean(1)[:, None, None].clamp_min(1e-12)
        u, _, vh = torch.linalg.svd(rows[:, :, :3], full_matrices=False)
        two = u @ vh
        turn = torch.cat([two, torch.linalg.cross(two[:, :1], two[:, 1:])], 1)
        deeper = (1 + scale * ((points - middle) @ turn[:, 2:].mT)).clamp_min(0.1)
    move = torch.cat([rows[:, :, 3] / scale[:, 0], 1 / scale[:, 0]], 1)
    return turn, move - (turn @ middle.mT)[:, :, 0]


def _linear(points: Float[Tensor, "b n 3"], flat: Float[Tensor, "b n 2"]) -> tuple[Tensor, Tensor]:
    """Rotations [b, 3, 3] and translations [b, 3] by the direct linear transform."""
    middle = points.mean(1, keepdim=True)
    spread = (points - middle).norm(dim=2).mean(1)[:, None, None].clamp_min(1e-9)
    own = torch.cat([(points - middle) / spread, torch.ones_like(points[..., :1])], 2)
    zero, (x, y) = torch.zeros_like(own), flat[..., None].unbind(2)
    system = torch.cat([torch.cat([own, zero, -x * own], 2), torch.cat([zero, own, -y * own], 2)], 1)
    matrix = torch.linalg.svd(system, full_matrices=True).Vh[:, -1].reshape(-1, 3, 4)
    matrix = matrix * torch.linalg.det(matrix[:, :, :3]).sign().clamp(-1, 1)[:, None, None]
    u, s, vh = torch.linalg.svd(matrix[:, :, :3])
    turn = u @ vh
    scale = s.mean(1)[:, None].clamp_min(1e-12)
    move = matrix[:, :, 3] / scale * spread[:, :, 0]
    return turn, move - (turn @ middle.mT)[:, :, 0]


def _refined(
    points: Float[Tensor, "b n 3"],
    flat: Float[Tensor, "b n 2"],
    turn: Float[Tensor, "b 3 3"],
    move: Float[Tensor, "b 3"],
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Poses and their squared distances [b] after Levenberg-Marquardt steps on distances on the screen; a
    step that does not help is not taken, and the next one is shorter."""

    def off(turn: Tensor, move: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rotated = points @ turn.mT
        seen = rotated + move[:, None]
        deep = torch.where(seen[..., 2:].abs() < 1e-6, 1e-6, seen[..., 2:])
        behind = (seen[..., 2:] <= 0).double() * 1e3
        return rotated, torch.cat([seen[..., :2] / deep, deep], 2), seen[..., :2] / deep - flat + behind

    damping = torch.full((len(points), 1, 1), 1e-4, dtype=torch.float64)
    rotated, seen, wrong = off(turn, move)
    for _ in range(rounds):
        x, y, z = seen.unbind(2)
        zero = torch.zeros_like(z)
        slope = torch.stack([torch.stack([1 / z, zero, -x / z], 2), torch.stack([zero, 1 / z, -y / z], 2)], 2)
        full = torch.cat([slope @ -_cross(rotated), slope], 3).flatten(1, 2)
        square = full.mT @ full
        square = square + damping * torch.diag_embed(square.diagonal(dim1=1, dim2=2) + 1e-12)
        step = -torch.linalg.solve_ex(square, full.mT @ wrong.reshape(len(points), -1, 1))[0][..., 0]
        step = torch.where(step.isfinite(), step, 0.0)
        turned, moved = torch.linalg.matrix_exp(_cross(step[:, :3])) @ turn, move + step[:, 3:]
        tried = off(turned, moved)
        good = (tried[2].square().sum((1, 2)) < wrong.square().sum((1, 2)))[:, None, None]
        turn, move = torch.where(good, turned, turn), torch.where(good[:, 0], moved, move)
        rotated, seen, wrong = (
            torch.where(good, new, old) for new, old in zip(tried, (rotated, seen, wrong), strict=True)
        )
        damping = torch.where(good, damping / 10, damping * 10)
    return turn, move, wrong.square().sum((1, 2))


def _near(points: Tensor, flat: Tensor, turns: Tensor, moves: Tensor, limit: float) -> Tensor:
    seen = points @ turns.mT + moves[:, None]
    off = seen[..., :2] / torch.where(seen[..., 2:].abs() < 1e-9, 1e-9, seen[..., 2:]) - flat
    return (off.norm(dim=2) < limit) & (seen[..., 2] > 0)


def _cross(vectors: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3 3"]:
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    rows = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1)
    return rows.unflatten(-1, (3, 3))


def random_turns(count: int, generator: torch.Generator) -> Float[Tensor, "count 3 3"]:
    """Rotations, evenly spread."""
    w, x, y, z = functional.normalize(torch.randn(count, 4, generator=generator), dim=1).unbind(1)
    half = math.sqrt(2.0)
    w, x, y, z = half * w, half * x, half * y, half * z
    rows = [1 - y * y - z * z, x * y - w * z, x * z + w * y, x * y + w * z, 1 - x * x - z * z]
    rows += [y * z - w * x, x * z - w * y, y * z + w * x, 1 - x * x - y * y]
    return torch.stack(rows, 1).reshape(-1, 3, 3)
