"""SpaRP: cameras from pairs, with noise and outliers, votes, coordinates, networks, refusals."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import DataError
from zoo.neural3d.methods.sparp import (
    CoordinateNet,
    PoseNet,
    _scaled,
    agreed,
    angle_between,
    decode,
    encode,
    pnp,
    pnp_ransac,
    pose_of,
    random_turns,
)
from zoo.neural3d.studies.sparp import HIGH, LOW, OBJECTS, PoseOptions, net_loss, pictures, spoiled


def seen(size: int = 32):
    return pictures(OBJECTS[0], 1, size, torch.Generator().manual_seed(3))


def pairs():
    found = seen()
    mask = found.pictures[0, 3] > 0.5
    row, column = mask.nonzero(as_tuple=True)
    points = decode(found.coordinates[0][:, row, column].T, LOW, HIGH)
    return points, torch.stack([column, row], 1) + 0.5, found.cameras[0]


def test_the_camera_of_exact_pairs() -> None:
    points, pixels, camera = pairs()
    pose = pnp(points, pixels, camera.intrinsics)
    torch.testing.assert_close(pose.float(), camera.viewmat, atol=1e-3, rtol=0)
    assert float(torch.linalg.det(pose[:3, :3])) == pytest.approx(1)


def test_outliers_spoil_least_squares_and_not_ransac() -> None:
    points, pixels, camera = pairs()
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(points), generator=generator) < 0.3
    points = torch.where(wrong[:, None], torch.rand(points.shape, generator=generator) * 2 - 1, points)
    pose, inside = pnp_ransac(points, pixels, camera.intrinsics, reach=0.5)
    assert float(angle_between(pose[:3, :3], camera.viewmat[:3, :3])) < 0.5
    assert float((inside == ~wrong).float().mean()) > 0.95
    assert float(angle_between(pnp(points, pixels, camera.intrinsics)[:3, :3], camera.viewmat[:3, :3])) > 2


def test_the_scaled_start_by_itself() -> None:
    """Of exact pairs POSIT is nearly exact without any refinement."""
    points, pixels, camera = pairs()
    flat = (pixels.double() - camera.intrinsics[:2, 2]) / camera.intrinsics.diagonal()[:2]
    turn, move = _scaled(points.double()[None], flat[None])
    assert float(angle_between(turn[0], camera.viewmat[:3, :3])) < 0.2
    torch.testing.assert_close(move[0].float(), camera.viewmat[:3, 3], atol=0.02, rtol=0)


def test_noise_on_a_far_object() -> None:
    """Noise of 0.18 on every point, all pairs wrong by a little: what a learned map is. The direct linear
    transform ends anywhere, scaled orthography near the truth."""
    points, pixels, camera = pairs()
    points = points + 0.18 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0))
    truth = camera.viewmat[:3, :3]
    assert float(angle_between(pnp(points, pixels, camera.intrinsics)[:3, :3], truth)) < 15
    pose, inside = pnp_ransac(points, pixels, camera.intrinsics, reach=4.0)
    assert float(angle_between(pose[:3, :3], truth)) < 15 and float(inside.float().mean()) > 0.5


def test_angles_and_votes_by_hand() -> None:
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert float(angle_between(torch.eye(3), quarter)) == pytest.approx(90)
    assert float(angle_between(quarter, quarter)) == pytest.approx(0, abs=1e-5)
    assert agreed([quarter @ quarter, torch.eye(3), quarter]) == 2
    turns = random_turns(200, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(200, 3, 3), atol=1e-5, rtol=0)
    assert bool((torch.linalg.det(turns) > 0.99).all()) and float(turns.mean(0).abs().max()) < 0.15


def test_coordinates_there_and_back_and_the_pose_of_a_map() -> None:
    points = torch.tensor([[-1.0, 0, 1], [0.5, 0.25, -0.5]])
    assert encode(points, LOW, HIGH)[0].tolist() == [0, 0.5, 1]
    torch.testing.assert_close(decode(encode(points, LOW, HIGH), LOW, HIGH), points)
    found = seen()
    mask, camera = found.pictures[0, 3] > 0.5, found.cameras[0]
    posed = pose_of(found.coordinates[0].permute(1, 2, 0), mask, LOW, HIGH, camera.intrinsics)
    torch.testing.assert_close(posed.viewmat, camera.viewmat, atol=1e-3, rtol=0)


def test_spoiled_poses_and_their_hull() -> None:
    row = spoiled("ransac", PoseOptions(poses=9), 0)
    assert row["error"] < 3 and row["watertight"] and min(row["iou"]) > 0.4


def test_networks() -> None:
    found = pictures(OBJECTS[1], 3, 32, torch.Generator().manual_seed(0))
    assert CoordinateNet(8)(found.pictures).shape == (3, 3, 32, 32)
    turns = PoseNet(8)(found.pictures)
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(3, 3, 3), atol=1e-5, rtol=0)
    assert float(torch.linalg.det(turns.detach()).min()) == pytest.approx(1, abs=1e-4)
    assert net_loss(CoordinateNet(8), found).ndim == net_loss(PoseNet(8), found).ndim == 0


def test_what_is_refused() -> None:
    points, pixels, camera = pairs()
    for solve in (pnp, pnp_ransac):
        with pytest.raises(DataError, match="6 pixels of the object; received 5"):
            solve(points[:5], pixels[:5], camera.intrinsics)
    noise = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="no pose that 6 of 40"):
        pnp_ransac(noise, torch.rand(40, 2) * 1e4, camera.intrinsics, reach=1e-6)
    with pytest.raises(DataError, match=r"lie in \[0, 1\]"):
        decode(torch.tensor([[0.2, 0.3, 1.4]]), LOW, HIGH)
    with pytest.raises(DataError, match="mirrored or flat"):
        decode(torch.tensor([[0.2, 0.3, 0.4]]), LOW, torch.tensor([1.0, -1.5, 1]))
