"""What defines each method, on a tiny net and a few images."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from zoo.errors import ConfigError
from zoo.shared.errors import BudgetError, MaskError, PatternError
from zoo.shared.learned.constraints import DecayingSTE
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.masks.patterns import NM
from zoo.shared.pruning.inventory import pointwise_weights
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.averaging import average_models
from zoo.vision.base import clone, inner_weights
from zoo.vision.bip import BiP
from zoo.vision.channels import WGSEF, MaskSparsity, norm_scales
from zoo.vision.fast_convnets import FastConvNet
from zoo.vision.jackpots import LotteryJackpot, magnitude_masks
from zoo.vision.magnitude import MagnitudePruning
from zoo.vision.mobilenet import MobileNetV1
from zoo.vision.models import ConvNet, ResNet, ViT, reinitialised
from zoo.vision.nm_training import BDWP, ProgressiveFlow, frame_patterns
from zoo.vision.random_pruning import DynamicSparse, RandomPruning, layer_counts
from zoo.vision.soups import SparseSoup
from zoo.vision.sparse_ift import SparseIFT, forward_macs
from zoo.vision.tickets import LotteryTicket
from zoo.vision.train import accuracy

UNSTRUCTURED = (
    MagnitudePruning(0.8),
    MagnitudePruning(0.8, allocation="uniform", gradual=True),
    MagnitudePruning(0.8, allocation="lamp"),
    MagnitudePruning(0.8, score="random"),
    RandomPruning(0.8, ratio="uniform+"),
    RandomPruning(0.8, ratio="snip"),
    RandomPruning(0.8, ratio="grasp"),
    DynamicSparse(0.8, growth="rigl", every=1),
    DynamicSparse(0.8, growth="set", every=1),
    LotteryTicket(0.8, epochs=2, rounds=2),
    LotteryJackpot(0.8),
    BiP(0.8),
    SparseSoup(0.8, members=2, epochs=2),
)


@pytest.mark.parametrize("method", UNSTRUCTURED, ids=lambda m: f"{type(m).__name__}")
def test_unstructured_methods_reach_the_exact_count_and_keep_every_zero(method, net, trainer):
    before = copy.deepcopy(net.state_dict())
    made = method.prune(clone(net), trainer).model
    masks = masks_of(made)
    numel = sum(mask.numel for mask in masks.values())
    assert sum(mask.kept for mask in masks.values()) == numel - int(0.8 * numel)
    assert not masks.zeros_intact(made)
    assert trainer.cost.flops > 0 and trainer.cost.seconds > 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_equal_seeds_give_equal_models(net, images, trainer):
    first, second = (
        BiP(0.8).prune(clone(net), type(trainer)(images, trainer.recipe, seed=3)).model for _ in range(2)
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_the_minimum_threshold_keeps_every_layer_alive(net, trainer):
    with torch.no_grad():
        net.features[3].weight.mul_(1e-3)  # a layer that one global threshold empties
    bare = MagnitudePruning(0.9).prune(clone(net), trainer).model
    floored = MagnitudePruning(0.9, floor=0.01).prune(clone(net), trainer).model
    total = sum(mask.numel for mask in masks_of(bare).values())
    assert masks_of(bare)["features.3.weight"].kept == 0
    assert all(m.kept >= min(m.numel, int(0.01 * total)) for m in masks_of(floored).values())
    assert masks_of(floored).sparsity() == masks_of(bare).sparsity()
    with pytest.raises(BudgetError, match="floors need"):
        MagnitudePruning(0.99, floor=0.2).prune(clone(net), trainer)


def test_random_ratios_differ_as_they_should(net, trainer):
    counts = {r: layer_counts(net, trainer, r, 0.7) for r in ("uniform", "uniform+", "er", "erk", "erk+")}
    sizes = {name: p.numel() for name, p in net.named_parameters() if name in counts["erk"]}
    first, last = list(sizes)[0], list(sizes)[-1]
    assert len({sum(c.values()) for c in counts.values()}) == 1
    assert counts["uniform+"][first] == sizes[first] and counts["erk+"][last] == sizes[last]
    density = {n: counts["erk"][n] / sizes[n] for n in sizes}
    assert density[first] > density["features.6.weight"]
    fresh = reinitialised(net, 0)
    made = RandomPruning(0.7).prune(clone(net), trainer).model
    again = RandomPruning(0.7).prune(clone(net), trainer).model
    assert masks_of(made).equal(masks_of(again))
    assert not torch.equal(made.linear.weight, fresh.linear.weight)


def test_moving_masks_move_and_held_ones_do_not(net, trainer):
    static = DynamicSparse(0.8, every=1, fraction=0.0).prune(clone(net), trainer).model
    for growth in ("set", "rigl"):
        moving = DynamicSparse(0.8, growth=growth, every=1).prune(clone(net), trainer).model
        assert masks_of(moving).iou(masks_of(static)) < 1
        kept = {n: m.kept for n, m in masks_of(static).items()}
        assert {n: m.kept for n, m in masks_of(moving).items()} == kept


def test_a_ticket_goes_back_to_the_early_weights(net, images, trainer):
    method = LotteryTicket(0.5, epochs=2, rounds=1, rewind=0)
    quick = type(trainer)(images, trainer.recipe.__class__(epochs=2, lr=0.0, batch=16, weight_decay=0.0))
    made = method.prune(clone(net), quick).model
    fresh = reinitialised(net, 0)  # with no learning at all, what is kept are the initial weights
    for name, mask in masks_of(made).items():
        assert torch.equal(made.get_parameter(name), fresh.get_parameter(name) * mask.keep)
    with pytest.raises(ConfigError, match="rewind"):
        LotteryTicket(0.5, epochs=2, rewind=2).prune(clone(net), trainer)


def test_a_jackpot_never_touches_a_weight(net, trainer):
    found = LotteryJackpot(0.8, lr=1.0).prune(clone(net), trainer).model
    masks, start = masks_of(found), magnitude_masks(net, 0.8)
    for name, parameter in net.named_parameters():
        own = found.get_parameter(name)
        expected = parameter * masks[name].keep if name in masks else parameter
        assert torch.equal(own, expected)
    assert {n: m.kept for n, m in masks.items()} == {n: m.kept for n, m in start.items()}
    assert masks.iou(start) < 1


def test_bip_follows_its_gradient(net, images, trainer):
    """One upper step by hand: s - lr (w - m g / gamma) g, with g the dense gradient on the second batch."""
    from zoo.vision.bip import endless
    from zoo.vision.train import cross_entropy

    recipe = trainer.recipe.__class__(epochs=1, lr=0.0, batch=32, weight_decay=0.0)
    one = type(trainer)(images, recipe, seed=0)
    method = BiP(0.8, epochs=1, mask_lr=0.5, implicit=0.3, weight_decay=0.0)
    found = method.prune(clone(net), one).model
    masks = magnitude_masks(net, 0.8)
    by_hand = clone(net).train()
    leaves = {n: (by_hand.get_parameter(n) * m.keep).detach().requires_grad_() for n, m in masks.items()}
    first = next(iter(trainer.fit(net, batch=32).batches.draw(torch.Generator().manual_seed(0))))
    for batch in (first, next(endless(one))):  # the first moves the norms' statistics only
        loss = cross_entropy_of(by_hand, leaves, batch)
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    scores = {
        n: w.abs() - 0.5 * (w - 0.3 * masks[n].keep * grads[n]) * grads[n]
        for n, w in ((n, net.get_parameter(n).detach()) for n in masks)
    }
    from zoo.shared.masks.patterns import Unstructured
    from zoo.shared.pruning.budgets import Global
    from zoo.shared.pruning.choose import choose_masks

    expected = choose_masks(scores, 0.8, dict.fromkeys(scores, Unstructured()), Global())
    assert masks_of(found).iou(expected) > 0.99 and callable(cross_entropy)


def cross_entropy_of(model, weights, batch):
    logits = torch.func.functional_call(model, weights, (batch[0],))
    return torch.nn.functional.cross_entropy(logits, batch[1])


def test_a_soup_is_the_average_of_members_with_one_mask(net, trainer):
    method = SparseSoup(0.8, members=2, epochs=2, phases=1, recalibrate=False)
    sparsify(net, sparsity=0.8)
    members = method.retrained(net, trainer, 1)
    soup = method.average(members, trainer)
    assert not torch.equal(members[0].linear.weight, members[1].linear.weight)
    torch.testing.assert_close(soup.linear.weight, (members[0].linear.weight + members[1].linear.weight) / 2)
    assert masks_of(soup).equal(masks_of(net)) and not masks_of(soup).zeros_intact(soup)
    greedy = SparseSoup(0.8, soup="greedy").average(members, trainer)
    best = max(accuracy(member, trainer.data, trainer.data.val) for member in members)
    assert accuracy(greedy, trainer.data, trainer.data.val) >= best
    assert isinstance(average_models(members), ConvNet)


@pytest.mark.parametrize("flow", ["ste", "sr-ste", "decay-linear", "decay-exp", "stepwise"])
def test_nm_training_ends_in_the_pattern(flow, net, trainer):
    method = ProgressiveFlow(pattern="2:8", flow=flow, epochs=2)
    made = method.prune(clone(net), trainer).model
    masks = masks_of(made)
    assert method.sparsity == 0.75 and list(masks) == inner_weights(net)
    assert {str(m.pattern) for m in masks.values()} == {str(NM(2, 8, 1))} and masks.sparsity() == 0.75
    assert not masks.zeros_intact(made) and not any("parametrizations" in n for n in made.state_dict())


def test_the_flow_fades_to_zero_and_the_pattern_tightens(net, trainer):
    assert frame_patterns(NM(1, 16), "stepwise") == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    assert frame_patterns(NM(2, 4), "geometric") == [(16, 32), (8, 16), (4, 8), (2, 4)]
    gated = torch.nn.Linear(16, 4)
    gate = DecayingSTE(NM(2, 8, 1))
    torch.nn.utils.parametrize.register_parametrization(gated, "weight", gate)
    for flow in ("decay-linear", "decay-exp"):
        method, betas = ProgressiveFlow(pattern="2:8", flow=flow, decay_share=0.5), []
        for step in range(0, 21):
            method._progress(gated, [gate], step, 20)
            betas.append(gate.beta)
        assert betas[0] == 1 and betas[10:] == [0.0] * 11
        assert all(a > b for a, b in zip(betas[:10], betas[1:11], strict=True))


def test_nm_training_suits_transformers_and_refuses_shapes(trainer):
    vit = reinitialised(ViT(dim=16, hidden=32, depth=1, heads=2, classes=4), 0)
    names = ("blocks.*.fc?.weight",)
    for method in (ProgressiveFlow(pattern="2:8", names=names), BDWP(pattern="2:8", names=names)):
        masks = masks_of(method.prune(clone(vit), trainer).model)
        assert len(masks) == 2 and masks.sparsity() == 0.75
    odd = reinitialised(ConvNet((6, 10, 10), (1, 2, 1), classes=4), 0)
    with pytest.raises(PatternError, match="features.3.weight"):
        ProgressiveFlow(pattern="2:8").prune(clone(odd), trainer)
    with pytest.raises(PatternError, match="multiple"):
        BDWP(pattern="2:8").prune(clone(odd), trainer)
    with pytest.raises(BudgetError, match="fixes the sparsity"):
        ProgressiveFlow(pattern="2:8", sparsity=0.5)
    with pytest.raises(ConfigError, match="n:m"):
        BDWP(pattern="block4x1")


def test_bdwp_costs_two_thirds_of_forward_only(net, images, trainer):
    costs = []
    for method in (ProgressiveFlow(pattern="2:8", flow="sr-ste"), BDWP(pattern="2:8")):
        own = type(trainer)(images, trainer.recipe)
        fit = own.fit(net)
        costs.append(method.macs(net, own, inner_weights(net), 1 if len(costs) == 0 else 2))
        dense = method.macs(net, own, inner_weights(net), 0)
        inner = sum(p.numel() for n, p in net.named_parameters() if n in inner_weights(net))
        assert inner and fit.steps > 0
    saved = [dense - cost for cost in costs]
    assert saved[1] == pytest.approx(2 * saved[0])  # 2:8 saves a quarter of a step per sparse product


def test_sparse_ift_is_wider_at_no_more_operations(trainer):
    small = reinitialised(ConvNet((8, 16, 16), (1, 2, 1), classes=4), 0)
    example = trainer.fit(small).batches.example()
    for growth in ("rigl", "static"):
        wide = SparseIFT(0.75, growth=growth).prune(clone(small), trainer).model
        assert wide.arguments["widths"] == [16, 32, 32]
        ratio = forward_macs(wide, example) / forward_macs(small, example)
        assert 0.97 < ratio <= 1.0
        assert list(masks_of(wide)) == inner_weights(wide) and masks_of(wide).sparsity() > 0.75


@pytest.mark.traced
@pytest.mark.parametrize("shortcut", ["pad", "conv"])
@pytest.mark.parametrize("kind", [MaskSparsity, WGSEF])
def test_channels_are_really_removed_with_their_moments(kind, shortcut, trainer):
    method = kind(0.5, epochs=2, sparse_epochs=1)
    model = reinitialised(ResNet(8, 8, classes=4, channels=1, shortcut=shortcut), 0)
    trained = clone(model)
    fit, keep = method.cut(trained, trainer)
    assert sum(p.numel() for p in trained.parameters()) < sum(p.numel() for p in model.parameters())
    total, kept = (sum(f(units) for units in keep.values()) for f in (len, lambda u: int(u.sum())))
    assert kept == total - total // 2
    own = {id(p) for p in trained.parameters()}
    for group in fit.optimizer.param_groups:
        assert {id(p) for p in group["params"]} == own
    for parameter, state in fit.optimizer.state.items():
        assert state.get("momentum_buffer") is None or state["momentum_buffer"].shape == parameter.shape
    fit.run()
    again = type(trained)(**trained.current_arguments())
    again.load_state_dict(trained.state_dict())


@pytest.mark.traced
def test_the_penalty_spares_the_scales_that_stay(net, images):
    from zoo.vision.train import Recipe, Trainer

    means = {}
    for which in ("marked", "all"):
        method = MaskSparsity(0.5, epochs=4, sparse_epochs=3, penalty=0.3, regularise=which)
        made = clone(net)
        method.cut(made, Trainer(images, Recipe(4, 0.05, 16, 0.0), 0))
        means[which] = torch.cat([s.detach().abs() for s in norm_scales(made).values()]).mean()
    assert means["marked"] > means["all"] + 0.05


@pytest.mark.traced
def test_too_large_an_envelope_penalty_is_refused(net, trainer):
    hot = replace(trainer, recipe=replace(trainer.recipe, lr=0.5))
    with pytest.raises(ConfigError, match="kills the network"):
        WGSEF(0.5, epochs=2, sparse_epochs=1, penalty=1e6).prune(clone(net), hot)


def test_fast_convnets_prune_pointwise_weights_only(images, trainer, net):
    model = reinitialised(MobileNetV1(0.25, classes=4, channels=1, stem_stride=1), 0)
    made = FastConvNet(0.8, pattern="block4x1", epochs=1).prune(clone(model), trainer).model
    masks = masks_of(made)
    assert list(masks) == pointwise_weights(model) and len(masks) == 13
    blocks = masks["features.3.weight"] if "features.3.weight" in masks else next(iter(masks.values()))
    grouped = blocks.keep.flatten(1).unflatten(0, (-1, 4))
    assert bool((grouped.any(1) == grouped.all(1)).all())
    assert isinstance(masks, MaskSet)
    with pytest.raises(ConfigError, match="no 1x1"):
        FastConvNet(0.8).prune(clone(net), trainer)


def test_training_without_masks_is_refused(net, trainer):
    with pytest.raises(MaskError, match="no masks"):
        trainer.fit_masked(net)
