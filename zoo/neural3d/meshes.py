"""Triangle meshes: the surface of a volume of numbers, which points are inside, samples, distances, files."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from jaxtyping import Bool, Float, Int
from scipy.spatial import cKDTree
from torch import Tensor

from zoo.errors import DataError
from zoo.shared.store.io import atomic_write

# A cube's corners as bits x + 2 y + 4 z, and the six tetrahedra round its diagonal (Kuhn's): the faces of
# neighbouring cubes are cut alike, so that the surface has no gap.
_TETRAHEDRA = torch.tensor(
    [[0, 1, 3, 7], [0, 3, 2, 7], [0, 2, 6, 7], [0, 6, 4, 7], [0, 4, 5, 7], [0, 5, 1, 7]]
)


def isosurface(
    values: Float[Tensor, "x y z"], low: Float[Tensor, " 3"], high: Float[Tensor, " 3"], level: float = 0.0
) -> tuple[Float[Tensor, "v 3"], Int[Tensor, "f 3"]]:
    """The surface where values, given on a grid from `low` to `high`, pass `level`: marching tetrahedra.

    It is closed, if the values at the grid's border are all on one side; triangles turn their front, by the
    right hand, to where the values are above the level.

    Raises:
        DataError: the values do not pass the level, or are not finite.
    """
    if not bool(values.isfinite().all()):
        raise DataError("the values of a volume are not all finite")
    above = values > level
    if bool(above.all()) or not bool(above.any()):
        raise DataError(
            f"no surface: all values are on one side of {level} ({float(values.min()):.3g} to "
            f"{float(values.max()):.3g})"
        )
    size = torch.tensor(values.shape)
    stride = torch.tensor([int(size[1] * size[2]), int(size[2]), 1])
    corner = torch.tensor([[bit & 1, bit >> 1 & 1, bit >> 2 & 1] for bit in range(8)])
    inside = [
        above[i : i + size[0] - 1, j : j + size[1] - 1, k : k + size[2] - 1] for i, j, k in corner.tolist()
    ]
    count = torch.stack(inside).sum(0)
    cubes = ((count > 0) & (count < 8)).nonzero()
    nodes = ((cubes[:, None] + corner) * stride).sum(2)[:, _TETRAHEDRA].reshape(-1, 4)
    signs, flat = above.flatten()[nodes], values.flatten().double()
    edges: list[Tensor] = []
    for pattern in range(1, 15):
        chosen = nodes[(signs == torch.tensor([bool(pattern >> bit & 1) for bit in range(4)])).all(1)]
        up = [bit for bit in range(4) if pattern >> bit & 1]
        down = [bit for bit in range(4) if not pattern >> bit & 1]
        if len(up) == 2:
            (a, b), (c, d) = up, down
            corners = [[(a, c), (a, d), (b, d)], [(a, c), (b, d), (b, c)]]
        else:
            one, others = (up[0], down) if len(up) == 1 else (down[0], up)
            corners = [[(one, other) for other in others]]
        for triangle in corners:
            edges.append(torch.stack([chosen[:, [p, q]].sort(1).values for p, q in triangle], 1))
    pairs = torch.cat(edges)
    unique, faces = torch.unique(pairs.reshape(-1, 2), dim=0, return_inverse=True)
    first, second = flat[unique[:, 0]], flat[unique[:, 1]]
    share = ((level - first) / (second - first)).clamp(1e-4, 1 - 1e-4)[:, None]

    def place(index: Tensor) -> Tensor:
        at = torch.stack([index // stride[0], index % stride[0] // stride[1], index % stride[1]], 1)
        return low.double() + at / (size - 1) * (high - low).double()

    vertices = place(unique[:, 0]) * (1 - share) + place(unique[:, 1]) * share
    faces = faces.reshape(-1, 3)
    # The front looks to the larger value of an edge that the triangle cuts.
    corners_at = vertices[faces]
    normal = torch.linalg.cross(corners_at[:, 1] - corners_at[:, 0], corners_at[:, 2] - corners_at[:, 0])
    cut = unique[faces[:, 0]]
    rises = (flat[cut[:, 1]] > flat[cut[:, 0]]).double() * 2 - 1
    ahead = (normal * (place(cut[:, 1]) - place(cut[:, 0])) * rises[:, None]).sum(1) < 0
    return vertices.float(), torch.where(ahead[:, None], faces.flip(1), faces)


def is_watertight(faces: Int[Tensor, "f 3"]) -> bool:
    """Whether every edge belongs to two triangles that run along it in opposite directions."""
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    unique, counts = torch.unique(edges, dim=0, return_counts=True)
    back = torch.unique(edges.flip(1), dim=0)
    return bool((counts == 1).all()) and torch.equal(unique, back)


def volume_of(vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"]) -> float:
    """The volume that a closed mesh encloses, positive if its triangles face outwards."""
    a, b, c = vertices.double()[faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def occupancy(
    vertices: Float[Tensor, "v 3"],
    faces: Int[Tensor, "f 3"],
    size: int,
    low: Float[Tensor, " 3"],
    high: Float[Tensor, " 3"],
) -> Bool[Tensor, "n n n"]:
    """Which points of a grid from `low` to `high` are inside a closed mesh: an odd number of crossings below
    them."""
    step = ((high - low) / (size - 1)).double().numpy()
    # A nudge keeps the lines of the grid off the mesh's own vertices.
    points = (vertices.double().numpy() - low.double().numpy()) / step + [1.37e-5, 2.71e-5, 0]
    turned = numpy.zeros((size, size, size + 1), numpy.int64)
    for a, b, c in points[faces.numpy()]:
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if area == 0:
            continue
        left, right = (max(0, int(numpy.ceil(min(a[k], b[k], c[k])))) for k in (0, 1))
        xs = numpy.arange(left, min(size - 1, int(max(a[0], b[0], c[0]))) + 1)
        ys = numpy.arange(right, min(size - 1, int(max(a[1], b[1], c[1]))) + 1)
        x, y = xs[:, None], ys[None]
        v = ((x - a[0]) * (c[1] - a[1]) - (y - a[1]) * (c[0] - a[0])) / area
        w = ((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])) / area
        hit = (v >= 0) & (w >= 0) & (v + w <= 1)
        height = numpy.clip(numpy.ceil(a[2] + v * (b[2] - a[2]) + w * (c[2] - a[2])), 0, size).astype(int)
        i, j = hit.nonzero()
        numpy.add.at(turned, (xs[i], ys[j], height[i, j]), 1)
    return torch.from_numpy(turned.cumsum(2)[:, :, :size] % 2 == 1)


def surface_points(
    vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"], count: int, seed: int = 0
) -> Float[Tensor, "count 3"]:
    """Points on the surface, evenly by area."""
    generator = torch.Generator().manual_seed(seed)
    corners = vertices[faces]
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    which = torch.multinomial(normal.norm(dim=1), count, replacement=True, generator=generator)
    u, v = torch.rand(2, count, 1, generator=generator)
    u, v = torch.where(u + v > 1, 1 - u, u), torch.where(u + v > 1, 1 - v, v)
    a, b, c = corners[which].unbind(1)
    return a + u * (b - a) + v * (c - a)


def chamfer(first: Float[Tensor, "n 3"], second: Float[Tensor, "m 3"]) -> float:
    """Mean distance to the nearest point of the other set, the mean of both directions."""
    there = cKDTree(second.numpy()).query(first.numpy())[0].mean()
    back = cKDTree(first.numpy()).query(second.numpy())[0].mean()
    return float(there + back) / 2


def overlap(one: Bool[Tensor, "*s"], other: Bool[Tensor, "*s"]) -> float:
    """Intersection over union."""
    return float((one & other).sum() / (one | other).sum().clamp_min(1))


def write_mesh(path: str | Path, vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"]) -> None:
    """Write a mesh as .obj."""
    lines = [f"v {x:.6g} {y:.6g} {z:.6g}" for x, y, z in vertices.tolist()]
    lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces.tolist()]
    atomic_write(Path(path), ("\n".join(lines) + "\n").encode())
