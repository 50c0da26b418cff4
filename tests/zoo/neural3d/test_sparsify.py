"""Pruning and compression: scores by hand, exact budgets, recovery, bytes, the command, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from zoo.cli import main
from zoo.errors import ConfigError, DataError
from zoo.neural3d.cameras import Camera, lens, orbit
from zoo.neural3d.formats import read_splats, write_splats
from zoo.neural3d.importance import SCORES, cameras_around, contributions, kept_rows, pruned
from zoo.neural3d.packed import Steps, read_packed, steps_for, write_packed
from zoo.neural3d.refine import mean_psnr, refine, scene_job
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import SH_C0, Splats
from zoo.neural3d.views import View


def cloud(count: int, degree: int = 0, seed: int = 0) -> Splats:
    """A ball of Gaussians, some of which are hidden, small or nearly clear."""
    generator = torch.Generator().manual_seed(seed)
    return Splats(
        torch.randn(count, 3, generator=generator) * 0.3,
        torch.randn(count, 4, generator=generator),
        torch.randn(count, 3, generator=generator) * 0.7 - 3,
        torch.randn(count, generator=generator) * 2,
        torch.randn(count, (degree + 1) ** 2, 3, generator=generator) * 0.4,
    )


def test_contributions_are_the_weights_of_blending() -> None:
    """Two layers over one pixel: 0.6, and 0.5 of the rest; what is behind the camera gives nothing."""
    opacity = torch.tensor([0.5, 0.6, 0.9])
    splats = Splats(
        torch.tensor([[0.0, 0, 3], [0, 0, 2], [0, 0, -2]]),
        torch.tensor([[1.0, 0, 0, 0]]).repeat(3, 1),
        torch.full((3, 3), math.log(50.0)),
        opacity.logit(),
        torch.zeros(3, 1, 3),
    )
    scene = GaussianScene.from_splats(splats)
    found = contributions(scene, Camera(torch.eye(4), lens(1, 1, 0.1), 1, 1))
    torch.testing.assert_close(found, torch.tensor([0.5 * 0.4, 0.6, 0.0]), atol=1e-4, rtol=0)


def test_removal_error_is_what_removal_costs() -> None:
    """Of Gaussians that do not meet, the estimate's mean over signs is the change of the picture, squared."""
    splats = Splats(
        torch.tensor([[-0.6, 0.0, 3], [0.6, 0, 3], [0, 0.8, 3]]),
        torch.tensor([[1.0, 0, 0, 0]]).repeat(3, 1),
        torch.full((3, 3), math.log(0.08)),
        torch.tensor([0.9, 0.3, 0.6]).logit(),
        torch.tensor([[1.0, 1, 1], [1, 0.2, 0.6], [0.3, 0.4, 0.5]])[:, None] / SH_C0 - 0.5 / SH_C0,
    )
    scene, camera = (
        GaussianScene.from_splats(splats, (0.2, 0.2, 0.2)),
        Camera(torch.eye(4), lens(40, 40, 0.8), 40, 40),
    )
    whole = scene(camera).detach()
    true = []
    for index in range(3):
        rest = scene.like(splats.rows(torch.arange(3) != index))
        true.append(float((rest(camera).detach() - whole).square().sum()))
    draws = torch.stack([SCORES["removal-error"](scene, [camera], seed) for seed in range(60)]).mean(0)
    torch.testing.assert_close(draws, torch.tensor(true), rtol=0.5, atol=0)
    assert draws.argsort().tolist() == torch.tensor(true).argsort().tolist()


def test_the_budget_is_exact_and_ties_go_to_the_first() -> None:
    assert kept_rows(torch.tensor([1.0, 3, 3, 3, 2]), 0.4).tolist() == [False, True, True, False, False]
    scene = GaussianScene.from_splats(cloud(333))
    cameras = orbit(torch.zeros(3), 2.0, 3, (24, 24))
    for name, score in SCORES.items():
        for rounds in (1, 3):
            mask = pruned(scene, score, 0.3, cameras, rounds=rounds)
            assert int(mask.sum()) == 100, name
    for keep in (0.0, 1.5, 0.0001):
        with pytest.raises(ConfigError, match="keep must be"):
            kept_rows(torch.zeros(5), keep)


def test_scores_that_look_beat_chance_and_rounds_help() -> None:
    splats = cloud(600, seed=3)
    scene = GaussianScene.from_splats(splats, (1.0, 1.0, 1.0))
    cameras, judged = cameras_around(splats, 6, 48), cameras_around(splats, 3, 48, held_out=True)
    with torch.no_grad():
        views = [View(camera, scene(camera).clamp(0, 1)) for camera in judged]

    def left(name: str, rounds: int) -> float:
        mask = pruned(scene, SCORES[name], 0.4, cameras, rounds=rounds)
        return mean_psnr(scene.like(splats.rows(mask)), views)

    chance, single, several = left("random", 1), left("removal-error", 1), left("removal-error", 4)
    assert chance + 3 < left("max-contribution", 1) and chance + 3 < single < several


def test_recovery_brings_the_picture_back() -> None:
    splats = cloud(400, seed=4)
    scene = GaussianScene.from_splats(splats, (1.0, 1.0, 1.0))
    cameras = cameras_around(splats, 8, 40)
    with torch.no_grad():
        views = [View(camera, scene(camera).clamp(0, 1)) for camera in cameras]
    small = scene.like(splats.rows(pruned(scene, SCORES["removal-error"], 0.3, cameras)))
    before = mean_psnr(small, views)
    job = scene_job(views, steps=60)
    refine(small, job)
    assert mean_psnr(small, views) > before + 1.5 and len(small) == 120
    assert job.cost.seconds > 0


@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_packed_scenes_are_off_by_half_a_step(tmp_path: Path, count: int, degree: int) -> None:
    splats, steps = cloud(count, degree), Steps(0.01)
    size = write_packed(tmp_path / "a.safetensors", splats, steps)
    assert size == (tmp_path / "a.safetensors").stat().st_size
    found = read_packed(tmp_path / "a.safetensors")
    assert len(found) == count and found.sh_degree == degree
    if not count:
        return
    nearest = torch.cdist(splats.means, found.means, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    found = found.rows(nearest)
    torch.testing.assert_close(found.means, splats.means, atol=0.00501, rtol=0)
    torch.testing.assert_close(found.scales, splats.scales, atol=steps.scale / 2 + 1e-5, rtol=0)
    most = steps.opacity / 2 + 1e-5
    torch.testing.assert_close(found.opacities.sigmoid(), splats.opacities.sigmoid(), atol=most, rtol=0)
    torch.testing.assert_close(found.sh[:, 1:], splats.sh[:, 1:], atol=steps.harmonics / 2 + 1e-5, rtol=0)
    unit = splats.quats / splats.quats.norm(dim=1, keepdim=True)
    assert float((found.quats * unit).sum(1).abs().min()) > 0.99


def test_damaged_packed_scenes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_packed(path, cloud(50), Steps(0.01))
    streams = load_file(path)
    meta = {"format": "zoo-splats-1", "count": "50", "bases": "1"}
    for change, match in (
        ({"position": streams["position"][:-20]}, "missing or damaged"),
        ({"scale": streams["rotation"][:0]}, "missing or damaged"),
        ({"steps": streams["steps"][:2]}, "missing or damaged"),
    ):
        save_file(streams | change, path, metadata=meta)
        with pytest.raises(DataError, match=match):
            read_packed(path)
    for change, match in (
        ({"format": "other"}, "format 'other'"),
        ({"count": "999999"}, "damaged"),
        ({"bases": "7"}, "7"),
    ):
        save_file(streams, path, metadata=meta | change)
        with pytest.raises(DataError, match=match):
            read_packed(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="not a packed scene"):
        read_packed(path)


def test_the_command(tmp_path: Path, capsys) -> None:
    scene, out = tmp_path / "scene.ply", tmp_path / "small.safetensors"
    write_splats(scene, cloud(500, 1, seed=5))
    words = ["sparsify", str(scene), "--keep", "0.4", "--out", str(out), "--steps", "10", "--degree", "0"]
    words += ["--views", "6", "--size", "48", "--picture", str(tmp_path / "both.png"), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gaussians"] == [500, 200] and report["degree"] == [1, 0]
    assert report["bytes"] == [scene.stat().st_size, out.stat().st_size]
    assert report["psnr"] > 15 and len(read_packed(out)) == 200
    assert (tmp_path / "both.png").stat().st_size > 1000
    assert main([*words[:5], str(tmp_path / "small.ply"), "--views", "4", "--size", "32"]) == 0
    text = capsys.readouterr().out
    assert "200 of 500 Gaussians by removal-error" in text and "dB against the whole scene" in text
    assert len(read_splats(tmp_path / "small.ply")) == 200


def test_the_command_refuses(tmp_path: Path, capsys) -> None:
    scene = tmp_path / "scene.ply"
    write_splats(scene, cloud(20))
    for words, match in (
        (["--out", "a.obj"], "give a name that ends in"),
        (["--out", str(scene)], "is there already"),
        (["--out", str(tmp_path / "b.ply"), "--keep", "0"], "keep must be"),
        (["--out", str(tmp_path / "b.ply"), "--keep", "30"], "--keep must be a share"),
        (["--out", str(tmp_path / "b.ply"), "--views", "1"], "views must be at least"),
    ):
        assert main(["sparsify", str(scene), *words]) == 2
        assert match in capsys.readouterr().err


def test_steps_follow_the_size_of_the_gaussians() -> None:
    splats = cloud(100)
    grown = Splats(
        splats.means * 10, splats.quats, splats.scales + math.log(10.0), splats.opacities, splats.sh
    )
    assert steps_for(grown).position == pytest.approx(10 * steps_for(splats).position, rel=1e-3)
