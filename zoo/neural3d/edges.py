"""Curves through points with directions, edge maps of the zoo's data, and how near found edges are to true
ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree
from torch import Tensor

from zoo.neural3d.cameras import from_world
from zoo.neural3d.views import View, data_folder, read_picture
from zoo.shared.store.io import write_json


@dataclass(frozen=True)
class Curve:
    """A line or a cubic Bezier.

    Attributes:
        controls: [2, 3] ends, or [4, 3] control points.
        points: how many points it stands for.
    """

    controls: Tensor
    points: int

    def sampled(self, count: int = 100) -> Float[Tensor, "count 3"]:
        """Points along it, evenly in its parameter."""
        return (
            _bernstein(torch.linspace(0, 1, count, dtype=self.controls.dtype), len(self.controls))
            @ self.controls
        )


def load_edges(factor: int = 4) -> tuple[list[View], Tensor]:
    """The 50 edge maps of ABC-NEF 00004926 (DexiNed) and 63,840 points [n, 3] on its true edges.

    Raises:
        DataError: not in the folder ZOO_DATA.
    """
    folder = data_folder("abc-nef-00004926")
    views = []
    with numpy.load(folder / "cameras.npz", allow_pickle=False) as data:
        ks, worlds = torch.from_numpy(data["K_800"]).float(), torch.from_numpy(data["c2w_opencv"])
    with numpy.load(folder / "gt_edge_points.npz", allow_pickle=False) as data:
        truth = torch.from_numpy(data["xyz"])
    for file, k, world in zip(sorted((folder / "edge_dexined").iterdir()), ks, worlds, strict=True):
        image = read_picture(file)[..., None]
        k = k.clone()
        k[:2, 2] += 0.5  # its pixels are counted from their middles
        camera = from_world(world, k, image.shape[1], image.shape[0])
        views.append(View(camera, image, None, None, file.name).reduced(factor))
    return views, truth


def kept_points(
    means: Float[Tensor, "n 3"], opacities: Float[Tensor, " n"], on_maps: Float[Tensor, "views n"]
) -> Bool[Tensor, " n"]:
    """Points that are opaque (0.2), on the maps (mean value 0.1) and no outliers: within two deviations of
    the mean distance to the 25 nearest others."""
    good = (opacities >= 0.2) & (on_maps.mean(0) >= 0.1)
    if int(good.sum()) > 25:
        own = means[good].numpy()
        distance = torch.from_numpy(cKDTree(own).query(own, k=26)[0][:, 1:]).mean(1)
        good[good.clone()] = distance <= distance.mean() + 2 * distance.std()
    return good


def grown(
    means: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], cosine: float = 0.8, least: int = 10
) -> list[Tensor]:
    """Groups of points along edges: from a point to its four nearest neighbours as long as the directions of
    both, the link between them and the group's mean direction agree. Groups of more than `least`, indices."""
    if len(means) < 6:
        return []
    near = cKDTree(means.numpy()).query(means.numpy(), k=5)[1][:, 1:]
    free, found = torch.ones(len(means), dtype=torch.bool), []
    for start in range(len(means)):
        if not free[start]:
            continue
        free[start] = False
        group, mean, queue = [start], directions[start].clone(), [start]
        while queue:
            at = queue.pop()
            for other in near[at].tolist():
                if not free[other]:
                    continue
                link = torch.nn.functional.normalize(means[other] - means[at], dim=0)
                one, two = directions[at], directions[other]
                axis = torch.nn.functional.normalize(mean, dim=0)
                agreed = min(
                    abs(float(a @ b)) for a, b in ((one, two), (link, one), (link, two), (axis, two))
                )
                if agreed > cosine:
                    free[other] = False
                    group.append(other)
                    queue.append(other)
                    mean += two * (1 if float(two @ mean) >= 0 else -1)
        if len(group) > least:
            found.append(torch.tensor(group))
    return found


def fitted(points: Float[Tensor, "n 3"]) -> Curve:
    """The cubic Bezier of least squares through points, if it is much nearer to them (0.4 times) than the
    line; else the line, from end to end."""
    centre = points.mean(0)
    axis = torch.linalg.svd(points - centre, full_matrices=False).Vh[0]
    along = (points - centre) @ axis
    ends = centre + torch.stack([along.min(), along.max()])[:, None] * axis
    place = (along - along.min()) / (along.max() - along.min()).clamp_min(1e-12)
    off_line = (points - centre - along[:, None] * axis).norm(dim=1).mean()
    basis = _bernstein(place, 4)
    controls = torch.linalg.lstsq(basis, points).solution
    off_curve = (basis @ controls - points).norm(dim=1).mean()
    if float(off_curve) < 0.4 * float(off_line) and float(off_line) > 2e-3:
        return Curve(controls, len(points))
    return Curve(ends, len(points))


def write_curves(path: str | Path, curves: Sequence[Curve]) -> None:
    """Write curves as JSON: lines by their ends, Beziers by their four control points."""
    lines = [curve.controls.tolist() for curve in curves if len(curve.controls) == 2]
    beziers = [curve.controls.tolist() for curve in curves if len(curve.controls) == 4]
    write_json(Path(path), {"lines": lines, "cubic_beziers": beziers})


def precision_recall(
    found: Float[Tensor, "n 3"], truth: Float[Tensor, "m 3"], reach: float = 0.02
) -> tuple[float, float]:
    """Share of what was found that is within `reach` of the truth, and the other way round."""
    if not len(found):
        return 0.0, 0.0
    there = cKDTree(truth.numpy()).query(found.numpy())[0] <= reach
    back = cKDTree(found.numpy()).query(truth.numpy())[0] <= reach
    return float(there.mean()), float(back.mean())


def tangents(
    points: Float[Tensor, "n 3"], truth: Float[Tensor, "m 3"], near: int = 12
) -> Float[Tensor, "n 3"]:
    """The direction of the true edge at the true point nearest to each point."""
    tree = cKDTree(truth.numpy())
    around = truth[torch.from_numpy(tree.query(truth[tree.query(points.numpy())[1]].numpy(), k=near)[1])]
    return torch.linalg.svd(around - around.mean(1, keepdim=True), full_matrices=False).Vh[:, 0]


def _bernstein(place: Tensor, count: int) -> Tensor:
    left = 1 - place
    if count == 2:
        return torch.stack([left, place], 1)
    return torch.stack([left**3, 3 * left**2 * place, 3 * left * place**2, place**3], 1)
