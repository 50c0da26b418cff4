"""Densification: what is cloned, split and dropped, moments carried; resuming after a kill bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from zoo.bundles.catalog import find
from zoo.bundles.store import load_bundle
from zoo.errors import ConfigError
from zoo.neural3d.densify import Densification, Densifier
from zoo.neural3d.finetune import Finetune
from zoo.neural3d.refine import picture_loss, rate_groups, scene_job, start_of
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.shapes import shapes
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.structure.resize import RowResizer

NAMES = ("means", "quats", "scales", "opacities", "sh0", "shN")


def small_scene() -> GaussianScene:
    """Four Gaussians: small and pulled at, large and pulled at, at rest, faint."""
    scene = GaussianScene(4)
    with torch.no_grad():
        scene.means.copy_(torch.arange(12.0).reshape(4, 3))
        scene.scales.copy_(torch.tensor([0.005, 0.5, 0.005, 0.005]).log()[:, None].expand(4, 3))
        scene.opacities.copy_(torch.tensor([0.5, 0.5, 0.5, 0.001]).logit())
    return scene


def test_what_is_cloned_split_and_dropped_with_moments() -> None:
    scene = small_scene()
    densifier = Densifier(scene, Densification(gradient=0.1), extent=1.0)
    optimizer = torch.optim.Adam(scene.parameters(), lr=0.0)
    sum(p.sum() for p in scene.parameters()).backward()
    optimizer.step()
    for p in scene.parameters():
        optimizer.state[p]["exp_avg"].copy_(torch.arange(4.0).reshape(4, *[1] * (p.dim() - 1)).expand_as(p))
    scene.get_buffer("pull").copy_(torch.tensor([0.5, 0.6, 0.3, 0.0]))
    scene.get_buffer("seen").copy_(torch.tensor([2.0, 1.0, 4.0, 0.0]))  # means 0.25, 0.6, 0.075, 0
    densifier.change(RowResizer(scene, NAMES, [optimizer]), step=100)
    assert scene.means[:3, 0].tolist() == [0.0, 6.0, 0.0]  # kept, kept, the clone
    torch.testing.assert_close(scene.scales[3:].exp(), torch.full((2, 3), 0.5 / 1.6))
    assert len(scene) == 5 and not scene.means[3:].eq(torch.tensor([3.0, 4.0, 5.0])).any()
    assert (scene.means[3:] - torch.tensor([3.0, 4.0, 5.0])).abs().max() < 4 * 0.5
    assert optimizer.state[scene.means]["exp_avg"][:, 0].tolist() == [0.0, 2.0, 0.0, 0.0, 0.0]
    assert optimizer.param_groups[0]["params"][0] is scene.means
    assert scene.get_buffer("pull").tolist() == [0.0] * 5
    densifier.finish()
    assert set(scene.state_dict()) == set(NAMES)


def test_a_bound_doubles_the_most_pulled_first_and_a_faint_scene_is_refused() -> None:
    scene = small_scene()
    densifier = Densifier(scene, Densification(gradient=0.1, most=5), extent=1.0)
    scene.get_buffer("pull").copy_(torch.tensor([0.25, 0.6, 0.3, 0.0]))
    densifier.change(RowResizer(scene, NAMES), step=100)
    assert len(scene) == 4 and bool((scene.scales.exp() < 0.4).all())  # the large one alone was split
    with pytest.raises(ConfigError, match="all 4 Gaussians are fainter than 0.9"):
        Densifier(scene, Densification(opacity=0.9), 1.0).change(RowResizer(scene, NAMES), step=1)


def test_pull_is_the_gradient_in_a_view_of_size_two() -> None:
    views = shapes(16, 2, 1)
    scene = start_of(views, 30, 0, seed=0)
    densifier = Densifier(scene, Densification(), 1.0)
    view = views.train[0]
    densifier.loss(scene, view).backward()
    moved = []
    for step in (-0.02, 0.02):
        shift = torch.zeros(30, 2)
        shift[7, 0] = step
        with torch.no_grad():
            moved.append(float(picture_loss(scene.render(view.camera, shift=shift).colour, view)))
    assert densifier._shift.grad is not None
    slope = (moved[1] - moved[0]) / 0.04
    assert math.isclose(slope, float(densifier._shift.grad[7, 0]), rel_tol=0.1, abs_tol=1e-6)
    job = scene_job(views.train, steps=4)
    fit = job.replace(loss=densifier.loss).fit(scene, macs=lambda: 0.0, lr=0.0)
    fit.run(lambda: densifier.after_step(fit), until_step=1)
    grad = densifier._shift.grad
    torch.testing.assert_close(scene.get_buffer("pull"), (grad * 8).norm(dim=1))


def test_a_killed_densifying_training_resumes_bit_for_bit() -> None:
    views = shapes(24, 6, 1)
    options = Densification(every=5, gradient=1e-5, most=120)

    def begin(scene: GaussianScene):
        densifier = Densifier(scene, options, 3.0, seed=2)
        job = scene_job(views.train, steps=24).replace(loss=densifier.loss)
        fit = job.fit(scene, parameters=rate_groups(scene, 3.0), macs=lambda: 0.0)
        return fit, lambda: densifier.after_step(fit)

    whole, half, again = (start_of(views, 40, 0, seed=1) for _ in range(3))
    fit, after = begin(whole)
    fit.run(after)
    stopped, after = begin(half)
    stopped.run(after, until_step=8)
    state = {name: value.clone() for name, value in stopped.state().items()}
    assert 40 < len(half) < 120
    resumed, after = begin(again)
    resumed.load_state(state)
    assert len(again) == len(half)
    resumed.run(after)
    assert len(whole) == len(again) != len(half)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_densification_refuses() -> None:
    with pytest.raises(ConfigError, match="every >= 1"):
        Densification(every=0)
    with pytest.raises(ConfigError, match="gradient > 0"):
        Densification(gradient=0.0)
    scene = small_scene()
    set_masks(scene, MaskSet({"scales": torch.ones(4, 3, dtype=torch.bool)}))
    with pytest.raises(ConfigError, match="carry masks"):
        Densifier(scene, Densification(), 1.0)


def test_a_pruned_scene_trains_on(tmp_path: Path) -> None:
    name = "neural3d/pruned-gaussians-shapes-k30"
    common = {"model": name, "dataset": "shapes-12", "out": tmp_path / "tuned"}
    plain = Finetune(**common)
    source = find(name)
    plan = plain.plan(source, load_bundle(source), None, torch.device("cpu"))
    assert len(plan.model.means) == 600 and plan.after_step is None and plan.parts is None
    more = Finetune(**common, steps=4, densify=True, densify_every=2, most=620, gradient=1e-9)
    plan = more.plan(source, load_bundle(source), None, torch.device("cpu"))
    more._train(source, plan, None, None)
    assert len(plan.model.means) == 620 and plan.parts == plan.extras == {}
    assert set(plan.model.state_dict()) == set(NAMES)  # nothing of the densification is left in it
    with pytest.raises(ConfigError, match="fitted to pictures"):
        Finetune(**common, distillation=1.0).plan(source, plan.model, None, torch.device("cpu"))


def test_a_hollow_field_trains_on_and_its_zeros_stay(tmp_path: Path) -> None:
    source = find("neural3d/hollow-field-shapes-c1")
    tuner = Finetune(model=source.card.name, dataset="shapes-12", out=tmp_path / "tuned", steps=3)
    plan = tuner.plan(source, load_bundle(source), None, torch.device("cpu"))
    before = {name: value.detach().clone() for name, value in plan.model.named_parameters()}
    tuner._train(source, plan, None, None)
    masks = masks_of(plan.model)
    assert masks is not None and set(masks) == {"saliency", "table"} and not masks.lost_zeros(plan.model)
    for name, value in plan.model.named_parameters():
        assert not torch.equal(value, before[name])
        assert name not in masks or torch.equal(value != 0, before[name] != 0)
    with pytest.raises(ConfigError, match="no Gaussians to densify"):
        Finetune(model=source.card.name, out=tmp_path / "other", densify=True).plan(
            source, plan.model, None, torch.device("cpu")
        )
