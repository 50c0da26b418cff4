"""ShapeFusion: meshes and spirals, noise in the mask only, edits that keep every other bit, refusals."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError, DataError, TaskError
from zoo.neural3d.meshes import is_watertight, volume_of
from zoo.neural3d.methods.shapefusion import (
    Components,
    ShapeFusion,
    SpiralNet,
    check_region,
    noised,
    schedule,
    shapes,
    sphere,
)
from zoo.neural3d.networks import fresh
from zoo.neural3d.spirals import ball, edges_of, icosphere, spirals
from zoo.neural3d.studies.shapefusion import Edit, RegionEdits, judged


def region(anchor: int = 5, hops: int = 2):
    mesh = sphere(1)
    mask = ball(mesh.edges, len(mesh.rest), anchor, hops)
    mask[anchor] = False
    return mesh, mask


def test_spheres_refine_each_other_and_are_closed() -> None:
    vertices, faces, parents = icosphere(2)
    assert len(vertices) == 162 and len(faces) == 320 and [len(p) for p in parents] == [30, 120]
    assert is_watertight(faces) and 3.8 < volume_of(vertices, faces) < 4.19
    coarse = icosphere(1)[0]
    assert torch.equal(vertices[:42], coarse)
    middle = vertices[parents[-1]].mean(1)
    torch.testing.assert_close(vertices[42:], middle / middle.norm(dim=1, keepdim=True))


def test_spirals_turn_with_the_triangles_by_hand() -> None:
    octahedron = torch.tensor(
        [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]
    )
    found = spirals(octahedron, 6)
    assert found[4].tolist() == [4, 0, 2, 1, 3, 5]
    assert found[5].tolist() == [5, 0, 3, 1, 2, 4]
    edges = edges_of(octahedron)
    assert len(edges) == 12
    assert ball(edges, 6, 0, 1).tolist() == [True, False, True, True, True, True]


def test_noise_is_in_the_mask_only_by_hand() -> None:
    clean, mask = torch.full((1, 3, 3), 2.0), torch.tensor([[True, False, True]])
    found = noised(clean, mask, torch.tensor([0.25]), torch.ones(1, 3, 3))
    torch.testing.assert_close(found[0, 0], torch.full((3,), 0.5 * 2 + 0.75**0.5))
    assert torch.equal(found[0, 1], clean[0, 1])
    shares = schedule()
    assert float(shares[0]) == 1 and bool((shares.diff() < 0).all()) and 0 < float(shares[-1]) < 0.01


def test_an_edit_keeps_every_other_bit_and_samples_differ() -> None:
    mesh, mask = region()
    shape = shapes(mesh.rest, 1, torch.Generator().manual_seed(1))[0]
    model = fresh(SpiralNet, 0, levels=1, width=8)
    to = 1.3 * shape[5]
    made = model.edit(shape, mask, 5, to, 2, torch.Generator().manual_seed(0))
    outside = ~mask
    outside[5] = False
    assert all(torch.equal(one[outside], shape[outside]) and torch.equal(one[5], to) for one in made)
    assert bool((made[0] != made[1])[mask].any(1).all())
    row = judged(Edit(shape, mask, 5, to), made, 1)
    assert row["same"] and row["moved"] == row["anchor"] == 0 and row["differ"] > 0
    assert not judged(Edit(shape, mask, 5, to), made + 1e-6, 1)["same"]
    same = judged(Edit(shape, mask, 5, to), shape[None], 1)
    assert same["jump"] == pytest.approx(same["usual"])


def test_components_move_what_is_outside() -> None:
    mesh, mask = region()
    known = shapes(mesh.rest, 60, torch.Generator().manual_seed(0))
    fitted, shape = Components.of(known, 8), known[3]
    torch.testing.assert_close(fitted.basis @ fitted.basis.T, torch.eye(8), atol=1e-5, rtol=0)
    inside = fitted.mean + (torch.arange(8.0) / 10 @ fitted.basis).reshape(-1, 3)
    torch.testing.assert_close(fitted.edit(inside, mask, 5, inside[5]), inside, atol=1e-4, rtol=0)
    assert float((fitted.edit(shape, mask, 5, 1.2 * shape[5]) - shape)[~mask].abs().max()) > 1e-3


def test_training() -> None:
    make = ShapeFusion(levels=1, steps=2, batch=2)
    one, other = make.fit(1), make.fit(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.out.weight, fresh(SpiralNet, 1, levels=1).out.weight)


def test_what_is_refused() -> None:
    mesh, mask = region()
    with pytest.raises(DataError, match="the anchor only"):
        check_region(mesh.edges, torch.zeros_like(mask), 5)
    with pytest.raises(DataError, match="vertex 5, is in the mask"):
        check_region(mesh.edges, mask | (torch.arange(42) == 5), 5)
    far = ball(mesh.edges, 42, int((mesh.rest @ mesh.rest[5]).argmin()), 0)
    with pytest.raises(DataError, match="not connected: 1 of its"):
        check_region(mesh.edges, mask | far, 5)
    model = fresh(SpiralNet, 0, levels=1, width=8)
    with pytest.raises(DataError, match="41 vertices; the mesh has 42"):
        model.edit(mesh.rest[:41], mask[:41], 5, mesh.rest[5], 1, torch.Generator())
    with pytest.raises(DataError, match="no closed ring"):
        spirals(mesh.faces[1:], 9)
    with pytest.raises(DataError, match="triangles on one side"):
        spirals(torch.cat([mesh.faces, mesh.faces[:1]]), 9)
    with pytest.raises(ConfigError, match="at least one level"):
        ShapeFusion(steps=0)
    with pytest.raises(TaskError, match="takes a SpiralNet"):
        RegionEdits().evaluate(torch.nn.Linear(1, 1))
