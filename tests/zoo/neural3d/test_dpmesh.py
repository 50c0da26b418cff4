"""DPMesh: heat maps, hidden joints, the body, the single pass, corrections layer by layer, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.errors import ConfigError, DataError, TaskError
from zoo.neural3d.bodies import JOINTS, OFFSETS, Bodies, faces, from_six, rotations
from zoo.neural3d.meshes import is_watertight, volume_of
from zoo.neural3d.methods import dpmesh
from zoo.neural3d.methods.dpmesh import DPMesh, DPMeshNet, crops, heat_maps, mesh_loss, spoil, vertex_error
from zoo.neural3d.networks import fresh
from zoo.neural3d.studies.dpmesh import HiddenJoints


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def resting(count: int = 1) -> Bodies:
    turns = torch.eye(3).expand(count, 10, 3, 3)
    return Bodies(turns, torch.zeros(count, 3), torch.tensor([[1.0, 0, 0]]).expand(count, 3))


def test_a_missing_joint_has_an_empty_map_and_a_known_one_a_blob_by_hand() -> None:
    joints = torch.zeros(1, JOINTS, 2)
    joints[0, 1] = torch.tensor([6.0, 10.0])  # the middle of column 1, row 2 of places of 4 pixels
    known = torch.zeros(1, JOINTS, dtype=torch.bool)
    known[0, 1] = True
    maps = heat_maps(joints, known)
    assert float(maps[0, 0].abs().max()) == 0  # no blob at the corner
    assert float(maps[0, 1, 2, 1]) == 1
    assert float(maps[0, 1, 2, 2]) == pytest.approx(math.exp(-0.5 / 0.75**2))
    assert float(maps[0, 1, 3, 1]) == float(maps[0, 1, 2, 2]) > float(maps[0, 1, 4, 1])


def test_joints_are_hidden_by_share_moved_by_noise_and_never_all() -> None:
    crop = crops(40, generator())
    hidden = spoil(crop, 0.3, 0.0, generator(1))
    assert float((~hidden.known).float().mean()) == pytest.approx(0.3, abs=0.05)
    assert torch.equal(hidden.joints, crop.joints) and hidden.bodies is crop.bodies
    assert bool(spoil(crop, 0.99, 0.0, generator(1)).known.any(1).all())
    moved = spoil(crop, 0.0, 1.5, generator(1))
    inner = ((crop.joints > 6) & (crop.joints < 26)).all(2)
    assert float((moved.joints - crop.joints)[inner].std()) == pytest.approx(1.5, rel=0.1)
    assert bool(moved.known.all())


def test_the_body_by_hand() -> None:
    rest = resting()
    places, _ = rest.frames()
    torch.testing.assert_close(places[0, 4], OFFSETS[1] + OFFSETS[3] + OFFSETS[4])
    turns = rest.turns.clone()
    turns[0, 2] = rotations(torch.tensor([0.0, 0.0, math.pi / 2]))  # the left shoulder
    bent = Bodies(turns, rest.shape, rest.camera).frames()[0]
    torch.testing.assert_close(bent[0, 3], places[0, 3])
    torch.testing.assert_close(bent[0, 4] - bent[0, 3], torch.tensor([-0.27, 0.05, 0.0]))
    torch.testing.assert_close(bent[0, 9:], places[0, 9:])
    longer = Bodies(rest.turns, torch.tensor([[0.0, 0.0, math.log(2)]]), rest.camera).frames()[0]
    torch.testing.assert_close(longer[0, 10] - longer[0, 9], 2 * OFFSETS[10])
    assert rest.seen(torch.zeros(1, 1, 3)).tolist() == [[[16.0, 16.0]]]
    mesh = rest.vertices()[0], faces()
    assert len(mesh[0]) == 168 and is_watertight(mesh[1]) and volume_of(*mesh) > 0
    six = torch.randn(4, 6, generator=generator())
    assert float(torch.linalg.det(from_six(six)).min()) == pytest.approx(1, abs=1e-4)


def test_one_pass_is_corrected_layer_by_layer_and_control_begins_at_zero() -> None:
    model, crop = fresh(DPMeshNet, 0, width=8, token=8, fused=16), crops(3, generator())
    given = spoil(crop, 0.4, 1.0, generator())
    found = model(*given[:3])
    assert len(found) == 2 and found[0].joints.shape == (3, JOINTS, 3)
    assert bool((vertex_error(found[-1], crop.bodies) > 0).all())
    assert float(vertex_error(found[0]._replace(bodies=crop.bodies), crop.bodies).max()) == 0
    mesh_loss(found, crop.bodies).backward()
    gate = model.gates[0].weight
    assert not bool(gate.any()) and bool(gate.grad.any())
    # What lies at a joint that is not known has no influence.
    other = given.joints + 5 * ~given.known[..., None]
    torch.testing.assert_close(model(given.picture, other, given.known)[-1].joints, found[-1].joints)


def test_a_prior_a_teacher_and_a_pupil(monkeypatch) -> None:
    monkeypatch.setattr(dpmesh, "POOL", 4)
    dpmesh._pool.cache_clear()
    make = DPMesh(steps=1, prior=1, batch=1)
    model = make.fit(3)
    for kept in (dpmesh._trained, dpmesh._denoiser, dpmesh._pool):
        kept.cache_clear()
    again = make.fit(3)
    dpmesh._pool.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_is_refused() -> None:
    known = torch.ones(1, JOINTS, dtype=torch.bool)
    outside = torch.full((1, JOINTS, 2), 16.0)
    outside[0, 3, 0] = 40.0
    with pytest.raises(DataError, match="joint 3 of crop 0 is at .*outside the 32 pixels"):
        heat_maps(outside, known)
    with pytest.raises(DataError, match="crop 0 has no known joint"):
        heat_maps(torch.zeros(1, JOINTS, 2), ~known)
    with pytest.raises(ConfigError, match="below 1"):
        DPMesh(missing=1.0)
    with pytest.raises(TaskError, match="takes a DPMeshNet; received Linear"):
        HiddenJoints().evaluate(torch.nn.Linear(1, 1))
