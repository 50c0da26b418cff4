"""QUEEN: gates and their start by hand, the file against the trained state, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from zoo.errors import ConfigError, DataError
from zoo.neural3d.cameras import orbit
from zoo.neural3d.methods.queen import (
    BETA,
    ETA,
    GAMMA,
    GRID,
    Queen,
    Residual,
    gate_logits,
    gradient_difference,
    read_frame,
    write_frame,
)
from zoo.neural3d.refine import mean_psnr, start_of
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.shapes import BALLS, FIELD, shapes, view_of
from zoo.neural3d.views import View


def frames() -> tuple[list[View], list[View]]:
    """Two frames of four views, in the second of which the red ball has moved."""
    cameras = orbit(torch.tensor([0.0, -0.3, 0.0]), 3.6, 4, (24, 24), field_of_view=FIELD)
    moved = BALLS.clone()
    moved[0, 1] -= 0.25
    return [view_of(camera) for camera in cameras], [view_of(camera, "", moved) for camera in cameras]


@pytest.fixture(scope="module")
def scene() -> GaussianScene:
    return start_of(shapes(24, 4, 1), 200, 0, seed=0)


def test_gates_by_hand(scene: GaussianScene) -> None:
    """log alpha = 0: sigmoid(0) (1.01 + 0.5) - 0.5 = 0.255, open with probability
    sigmoid(-0.3 log(0.5 / 1.01))."""
    residual = Residual(scene, torch.zeros(200))
    assert residual.gate is not None
    torch.testing.assert_close(residual.gates(), torch.full((200,), 0.255), atol=1e-6, rtol=0)
    chance = 1 / (1 + math.exp(0.3 * math.log(0.5 / 1.01)))
    torch.testing.assert_close(residual.gate.open_probability(), torch.full((200,), chance))
    assert Residual(scene, None).gates().unique().tolist() == [1.0]


def test_a_gate_starts_at_its_share_of_the_change() -> None:
    """G = 0, median, three times the median: open with probability 0, 1/2, 3/4 (up to the bounds)."""
    logits = gate_logits(torch.tensor([0.0, 1.0, 3.0, 1.0, 0.0]))
    p = torch.sigmoid(logits - BETA * math.log(-GAMMA / ETA))
    torch.testing.assert_close(p[1:4], torch.tensor([0.5, 0.75, 0.5]))
    assert p[0] < 0.002 and gate_logits(torch.zeros(3)).isfinite().all()


def test_what_changed_is_found(scene: GaussianScene) -> None:
    old, new = frames()
    found = gradient_difference(scene, old, new)
    near = (scene.means.detach() - BALLS[0, :3]).norm(dim=1) < 0.55
    assert found[near].mean() > 3 * found[~near].mean()
    assert gradient_difference(scene, old, old).abs().max() < 1e-7


def test_moves_are_gated_and_others_are_sums_over_latents(scene: GaussianScene) -> None:
    residual = Residual(scene, torch.full((200,), -5.0))
    with torch.no_grad():
        residual.moves += 0.3
        residual.latents["scales"][:, 0] = 1.6  # rounds to 2
        residual.matrices["scales"][0] = torch.tensor([0.5, 0.0, -0.25])
        assert residual.gate is not None
        residual.gate.logits[7] = 5.0  # open: sigmoid(5 / 0.3) 1.51 - 0.5 > 1
    after = residual.scene()
    moved = after.means - scene.means
    torch.testing.assert_close(moved[7], torch.full((3,), 0.3), atol=GRID, rtol=0)
    assert not moved[torch.arange(200) != 7].any()
    torch.testing.assert_close((after.scales - scene.scales)[0], torch.tensor([1.0, 0.0, -0.5]))
    assert torch.equal(after.opacities, scene.opacities)


def test_the_file_is_the_trained_state(scene: GaussianScene, tmp_path: Path) -> None:
    old, new = frames()
    before = scene.splats.map(torch.Tensor.clone)
    residual = Queen(steps=12).fit(scene, old, new)
    after = residual.scene()
    assert mean_psnr(after, new) > mean_psnr(scene, new)
    size = write_frame(tmp_path / "frame", residual)
    decoded = read_frame(tmp_path / "frame", scene)
    assert size == (tmp_path / "frame").stat().st_size < 56 * 200
    assert all(map(torch.equal, decoded.splats.tensors, after.splats.tensors))
    assert all(map(torch.equal, scene.splats.tensors, before.tensors))
    torch.testing.assert_close(residual(new[0].camera), after(new[0].camera), atol=1e-5, rtol=0)


def test_what_is_refused(scene: GaussianScene, tmp_path: Path) -> None:
    old, new = frames()
    for wrong in (old[:3], old[::-1], [replace(v.reduced(2), mask=None) for v in old], []):
        with pytest.raises(ConfigError, match="same cameras in the same order"):
            gradient_difference(scene, wrong, new)
    residual, path = Residual(scene, torch.zeros(200)), tmp_path / "frame"
    with torch.no_grad():
        residual.moves.normal_()
    write_frame(path, residual)
    other = scene.like(scene.splats)
    with torch.no_grad():
        other.means[0, 0] += 1e-3
    with pytest.raises(DataError, match="goes on from another scene"):
        read_frame(path, other)
    with pytest.raises(DataError, match="no frame of a stream"):
        read_frame(tmp_path / "none", scene)
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    with pytest.raises(DataError, match="no frame of a stream"):
        read_frame(path, scene)
    path.write_bytes(content.replace(b"zoo-queen-1", b"zoo-queen-9"))
    with pytest.raises(DataError, match="this code reads"):
        read_frame(path, scene)
    path.write_bytes(content)
    streams = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        meta = file.metadata()
    for name, broken in streams.items():
        save_file({**streams, name: broken[: len(broken) // 2]}, path, metadata=meta)
        with pytest.raises(DataError, match="missing or damaged"):
            read_frame(path, scene)
