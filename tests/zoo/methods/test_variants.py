"""The options of the methods that change what is kept: allocations, ratios, growth, flows, penalties."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.methods.bdwp import BDWP
from zoo.methods.channels import norm_scales
from zoo.methods.dynamic_sparse import DynamicSparse
from zoo.methods.magnitude import MagnitudePruning
from zoo.methods.mask_sparsity import MaskSparsity
from zoo.methods.pgf import ProgressiveFlow
from zoo.methods.random_pruning import RandomPruning
from zoo.methods.sr_ste import SparseRefined
from zoo.methods.tickets import LotteryTicket
from zoo.methods.wgsef import WGSEF
from zoo.shared.errors import BudgetError, MaskError, PatternError
from zoo.shared.masks.patterns import NM
from zoo.shared.pruning.inventory import inner_weights
from zoo.shared.structure.relatives import copied, reinitialised

EXACT = (
    MagnitudePruning(0.8, allocation="uniform", gradual=True),
    MagnitudePruning(0.8, allocation="lamp"),
    MagnitudePruning(0.8, score="random"),
    RandomPruning(0.8, ratio="uniform+"),
    RandomPruning(0.8, ratio="snip"),
    RandomPruning(0.8, ratio="grasp"),
    DynamicSparse(0.8, growth="rigl", every=1),
    DynamicSparse(0.8, growth="set", every=1),
    LotteryTicket(0.8, rounds=2),
)


@pytest.mark.parametrize("method", EXACT, ids=lambda method: type(method).__name__)
def test_the_exact_count_is_reached_and_every_zero_kept(method, net, job):
    before = copy.deepcopy(net.state_dict())
    made = method.sparsify(net, job)
    numel = sum(mask.numel for mask in made.masks.values())
    assert sum(mask.kept for mask in made.masks.values()) == numel - int(0.8 * numel)
    assert not made.masks.lost_zeros(made.model)
    assert job.cost.flops > 0 and job.cost.seconds > 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_floors_that_do_not_fit_are_refused(net, job):
    with pytest.raises(BudgetError, match="floors need"):
        MagnitudePruning(0.99, floor=0.2).sparsify(net, job)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_sparsities_out_of_range_are_refused(sparsity, net, job):
    with pytest.raises(BudgetError, match="lie in"):
        MagnitudePruning(sparsity).sparsify(net, job)


def test_weights_that_are_not_finite_are_refused(net, job):
    with torch.no_grad():
        net[11].weight[0, 0] = torch.nan
    with pytest.raises(MaskError, match="11.weight"):
        MagnitudePruning().sparsify(net, job)


def test_random_ratios_differ_as_they_should(net, job):
    counts = {r: RandomPruning(0.7, r).counts(net, job) for r in ("uniform", "uniform+", "er", "erk", "erk+")}
    sizes = {name: p.numel() for name, p in net.named_parameters() if name in counts["erk"]}
    first, last = list(sizes)[0], list(sizes)[-1]
    assert len({sum(c.values()) for c in counts.values()}) == 1
    assert counts["uniform+"][first] == sizes[first] and counts["erk+"][last] == sizes[last]
    assert counts["erk"][first] / sizes[first] > counts["erk"]["3.weight"] / sizes["3.weight"]
    made, again = (RandomPruning(0.7).sparsify(net, job) for _ in range(2))
    assert made.masks.equal(again.masks)
    assert not torch.equal(made.model[11].weight, reinitialised(net, 0)[11].weight)


def test_moving_masks_move_and_held_ones_do_not(net, job):
    static = DynamicSparse(0.8, every=1, fraction=0.0).sparsify(net, job).masks
    for growth in ("set", "rigl"):
        moved = DynamicSparse(0.8, growth=growth, every=1).sparsify(net, job).masks
        assert moved.iou(static) < 1
        assert {n: m.kept for n, m in moved.items()} == {n: m.kept for n, m in static.items()}


@pytest.mark.parametrize(
    "method",
    [SparseRefined(decay=0.0), *(ProgressiveFlow(flow=f) for f in ("decay-linear", "stepwise"))],
    ids=["ste", "decay-linear", "stepwise"],
)
def test_nm_training_ends_in_the_pattern(method, net, job):
    made = method.sparsify(net, job)
    assert method.sparsity == 0.75 and list(made.masks) == inner_weights(net)
    assert {str(m.pattern) for m in made.masks.values()} == {str(NM(2, 8, 1))}
    assert made.masks.sparsity() == 0.75 and not made.masks.lost_zeros(made.model)
    assert not any("parametrizations" in name for name in made.model.state_dict())


def test_patterns_that_do_not_fit_are_refused(job):
    odd = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 10, 3), nn.Conv2d(10, 10, 3), nn.Flatten())
    odd.append(nn.Linear(40, 4))
    for kind in (ProgressiveFlow, BDWP):
        with pytest.raises(PatternError, match="'1.weight'.*multiple"):
            kind(pattern="2:8").sparsify(odd, job)
    with pytest.raises(BudgetError, match="fixes the sparsity"):
        ProgressiveFlow(pattern="2:8", sparsity=0.5)
    with pytest.raises(ConfigError, match="n:m"):
        BDWP(pattern="block4x1")


def test_bdwp_saves_two_products_where_sr_ste_saves_one(net, job):
    names = inner_weights(net)
    dense = 3 * (SparseRefined(pattern="8:8").macs(net, job, names) / 3)
    saved = [dense - kind(pattern="2:8").macs(net, job, names) for kind in (SparseRefined, BDWP)]
    inner = saved[0] / 0.75  # of the forward products of the inner layers three quarters are gone
    assert 0 < inner < dense / 3 and saved[1] == pytest.approx(2 * saved[0])


@pytest.mark.traced
def test_the_penalty_spares_the_scales_that_stay(net, job):
    own = job.replace(recipe=job.recipe.__class__(epochs=4, lr=0.05, batch=16, weight_decay=0.0))
    means = {}
    for which in ("marked", "all"):
        made = copied(net)
        fit, _ = MaskSparsity(0.5, sparse_epochs=3, penalty=0.3, regularise=which).cut(made, own)
        assert fit.penalty is None  # what is left is trained without it
        means[which] = torch.cat([s.detach().abs() for s in norm_scales(made).values()]).mean()
    assert means["marked"] > means["all"] + 0.05


@pytest.mark.traced
def test_the_envelope_takes_the_rate_of_the_step_before_it(net, job_of, monkeypatch):
    job, steps = job_of(epochs=2, lr=0.5), []
    module = importlib.import_module("zoo.methods.wgsef")
    monkeypatch.setattr(
        module, "envelope_factors", lambda x, weights, kept, step: steps.append(step) or torch.ones_like(x)
    )
    WGSEF(0.5, sparse_epochs=1, penalty=0.1).sparsify(net, job)
    assert steps == pytest.approx([0.1 * job.recipe.learning_rate(step, 6) for step in range(3)])


@pytest.mark.traced
def test_too_large_an_envelope_penalty_is_refused(net, job_of):
    with pytest.raises(ConfigError, match="kills the network"):
        WGSEF(0.5, sparse_epochs=1, penalty=1e6).sparsify(net, job_of(epochs=2, lr=0.5))
