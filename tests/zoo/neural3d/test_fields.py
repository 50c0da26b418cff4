"""Fields on a hash grid: rendering by hand, the saliency grid, skipping, HollowNeRF as a method."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.harness.tasks import get_task
from zoo.neural3d.fields import HashField, RayBatches, field_job, rays_of
from zoo.neural3d.methods.hollow_nerf import HollowNeRF, hollow, parameters_of
from zoo.neural3d.refine import mean_psnr, scene_job
from zoo.neural3d.shapes import shapes
from zoo.neural3d.views import Views
from zoo.registry import JOBS
from zoo.shared.masks import masks_of
from zoo.shared.train import Recipe

SMALL = {"levels": 3, "log2_size": 8, "coarsest": 4, "finest": 16, "hidden": 8, "samples": 12}


@pytest.fixture(scope="module")
def views() -> Views:
    return shapes(24, 6, 2)


def small(**changes: object) -> HashField:
    return HashField(**{"centre": (0.0, -0.45, 0.0), "half": 1.3, **SMALL}).like(0, **changes).eval()


def test_the_papers_parameters() -> None:
    """11.49 M of Instant-NGP, 56 % and 31 % of it: the title figures of the paper."""
    assert parameters_of(19) == 11_487_072
    assert parameters_of(18, 64) == 6_481_360
    assert parameters_of(17, 64) == 3_597_776


def test_a_ray_is_blended_as_by_hand() -> None:
    field = HashField(half=1.0, background=(0.25, 0.25, 0.25), **{**SMALL, "samples": 2})
    field.eval()
    field.at = lambda points, rays: (  # type: ignore[method-assign]
        torch.tensor([2.0, 4.0]),
        torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]),
    )
    found = field.march(torch.tensor([[-3.0, 0, 0]]), torch.tensor([[1.0, 0, 0]]))
    # The ray is in the cube from 2 to 4: samples at 2.5 and 3.5, each half a side wide.
    first, second = 1 - math.exp(-1.0), math.exp(-1.0) * (1 - math.exp(-2.0))
    rest = 0.25 * (1 - first - second)
    torch.testing.assert_close(found.colour, torch.tensor([[first + rest, second + rest, rest]]))
    torch.testing.assert_close(found.alpha, torch.tensor([first + second]))
    wanted = (first * 2.5 + second * 3.5) / (first + second)
    torch.testing.assert_close(found.depth, torch.tensor([wanted]))
    missed = field._samples(torch.tensor([[-3.0, 5, 0]]), torch.tensor([[1.0, 0, 0]]))
    assert missed[1].tolist() == [[0.0, 0.0]]


def test_saliency_scales_features_and_an_empty_cell_is_empty() -> None:
    field = small(saliency=4)
    point, ray = torch.tensor([[0.1, -0.3, 0.2]]), torch.tensor([[0.0, 0, 1.0]])
    full = field.at(point, ray)[0].detach()
    assert float(full) > 0 and float(field.salient.detach().mean()) == pytest.approx(0.5)
    unit = (point - field.centre) / 2.6 + 0.5
    features, gate = field._features(unit)
    with torch.no_grad():
        field.saliency.fill_(-50.0)
    none, shut = field._features(unit)
    torch.testing.assert_close(gate, (10 * features.norm()).tanh()[None])
    assert (
        not none.abs().gt(1e-15).any() and float(shut.detach()) < 1e-8
    )  # so the density is: tanh of nothing
    with torch.no_grad():
        field.saliency.fill_(1.0)
    x, y, z = (unit * 4).long()[0].tolist()
    keep = torch.zeros(4, 4, 4, dtype=torch.bool)
    keep[z, y, x] = True  # the last axis is x, as in grid_sample
    masks = hollow(field, keep)
    assert bool(field.at(point, ray)[0] > 0) and field.at(-point - 0.9, ray)[0].tolist() == [0.0]
    assert masks["saliency"].kept == 1 and 0 < masks["table"].kept < masks["table"].numel
    assert field.at(point + 100, ray)[0].tolist() == [0.0]  # outside the cube


def test_dropped_entries_are_those_that_no_kept_cell_looks_up() -> None:
    field = small(saliency=8)
    keep = torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.1
    field.harden(keep)
    with torch.no_grad():
        field.saliency[keep] = 3.0
    points = (torch.rand(20000, 3) - 0.5) * 2.6 + field.centre
    rays = torch.tensor([[0.0, 0, 1.0]]).expand_as(points)
    field.zero_grad()
    sum(values.sum() for values in field.at(points, rays)).backward()
    touched = field.table.grad.abs().sum(1) > 0
    reachable = field.reachable()
    assert not (touched & ~reachable).any()
    assert touched.sum() > 0.9 * reachable.sum()  # and next to no entry is kept in vain


def test_a_field_trains_and_skips(views: Views) -> None:
    job = field_job(views.train, views.test, steps=60, batch=64)
    field = small(saliency=8).train()
    before = mean_psnr(field.eval(), views.test)
    job.fit(field, macs=lambda: 0.0).run()
    assert job.score is not None and job.score(field.eval()) > before + 1
    camera = views.test[0].camera
    assert field.operations(camera)[0] == field.operations(camera)[1] or field.hardened is False
    hollow(field, torch.ones(8, 8, 8, dtype=torch.bool).triu())
    dense, live = field.operations(camera)
    assert live < dense
    batches = RayBatches(views.train, 100)
    drawn = list(batches.draw(torch.Generator().manual_seed(0)))
    assert len(drawn) == len(batches) == 6 * 24 * 24 // 100
    assert len({tuple(ray.tolist()) for rays in drawn for ray in rays.directions}) > 3000
    assert torch.equal(rays_of(views.train[0]).colours.reshape(24, 24, 3), views.train[0].image)


def test_hollow_nerf_as_a_method(views: Views) -> None:
    start = small()
    before = start.table.detach().clone()
    recipe = Recipe(**{**HollowNeRF.recipe, "steps": 60})
    job = field_job(views.train, recipe=recipe, batch=64, seed=1)
    method = HollowNeRF(bound=0.02, cells=8, dual_step=10.0, saliency_rate=60.0, start=0.2, trained=0.7)
    made = method.sparsify(start, job)
    field = made.model
    assert torch.equal(start.table, before) and made.arguments["hardened"] and made.arguments["saliency"] == 8
    keep = made.masks["saliency"].keep
    assert 0 < keep.sum() < keep.numel() and torch.equal(field.saliency != 0, keep)
    assert made.masks.lost_zeros(field) == [] and masks_of(field) is not None
    again = HashField(**made.arguments).eval()
    again.load_state_dict(field.state_dict())
    camera = views.test[0].camera
    with torch.no_grad():
        assert torch.equal(again(camera), field(camera))
    same = method.sparsify(start, job).model
    assert torch.equal(same.table, field.table)
    task = get_task("neural3d/shapes")
    flops = task.flops(field)
    assert flops is not None and flops.sparse < flops.dense


def test_what_fields_refuse(views: Views, tmp_path: Path) -> None:
    job = field_job(views.train, batch=64, steps=6)
    with pytest.raises(ConfigError, match="at least 2 cells"):
        small(saliency=1)
    with pytest.raises(ConfigError, match="half > 0"):
        small(half=0.0)
    with pytest.raises(ConfigError, match="no saliency grid"):
        _ = small().salient
    with pytest.raises(ConfigError, match="0 < bound <= 1"):
        HollowNeRF(bound=0.0).sparsify(small(), job)
    with pytest.raises(ConfigError, match="received Linear"):
        HollowNeRF().sparsify(nn.Linear(2, 2), job)
    with pytest.raises(ConfigError, match="rays; the job has ViewBatches"):
        HollowNeRF().sparsify(small(), scene_job(views.train))
    with pytest.raises(ConfigError, match="every cell is empty"):
        field = small(saliency=4)
        with torch.no_grad():
            field.saliency.fill_(-20.0)
        hollow(field)
    with pytest.raises(ConfigError, match="a bool for each cell"):
        small(saliency=4).harden(torch.ones(3, 3, 3, dtype=torch.bool))
    assert isinstance(JOBS.get("neural3d")("shapes-24", model=small()).batches, RayBatches)
