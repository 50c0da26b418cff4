"""Makers of the papers' bundles, in a few steps, and what tasks say of what they make."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import find_row
from zoo.errors import ConfigError, TaskError
from zoo.methods.contract import Sparsified
from zoo.neural3d.edges import load_edges
from zoo.neural3d.fields import HashField
from zoo.neural3d.methods import queen
from zoo.neural3d.methods.edge_gaussians import EdgePoints
from zoo.neural3d.methods.part123 import PartScene
from zoo.neural3d.methods.queen import GRID, Residual, Stream
from zoo.neural3d.methods.sparp import CoordinateNet
from zoo.neural3d.priors import NOISE, affine, cloud, noisy_cloud
from zoo.neural3d.refine import start_of
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.shapes import arc, shapes
from zoo.neural3d.studies import sparp, spin_nerf
from zoo.neural3d.studies.edge_gaussians import EdgesOfABC
from zoo.neural3d.studies.part123 import ChairParts
from zoo.neural3d.studies.queen import MovingBall
from zoo.neural3d.studies.sparp import OBJECTS, ToyCameras
from zoo.neural3d.tasks import BallTakenOut
from zoo.neural3d.views import load_views
from zoo.registry import MAKERS


def made(name: str, start: nn.Module | None = None, **recipe: Any) -> Sparsified:
    """What a row makes with another recipe."""
    row = find_row(f"neural3d/{name}")
    row = replace(row, recipe={**row.recipe, **recipe})
    found: Sparsified = MAKERS.get(row.maker)(row, 0, start, Work(Path("unused")))
    return found


def test_a_noisy_cloud_is_as_far_off_as_it_says() -> None:
    views = affine(arc().train, 0)
    noisy, exact = (make(views, 300, 0, (1.0, 1.0, 1.0)) for make in (noisy_cloud, cloud))
    mean = torch.cat([view.depth[view.depth > 0] for view in views if view.depth is not None]).mean()
    off = (noisy.means - exact.means).detach() / mean
    assert float(off.std()) == pytest.approx(NOISE, rel=0.1) and torch.equal(noisy.sh0, exact.sh0)


def test_streams_hold_what_changes_and_show_what_was_learned() -> None:
    scene = start_of(shapes(24, 4, 1), 60, 0, seed=0)
    residual = Residual(scene, torch.full((60,), -5.0))
    with torch.no_grad():
        residual.moves += 0.3
        residual.latents["scales"][3, 0] = 1.6  # rounds to 2
        assert residual.gate is not None
        residual.gate.logits[7] = 5.0  # the only gate that is open
    after = Residual(residual.scene(), None)
    with torch.no_grad():
        after.moves[9] = 0.1
    video = Stream.of([residual, after])
    masks = video.changes()
    assert masks["frames.0.moves"].keep.nonzero()[:, 0].unique().tolist() == [7]
    assert masks["frames.0.scales"].kept == 1 and masks["frames.0.quats"].kept == 0
    first, second, third = video.scenes()
    assert all(map(torch.equal, second.splats.tensors, residual.scene().splats.tensors))
    moved = (second.means - first.means)[7]
    torch.testing.assert_close(moved, torch.full((3,), 0.3), atol=GRID, rtol=0)
    assert all(map(torch.equal, third.splats.tensors, after.scene().splats.tensors))
    assert torch.equal(video(arc().test[0].camera), third(arc().test[0].camera))
    with pytest.raises(ConfigError, match="one later frame or more"):
        Stream.of([])
    with pytest.raises(TaskError, match="takes a Stream of 3 frames"):
        MovingBall().evaluate(Stream.of([residual]))


def test_a_stream_is_made_with_masks_of_its_zeros() -> None:
    found = made("queen-ball", first=3, steps=1, size=16, gaussians=50)
    assert set(found.masks) == {f"frames.{t}.{name}" for t in (0, 1) for name in ("moves", *queen.LATENTS)}


def test_points_that_count_stay() -> None:
    """Opaque points on the true edges; one is faint, one is far from them."""
    if "ZOO_DATA" not in os.environ:
        pytest.skip("the edge maps are in the folder that ZOO_DATA names")
    points = EdgePoints(20)
    with torch.no_grad():
        points.means.copy_(load_edges()[1][::3000][:20])
        points.opacities.fill_(3.0)
        points.opacities[4] = -5.0
        points.means[5] = 5.0
    found = made("edge-gaussians-abc-kept", points)
    keep = found.extras["gaussians/keep"]
    assert int(keep.sum()) == len(found.model) >= 12 and not keep[4] and not keep[5]
    assert found.parts["gaussians"]["kept"] == len(found.model)
    assert torch.equal(found.model.get_parameter("scales"), points.scales[keep])
    figures = EdgesOfABC().evaluate(found.model).metrics
    assert figures["precision"].value == 1 and 0 < figures["recall"].value < 1
    assert EdgesOfABC().flops(points) is not None and EdgesOfABC().flops(nn.Linear(1, 1)) is None
    with pytest.raises(TaskError, match="takes EdgePoints"):
        EdgesOfABC().evaluate(nn.Linear(1, 1))


def test_a_field_without_the_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spin_nerf, "segmented", lambda *_: spin_nerf.arc().masks)
    views = load_views("disc-without-ball")
    assert len(views.train) == 10 and len(views.test) == 6
    found = made("spin-nerf-disc", steps=2, rays=8).model
    row = find_row("neural3d/spin-nerf-disc")
    field = HashField(**row.arguments)
    field.load_state_dict(found.state_dict())
    measured = BallTakenOut().evaluate(field.eval()).metrics
    assert measured["masked_psnr"].value > 0 and measured["masked_psnr"].value != measured["psnr"].value


def test_coordinates_are_measured_by_the_cameras_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """True coordinates give the true camera, and a network that says the same everywhere does not."""
    assert isinstance(made("sparp-toys", steps=1, batch=3).model, CoordinateNet)
    seen = sparp._joined([sparp.pictures(OBJECTS[0], 3, 32, torch.Generator().manual_seed(5))])
    monkeypatch.setattr(sparp, "held_out", lambda count, seed: seen)
    net = CoordinateNet(4)
    monkeypatch.setattr(CoordinateNet, "forward", lambda self, pictures: seen.coordinates)
    found = ToyCameras().evaluate(net).metrics
    assert found["error"].value < 1 and found["within_15"].value == 1
    monkeypatch.setattr(CoordinateNet, "forward", lambda self, pictures: 0 * seen.coordinates + 0.5)
    assert ToyCameras().evaluate(net).metrics["within_15"].value < 1
    assert ToyCameras().direction("error") == -1 == -ToyCameras().direction("within_15")


def test_parts_of_a_hardly_trained_chair() -> None:
    found = made("part123-chair", steps=40, head=3, rays=64).model
    assert isinstance(found, PartScene)
    again = PartScene(**find_row("neural3d/part123-chair").arguments)
    again.load_state_dict(found.state_dict())
    assert found(torch.zeros(2, 3)).norm(dim=1).tolist() == pytest.approx([1, 1])
    assert ChairParts().direction("parts_off") == -1
    assert ChairParts().flops(again).dense > 0


def test_a_volume_is_where_the_object_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The box of width 2.6 round the centre that the cameras look at."""
    views = shapes(16, 4, 1)
    monkeypatch.setattr("zoo.neural3d.makers.load_views", lambda name: views)
    row = replace(find_row("neural3d/gvgen-lego"), options={"side": 3, "width": 2.6}, recipe={"steps": 2})
    scene = MAKERS.get(row.maker)(row, 0, None, Work(Path("unused"))).model
    assert isinstance(scene, GaussianScene) and len(scene) == 27
    off = (scene.means.detach() - views.centre).abs().amax(0)
    torch.testing.assert_close(off, torch.full((3,), 1.3), atol=0.1, rtol=0)
