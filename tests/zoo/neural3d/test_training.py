"""Scenes as models of the zoo: training, resuming, held-out tasks, jobs, and pruning as a method."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError, DataError, TaskError
from zoo.harness.tasks import get_task
from zoo.neural3d.methods.splat_pruning import SplatPruning
from zoo.neural3d.refine import RATES, mean_psnr, rate_groups, refine, scene_job, start_of
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.shapes import shapes
from zoo.neural3d.splats import from_points
from zoo.neural3d.views import Views
from zoo.registry import JOBS, METHODS


@pytest.fixture(scope="module")
def views() -> Views:
    return shapes(32, 8, 2)


def test_points_become_gaussians_as_wide_as_their_spacing() -> None:
    grid = torch.stack(torch.meshgrid(*[torch.arange(3.0)] * 3, indexing="ij"), -1).reshape(-1, 3) * 0.2
    splats = from_points(grid, torch.full((27, 3), 0.7), 1)
    torch.testing.assert_close(splats.scales.exp(), torch.full((27, 3), 0.2), atol=1e-3, rtol=0)
    assert splats.sh.shape == (27, 4, 3) and not splats.sh[:, 1:].any()
    torch.testing.assert_close(splats.sh[:, 0] * 0.28209479 + 0.5, torch.full((27, 3), 0.7))


def test_training_fits_and_held_out_views_gain(views: Views) -> None:
    scene = start_of(views, 300, 0, seed=0)
    before = mean_psnr(scene, views.test)
    job = scene_job(views.train, views.test, steps=80)
    refine(scene, job)
    assert job.score is not None and job.score(scene) > before + 2


def test_rates_are_those_of_the_field(views: Views) -> None:
    groups = {group["name"]: group["lr"] for group in rate_groups(start_of(views, 10, 1, 0), 2.0, 0.5)}
    assert groups == {n: 0.5 * rate * (2 if n == "means" else 1) for n, rate in RATES.items()}


def test_a_killed_training_resumes_bit_for_bit(views: Views) -> None:
    job = scene_job(views.train, steps=24)

    def fit(scene: GaussianScene):
        return job.fit(scene, parameters=rate_groups(scene, 3.0), macs=lambda: 0.0)

    whole, half, again = (start_of(views, 60, 0, seed=1) for _ in range(3))
    fit(whole).run()
    stopped = fit(half)
    stopped.run(until=1)
    state = stopped.state()
    resumed = fit(again)
    resumed.load_state(state)
    resumed.run()
    assert 0 < stopped.step < resumed.step == 24
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_embedded_task(views: Views) -> None:
    task = get_task("neural3d/shapes")
    scene = start_of(shapes(16, 2, 1), 50, 0, seed=0).eval()
    result = task.evaluate(scene)
    assert result.n == 8 and set(result.metrics) == {"psnr", "ssim", "masked_psnr", "masked_ssim"}
    assert result.samples["psnr"] == task.evaluate(scene).samples["psnr"]
    flops = task.flops(scene)
    assert flops is not None and flops.dense == flops.sparse > 8 * 50 * 38
    with pytest.raises(TaskError, match="takes scenes that render; received Linear"):
        task.evaluate(nn.Linear(2, 2))


def test_pruning_as_a_method(views: Views) -> None:
    scene = start_of(views, 200, 0, seed=0)
    refine(scene, scene_job(views.train, steps=40))
    job = scene_job(views.train, steps=20, seed=3)
    kept = scene.means.detach().clone()
    made = METHODS.get("splat-pruning")(keep=0.25).sparsify(scene, job)
    assert len(made.model) == 50 and torch.equal(scene.means, kept)
    assert made.parts["gaussians"] == {"kept": 50, "total": 200, "sparsity": 0.75, "pattern": "rows"}
    assert int(made.extras["gaussians/keep"].sum()) == 50 and len(made.extras["gaussians/keep"]) == 200
    assert made.arguments is not None and GaussianScene(**made.arguments).means.shape == (50, 3)
    assert made.hyperparameters["keep"] == 0.25 and made.hyperparameters["seed"] == 3
    untuned = SplatPruning(keep=0.25, tune=False).sparsify(scene, job)
    rows = (untuned.model.means[:, None] == kept).all(2).any(1)
    assert bool(rows.all()) and mean_psnr(made.model, views.train) > mean_psnr(untuned.model, views.train)


def test_what_pruning_refuses(views: Views) -> None:
    scene, job = start_of(views, 20, 0, seed=0), scene_job(views.train)
    with pytest.raises(ConfigError, match="a scene of Gaussians; received Linear"):
        SplatPruning().sparsify(nn.Linear(2, 2), job)
    with pytest.raises(ConfigError, match="learns from data"):
        SplatPruning().sparsify(scene)
    with pytest.raises(ConfigError, match="fitted to views"):
        SplatPruning().sparsify(scene, dataclasses.replace(job, batches=[(torch.zeros(1), torch.zeros(1))]))
    with pytest.raises(ConfigError, match="rounds"):
        SplatPruning(rounds=0).sparsify(scene, job)


def test_jobs_by_name() -> None:
    make = JOBS.get("neural3d")
    job = make("shapes-32", seed=4, limit=5)
    assert len(job.batches) == 5 and job.seed == 4 and max(job.batches.views[0].image.shape) <= 32
    with pytest.raises(ConfigError, match="--dataset"):
        make()
    with pytest.raises(DataError, match="unknown views"):
        make("nothing-50")
