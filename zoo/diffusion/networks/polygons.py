"""Simple polygons: drawn, posed, rasterised as signed distances, traced, and what sees what in them.

A polygon is [v, 2], its vertices counter-clockwise and in order; a batch is [n, v, 2]. Vertices are in
general position (random real numbers): a line of sight through a third vertex is not dealt with.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from contourpy import contour_generator
from jaxtyping import Bool, Float
from torch import Tensor

from zoo.errors import DataError

EDGE = 1.1  # a grid of distances reaches from -EDGE to EDGE


def draw_polygons(n: int, vertices: int, generator: torch.Generator) -> Float[Tensor, "n v 2"]:
    """Posed simple polygons, half of them star-shaped, half random points in an order without crossings."""
    turn = torch.arange(vertices) + 0.8 * torch.rand(n, vertices, generator=generator)
    angle, radius = 2 * math.pi * turn / vertices, 0.2 + 0.8 * torch.rand(n, vertices, generator=generator)
    star = radius[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    free = untangled(torch.rand(n, vertices, 2, generator=generator) * 2 - 1)
    polygons = torch.where((torch.arange(n) % 2 == 0)[:, None, None], star, free)
    return posed(torch.where(is_simple(polygons)[:, None, None], polygons, star))


def untangled(points: Float[Tensor, "n v 2"]) -> Float[Tensor, "n v 2"]:
    """The points in another order: of two edges that cross, what lies between them is reversed (2-opt), until
    none cross."""
    points, place = points.clone(), torch.arange(points.shape[1])
    left = torch.arange(len(points))
    for _ in range(20 * len(place)):
        now = points[left]
        crossing = crossed(now, now.roll(-1, 1), now).triu().flatten(1)
        found = crossing.any(1)
        left, now, first = left[found], now[found], crossing[found].int().argmax(1)[:, None]
        if not len(left):
            break
        low, high = first // len(place) + 1, first % len(place)
        order = torch.where((place >= low) & (place <= high), low + high - place, place)
        points[left] = now.gather(1, order[..., None].expand(-1, -1, 2))
    return points


def posed(polygons: Float[Tensor, "n v 2"]) -> Float[Tensor, "n v 2"]:
    """The polygons counter-clockwise from their first vertex, which lies on the positive x axis; the mean of
    the vertices is the origin, the farthest one at distance 1."""
    x, y = polygons.unbind(-1)
    area = (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1)
    turned = torch.cat([polygons[:, :1], polygons[:, 1:].flip(1)], 1)
    polygons = torch.where((area > 0)[:, None, None], polygons, turned)
    moved = polygons - polygons.mean(1, keepdim=True)
    moved = moved / moved.norm(dim=-1).amax(1).clamp(min=1e-6)[:, None, None]
    angle = torch.atan2(moved[:, 0, 1], moved[:, 0, 0])
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x, y = moved.unbind(-1)
    return torch.stack([cos * x + sin * y, cos * y - sin * x], -1)


def crossed(
    start: Float[Tensor, "n m 2"], end: Float[Tensor, "n m 2"], polygons: Float[Tensor, "n v 2"]
) -> Bool[Tensor, "n m v"]:
    """Whether each segment properly crosses each edge (vertex k to k + 1); touching is no crossing."""
    p, q, a, b = start[:, :, None], end[:, :, None], polygons[:, None], polygons.roll(-1, 1)[:, None]
    return (_side(p, q, a) * _side(p, q, b) < 0) & (_side(a, b, p) * _side(a, b, q) < 0)


def _side(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Positive where c is left of the line from a to b."""
    u, v = b - a, c - a
    return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]


def is_simple(polygons: Float[Tensor, "n v 2"]) -> Bool[Tensor, " n"]:
    """Whether no two edges cross."""
    return ~crossed(polygons, polygons.roll(-1, 1), polygons).flatten(1).any(1)


def require_simple(polygons: Float[Tensor, "n v 2"]) -> None:
    """Refuse polygons that nothing can be learned from.

    Raises:
        DataError: numbers that are not finite, or edges that cross.
    """
    if not bool(torch.isfinite(polygons).all()):
        raise DataError("vertices must be finite numbers")
    if not bool((good := is_simple(polygons)).all()):
        raise DataError(
            f"polygon {int((~good).int().argmax())} crosses itself: order its vertices along the border"
        )


def inside(points: Float[Tensor, "n m 2"], polygons: Float[Tensor, "n v 2"]) -> Bool[Tensor, "n m"]:
    """Whether points lie inside, by the parity of the edges to their right."""
    (x, y), a, b = points[:, :, None].unbind(-1), polygons[:, None], polygons.roll(-1, 1)[:, None]
    spans = (a[..., 1] > y) != (b[..., 1] > y)
    rise = torch.where(spans, b[..., 1] - a[..., 1], 1.0)
    right = x < a[..., 0] + (b[..., 0] - a[..., 0]) * (y - a[..., 1]) / rise
    return (spans & right).sum(-1) % 2 == 1


def signed_distance(points: Float[Tensor, "n m 2"], polygons: Float[Tensor, "n v 2"]) -> Float[Tensor, "n m"]:
    """Distance of points to the border, negative inside; differentiable in both."""
    p, a, b = points[:, :, None], polygons[:, None], polygons.roll(-1, 1)[:, None]
    along, to = b - a, p - a
    share = ((to * along).sum(-1) / along.square().sum(-1).clamp(min=1e-9)).clamp(0, 1)
    away = (to - share[..., None] * along).square().sum(-1).amin(-1)
    return (away + 1e-12).sqrt() * torch.where(inside(points, polygons), -1.0, 1.0)


def rasterised(polygons: Float[Tensor, "n v 2"], side: int) -> Float[Tensor, "n 1 side side"]:
    """Signed distances on a grid from -EDGE to EDGE, rows by y."""
    line = torch.linspace(-EDGE, EDGE, side)
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
    found = signed_distance(points.expand(len(polygons), -1, -1), polygons)
    return found.unflatten(1, (1, side, side))


def visibility(polygons: Float[Tensor, "n v 2"]) -> Bool[Tensor, "n v v"]:
    """Which vertices see each other: neighbours, and pairs whose segment crosses no edge and runs inside."""
    n, vertices, _ = polygons.shape
    start = polygons[:, :, None].expand(-1, -1, vertices, -1).flatten(1, 2)
    end = polygons[:, None].expand(-1, vertices, -1, -1).flatten(1, 2)
    seen = ~crossed(start, end, polygons).any(-1) & inside((start + end) / 2, polygons)
    neighbours = border(vertices)
    return (seen.unflatten(1, (vertices, vertices)) | neighbours) & ~torch.eye(vertices, dtype=torch.bool)


def border(vertices: int) -> Bool[Tensor, "v v"]:
    """Which pairs are neighbours."""
    ring = torch.eye(vertices, dtype=torch.bool).roll(1, 1)
    return ring | ring.T


def f1(made: Bool[Tensor, "n v v"], graphs: Bool[Tensor, "n v v"]) -> Float[Tensor, " n"]:
    """F1 of the visible pairs of each graph, neighbours not counted; 1 where neither has any."""
    off = ~border(graphs.shape[1])
    both, either = ((f * off).sum((1, 2)).double() for f in (made & graphs, made.int() + graphs.int()))
    return torch.where(either > 0, 2 * both / either.clamp(min=1), 1.0)


def aligned(made: Float[Tensor, "n v 2"], graphs: Bool[Tensor, "n v v"]) -> Float[Tensor, "n v 2"]:
    """The polygons numbered from the vertex at which their own visibility fits the graphs best."""
    turned = torch.stack([made.roll(turn, 1) for turn in range(made.shape[1])], 1)
    scores = torch.stack([f1(visibility(one), graphs) for one in turned.unbind(1)], 1)
    return turned[torch.arange(len(made)), scores.argmax(1)]


def traced(fields: Float[Tensor, "n 1 side side"], count: int) -> Float[Tensor, "n count 2"]:
    """Points at equal steps along the longest line where a field is 0, counter-clockwise from the one nearest
    to the positive x axis; where it nowhere is 0, along the line of the middle of its values."""
    found, side = [], fields.shape[-1]
    for field in fields[:, 0].detach().double().cpu().numpy():
        level = 0.0 if field.min() < 0 < field.max() else (field.min() + field.max()) / 2
        # Larger values lie to the left of a line: reversed, it runs counter-clockwise around the inside.
        lines = [np.asarray(line)[::-1] for line in contour_generator(z=field).lines(level)]
        lengths = [np.hypot(*np.diff(line, axis=0).T) for line in lines]
        longest = max(range(len(lines)), key=lambda index: lengths[index].sum())
        at = np.concatenate([[0.0], np.cumsum(lengths[longest])])
        places = np.arange(count) * at[-1] / count
        found.append(np.stack([np.interp(places, at, axis) for axis in lines[longest].T], 1))
    points = torch.from_numpy(np.stack(found)).to(fields) * (2 * EDGE / (side - 1)) - EDGE
    x, y = points.unbind(-1)
    first = (y.abs() + (x < 0) * 2 * EDGE).argmin(1, keepdim=True)
    order = (torch.arange(count, device=points.device) + first) % count
    return points.gather(1, order[..., None].expand(-1, -1, 2))
