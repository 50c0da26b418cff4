"""Neighbourhoods on triangle meshes: spirals round vertices, balls of edges, refined spheres."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from zoo.errors import DataError


def icosphere(levels: int) -> tuple[Float[Tensor, "v 3"], Int[Tensor, "f 3"], list[Int[Tensor, "n 2"]]]:
    """A unit sphere of 20 x 4^levels triangles, fronts outwards: vertices, triangles, and for each level the
    two ends of the edges in whose middles its new vertices lie. A level's vertices come before the next's."""
    golden = (1 + 5**0.5) / 2
    ends = [[0.0, a, b * golden] for a in (-1.0, 1.0) for b in (-1.0, 1.0)]
    points = torch.tensor(ends)
    vertices = functional.normalize(torch.cat([points, points.roll(1, 1), points.roll(2, 1)]), dim=1)
    near = torch.cdist(vertices, vertices) < 1.2
    near.fill_diagonal_(False)
    triples = torch.combinations(torch.arange(12), 3)
    a, b, c = triples[(near[triples[:, [0, 0, 1]], triples[:, [1, 2, 2]]]).all(1)].unbind(1)
    normal = torch.linalg.cross(vertices[b] - vertices[a], vertices[c] - vertices[a])
    out = ((normal * vertices[a]).sum(1) > 0)[:, None]
    faces = torch.where(out, torch.stack([a, b, c], 1), torch.stack([a, c, b], 1))
    parents = []
    for _ in range(levels):
        sides = torch.stack([faces, faces.roll(-1, 1)], 2)
        edges, which = torch.unique(sides.sort(2).values.reshape(-1, 2), dim=0, return_inverse=True)
        middle = len(vertices) + which.reshape(-1, 3)
        (a, b, c), (ab, bc, ca) = faces.unbind(1), middle.unbind(1)
        quarters = [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
        faces = torch.cat([torch.stack(quarter, 1) for quarter in quarters])
        vertices = torch.cat([vertices, functional.normalize(vertices[edges].mean(1), dim=1)])
        parents.append(edges)
    return vertices, faces, parents


def edges_of(faces: Int[Tensor, "f 3"]) -> Int[Tensor, "e 2"]:
    """The edges of triangles, each once, the lower vertex first."""
    return torch.unique(torch.cat([faces[:, :2], faces[:, 1:], faces[:, ::2]]).sort(1).values, dim=0)


def spirals(faces: Int[Tensor, "f 3"], length: int) -> Int[Tensor, "v length"]:
    """For each vertex itself and those round it, ring after ring, each in the triangles' sense (Gong et al.
    2019).

    Raises:
        DataError: a vertex that is not surrounded by one ring of triangles, or a mesh that is too small.
    """
    count = int(faces.max()) + 1
    after: list[dict[int, int]] = [{} for _ in range(count)]
    for a, b, c in faces.tolist():
        for vertex, first, second in ((a, b, c), (b, c, a), (c, a, b)):
            if first in after[vertex]:
                raise DataError(f"the mesh is not manifold: edge {vertex}-{first} has triangles on one side")
            after[vertex][first] = second
    if length > count:
        raise DataError(f"a spiral of {length} vertices on a mesh of {count}")
    rings = [_ring(after[vertex], vertex) for vertex in range(count)]
    found = []
    for vertex in range(count):
        spiral, known = [vertex], {vertex}
        for one in spiral:  # grows while it is walked
            if len(spiral) >= length:
                break
            fresh = [other for other in rings[one] if other not in known]
            spiral += fresh
            known |= set(fresh)
        if len(spiral) < length:
            raise DataError(f"the mesh is not connected: vertex {vertex} reaches {len(spiral)} of {length}")
        found.append(spiral[:length])
    return torch.tensor(found)


def _ring(after: dict[int, int], vertex: int) -> list[int]:
    ring = [min(after)] if after else []
    while after and (following := after.get(ring[-1])) is not None and following != ring[0]:
        ring.append(following)
        if len(ring) > len(after):
            break
    if len(ring) < 3 or len(ring) != len(after) or after.get(ring[-1]) != ring[0]:
        raise DataError(f"the mesh is not manifold: the triangles at vertex {vertex} are no closed ring")
    return ring


def ball(edges: Int[Tensor, "e 2"], count: int, centre: int, hops: int) -> Bool[Tensor, " v"]:
    """Which of `count` vertices are at most `hops` edges from `centre`."""
    inside = torch.zeros(count, dtype=torch.bool)
    inside[centre] = True
    for _ in range(hops):
        inside = grown(edges, inside)
    return inside


def grown(edges: Int[Tensor, "e 2"], inside: Bool[Tensor, " v"]) -> Bool[Tensor, " v"]:
    """The vertices and their neighbours."""
    new = inside.clone()
    for here, there in (edges.unbind(1), edges.flip(1).unbind(1)):
        new[there[inside[here]]] = True
    return new
