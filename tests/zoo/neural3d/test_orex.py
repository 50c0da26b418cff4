"""Meshes of volumes, and OReX: samples and network by hand, a ball through its circles, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zoo.errors import DataError
from zoo.neural3d import meshes
from zoo.neural3d.methods import orex
from zoo.neural3d.methods.orex import IterativeField, OReX, Sections

LOW, HIGH = torch.full((3,), -1.0), torch.full((3,), 1.0)


def ball(radius: float = 0.6) -> Sections:
    """Circles of a ball on five planes."""
    heights = torch.tensor([-0.45, -0.2, 0.0, 0.2, 0.45])
    angle = torch.arange(24) / 24 * 2 * math.pi
    contours = []
    for z in heights.tolist():
        flat = math.sqrt(radius**2 - z**2)
        contours.append(torch.stack([flat * angle.cos(), flat * angle.sin(), torch.full((24,), z)], 1))
    planes = torch.tensor([[0.0, 0, 1, -z] for z in heights.tolist()], dtype=torch.float64)
    return Sections(planes, contours, list(range(5)), "ball")


def distance(size: int, radius: float = 0.6) -> torch.Tensor:
    line = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).norm(dim=-1) - radius


def test_a_surface_is_closed_faces_outwards_and_encloses_its_volume() -> None:
    values = distance(20)
    vertices, faces = meshes.isosurface(values, LOW, HIGH)
    assert meshes.is_watertight(faces) and not meshes.is_watertight(faces[1:])
    assert len(vertices) - 3 * len(faces) // 2 + len(faces) == 2
    assert meshes.volume_of(vertices, faces) == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.03)
    assert float((vertices.norm(dim=1) - 0.6).abs().max()) < 0.01
    assert meshes.volume_of(*meshes.isosurface(-values, LOW, HIGH)) < 0
    inside = meshes.occupancy(vertices, faces, 20, LOW, HIGH)
    assert meshes.overlap(inside, values < 0) > 0.99


def test_noise_gives_closed_surfaces_too() -> None:
    values = torch.full((8, 8, 8), -1.0)
    values[1:-1, 1:-1, 1:-1] = torch.rand(6, 6, 6, generator=torch.Generator().manual_seed(0)) - 0.3
    assert meshes.is_watertight(meshes.isosurface(values, LOW, HIGH)[1])


def test_samples_and_distances_of_surfaces(tmp_path: Path) -> None:
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 5], [1, 0, 5], [0, 1, 5]])
    points = meshes.surface_points(vertices, torch.tensor([[0, 1, 2], [3, 4, 5]]), 2000)
    assert 900 < int((points[:, 2] == 0).sum()) < 1100 and bool((points[:, 0] + points[:, 1] <= 1).all())
    assert points[:, :2].mean(0).tolist() == pytest.approx([1 / 3, 1 / 3], abs=0.02)
    one, other = torch.zeros(1, 3), torch.tensor([[3.0, 0, 0], [5, 0, 0]])
    assert meshes.chamfer(one, other) == pytest.approx((3 + 4) / 2)
    meshes.write_mesh(tmp_path / "m.obj", vertices, torch.tensor([[0, 1, 2]]))
    lines = (tmp_path / "m.obj").read_text().splitlines()
    assert lines[1] == "v 1 0 0" and lines[-1] == "f 1 2 3" and len(lines) == 7


def test_the_network_is_the_published_one() -> None:
    field = IterativeField()
    layers = sum(parameter.numel() for parameter in field.layers.parameters())
    assert (layers, sum(p.numel() for p in field.parameters()) - layers) == (31393, 43)
    points = torch.rand(5, 3)
    steps = field.steps(points)
    assert len(steps) == 10 and torch.equal(field(points), steps[-1])
    assert not torch.equal(steps[0], steps[1])


def test_labels_by_hand() -> None:
    sections = ball()
    points, labels = orex.samples(sections, 5, torch.Generator().manual_seed(0))
    heights = torch.tensor([-0.45, -0.2, 0.0, 0.2, 0.45])
    on_plane = (points[:, 2:] - heights).abs().amin(1) < 1e-6
    radius = points.norm(dim=1)
    assert bool((labels[on_plane & (radius > 0.61)] == 1).all())
    assert bool((labels[on_plane & (radius < 0.55)] == 0).all())
    assert int((labels == 0.5).sum()) == 5 * 24 * 5  # planes x edges x samples
    hull = points[~on_plane]
    assert len(hull) > 0 and bool((labels[~on_plane] == 1).all())


def test_holes_are_outside() -> None:
    square = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    sections = Sections(torch.tensor([[0.0, 0, 1, 0]]).double(), [square * 0.8, square * 0.3], [0, 0])
    origin, basis = sections.frame(0)
    points = torch.tensor([[0.0, 0, 0], [0.5, 0.5, 0], [0.9, 0, 0]]).double()
    assert sections.inside(0, (points - origin) @ basis.T).tolist() == [False, True, False]


def test_a_ball_comes_back() -> None:
    sections = ball()
    model = OReX(iterations=2, steps=130, batch=256).fit(sections)
    values = orex.volume(model, 20)
    vertices, faces = orex.surface(values)
    assert meshes.is_watertight(faces)
    assert meshes.overlap(values < 0, distance(20) < 0) > 0.5
    found = orex.volume(orex.rbf(sections, points=400), 20)
    assert meshes.overlap(found < 0, distance(20) < 0) > 0.85


def test_what_is_refused() -> None:
    sections = ball()
    with pytest.raises(DataError, match="off its plane 0"):
        replace(sections, contours=[sections.contours[0] + 0.01, *sections.contours[1:]])
    with pytest.raises(DataError, match="no closed loop"):
        replace(sections, contours=[sections.contours[0][:2], *sections.contours[1:]])
    with pytest.raises(DataError, match="leaves"):
        replace(sections, contours=[c * torch.tensor([2.0, 2, 1]) for c in sections.contours])
    with pytest.raises(DataError, match="0 planes"):
        replace(sections, planes=sections.planes[:0])
    with pytest.raises(DataError, match="no surface"):
        orex.surface(torch.ones(4, 4, 4))
    with pytest.raises(DataError, match="not all finite"):
        meshes.isosurface(torch.full((3, 3, 3), torch.nan), LOW, HIGH)
