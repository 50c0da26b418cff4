"""Nested levels: masks inside masks, weights that all levels train, bundles that serve each of them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import zoo
from zoo.bundles.cardfile import dump_yaml, read_yaml
from zoo.bundles.catalog import find
from zoo.bundles.levels import level_model
from zoo.bundles.store import info, load, save
from zoo.cli import main
from zoo.errors import BundleError, CardError, ConfigError, UnknownNameError
from zoo.methods.conformance import images_job, plain_network
from zoo.methods.nested import Inside, Nested, _Joint
from zoo.registry import ARCHITECTURES
from zoo.shared.errors import MaskError
from zoo.shared.masks import Mask, MaskSet, masks_of
from zoo.shared.masks.nested import at_level, count_levels, to_extras
from zoo.shared.store.formats import load_packed
from zoo.shared.train import Job


def masks(*bits: int) -> MaskSet:
    return MaskSet({"w": Mask(torch.tensor(bits, dtype=torch.bool))})


def test_bits_are_kept_over_the_survivors_and_levels_unfold_by_hand():
    levels = [masks(1, 0, 1, 1), masks(1, 0, 0, 1), masks(0, 0, 0, 1)]
    extras = to_extras(levels[0], levels[1:], [{}, {"mean": torch.tensor([9.0])}])
    assert extras["levels/1/keep/w"].tolist() == [True, False, True]
    assert extras["levels/2/keep/w"].tolist() == [False, True] and count_levels(extras) == 2
    state = {"w": torch.tensor([5.0, 0.0, 6.0, 7.0]), "mean": torch.tensor([1.0])}
    for number, weights in enumerate(([5.0, 0, 6, 7], [5.0, 0, 0, 7], [0.0, 0, 0, 7])):
        tensors, found = at_level(state, levels[0], extras, number)
        assert tensors["w"].tolist() == weights and found.equal(levels[number])
        assert tensors["mean"].item() == (9.0 if number == 2 else 1.0)
    tied = {"w": state["w"], "again": state["w"]}
    assert at_level(tied, levels[0], extras, 1)[0]["again"].tolist() == [5.0, 0, 0, 7]


def test_levels_that_are_not_nested_are_refused():
    outer, inner = masks(1, 0, 1, 1), masks(1, 1, 0, 0)
    with pytest.raises(MaskError, match="level 1 keeps entries of 'w' that the level before drops"):
        to_extras(outer, [inner], [{}])
    with pytest.raises(MaskError, match="masks other tensors"):
        to_extras(outer, [MaskSet({})], [{}])
    with pytest.raises(MaskError, match="replaces a masked one"):
        to_extras(outer, [masks(1, 0, 0, 0)], [{"w": torch.ones(4)}])
    extras = to_extras(outer, [masks(1, 0, 0, 0)], [{}])
    state = {"w": torch.ones(4)}
    with pytest.raises(MaskError, match="asked for 2"):
        at_level(state, outer, extras, 2)
    with pytest.raises(MaskError, match="do not fit the level before"):
        at_level(state, masks(1, 1, 1, 1), extras, 1)
    with pytest.raises(MaskError, match="no place for"):
        at_level(state, outer, extras | {"levels/1/own/x": torch.ones(1)}, 1)


def test_each_level_trains_what_it_keeps():
    model = nn.Linear(3, 1, bias=False)
    inside = Inside(model, MaskSet({"weight": Mask(torch.tensor([[True, False, True]]))}))
    x = torch.tensor([[1.0, 2.0, 4.0]])
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, 1.0]]))
    assert inside(x).item() == 5.0 and model(x).item() == 7.0
    (inside(x) + model(x)).sum().backward()
    assert model.weight.grad.tolist() == [[2.0, 2.0, 8.0]], (
        "the dropped one learns from the outer level alone"
    )


def test_the_loss_is_the_mean_over_the_levels():
    """7 with all three weights, 5 without the second, 1 with the first alone."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    further = [
        MaskSet({"weight": Mask(torch.tensor([bits]))})
        for bits in ([True, False, True], [True, False, False])
    ]
    job = Job([torch.zeros(1, 3)], lambda trained, batch: trained(batch).sum())
    assert _Joint(job, further)(model, torch.tensor([[1.0, 2.0, 4.0]])).item() == pytest.approx(13 / 3)


@pytest.fixture(scope="module")
def made():
    method = Nested(sparsity=0.5, further=(0.75, 0.9))
    return method.sparsify(plain_network(0), images_job(method))


def test_a_level_is_cut_inside_the_last_one_by_hand():
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2, 9, 8]]))
    levels = [
        MaskSet({"weight": Mask(torch.tensor([bits], dtype=torch.bool))}) for bits in ([1] * 4, [1, 1, 0, 0])
    ]
    assert Nested()._cut(model, 0.75, levels)["weight"].keep.tolist() == [[False, True, False, False]]


def test_a_loss_may_ask_the_model_behind_the_masks():
    model = nn.Sequential(nn.Linear(2, 2))
    model.config = {"kind": "toy"}
    inside = Inside(model, MaskSet({"0.weight": torch.eye(2, dtype=torch.bool)}))
    assert inside.config == {"kind": "toy"} and inside.training is model.training
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        inside.missing()
    expected = torch.diag(model[0].weight.diag()) + model[0].bias[:, None]
    torch.testing.assert_close(inside(torch.eye(2)).T, expected)


def test_the_method_makes_nested_levels_of_exact_sparsity(made):
    levels = [level_model(made.model, made.extras, number) for number in range(3)]
    for model, share in zip(levels, (0.5, 0.75, 0.9), strict=True):
        assert masks_of(model).sparsity() == pytest.approx(share, abs=2e-3)
        assert masks_of(model).lost_zeros(model) == []
    for outer, inner in itertools.pairwise(levels):
        before = masks_of(outer)
        assert all(not (mask.keep & ~before[name].keep).any() for name, mask in masks_of(inner).items())
        weights = dict(outer.named_parameters())
        for name, mask in masks_of(inner).items():
            assert torch.equal(dict(inner.named_parameters())[name], weights[name] * mask.keep)
    assert not torch.equal(levels[0][1].running_mean, levels[2][1].running_mean), "statistics of its own"


@pytest.mark.parametrize("further", [(), (0.5,), (0.9, 0.8)])
def test_levels_that_do_not_rise_are_refused(further):
    method = Nested(sparsity=0.5, further=further)
    with pytest.raises(ConfigError, match="nested levels rise"):
        method.sparsify(plain_network(0), images_job(method))


@pytest.fixture
def bundle(made, card_of, monkeypatch, tmp_path):
    """The folder of a nested bundle whose figures were not measured."""
    monkeypatch.setitem(ARCHITECTURES._entries, "test/plain", lambda: plain_network(0))
    fields = card_of("vision/plain", {"name": "test/plain", "args": {}}, "vision/digits", "accuracy")
    dense = {"name": "vision/dense-plain", "value": 1.0, "per_seed": {0: 1.0}, "mean": 1.0, "spread": None}
    metrics = [fields["metrics"][0] | {"dense": dense}]
    fields |= {"method": {"name": "nested", "seed": 0}, "dense_twin": dense["name"], "metrics": metrics}
    figures = [[metrics[0] | {"value": value, "per_seed": {0: value}, "mean": value}] for value in (0.9, 0.8)]
    levels = [{"metrics": one, "cost": copy.deepcopy(fields["cost"])} for one in figures]
    return save(made.model, tmp_path / "plain", card=fields | {"levels": levels}, extras=made.extras)


def test_one_bundle_serves_every_level(bundle, made, capsys, tmp_path):
    card = find(bundle).card
    for number, share in enumerate((0.5, 0.75, 0.9)):
        model, expected = load(bundle, sparsity=share), level_model(made.model, made.extras, number)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.state_dict().items())
        assert masks_of(model).equal(masks_of(expected))
        own = info(model).card
        assert own.sparsity.overall == pytest.approx(share, abs=2e-3) and own.levels == []
        assert own.metrics[0].value == (1.0, 0.9, 0.8)[number]
        packed = load(f"{bundle}#{share}", execution="packed")
        x = torch.randn(2, 3, 8, 8)
        assert torch.allclose(packed(x), model(x), atol=1e-3)  # norms of hardly any variance
    assert masks_of(load(bundle)).equal(made.masks), "the least sparse level by default"
    with pytest.raises(UnknownNameError, match=r"no level of sparsity 0.6; it has 0.5, 0.75, 0.9"):
        load(bundle, sparsity=0.6)
    assert main(["show", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "vision/plain#0.75" in shown and "Levels" in shown
    assert main(["show", f"{bundle}#0.9"]) == 0 and "Levels" not in capsys.readouterr().out
    assert main(["export", f"{bundle}#0.9", "--to", str(tmp_path / "x.safetensors")]) == 0
    kept = sum(level.cost.parameters.kept for level in card.levels)
    assert kept < card.cost.parameters.kept * 1.5
    bits = [t for n, t in load_packed(bundle / "weights.safetensors").extras.items() if "/keep/" in n]
    survivors = sum(mask.kept for mask in made.masks.values())
    assert sum(t.numel() for t in bits) < 1.6 * survivors


def test_a_rebased_bundle_keeps_its_levels_and_a_changed_one_loses_them(bundle, tmp_path):
    assert main(["rebase", str(bundle), "--whole", "--out", str(tmp_path / "again")]) == 0
    assert masks_of(load(tmp_path / "again", sparsity=0.9)).sparsity() == pytest.approx(0.9, abs=2e-3)
    model = load(bundle)
    fields = find(bundle).card.at(0).to_dict()
    zoo.save(model, tmp_path / "flat", card=fields)
    assert count_levels(load_packed(tmp_path / "flat" / "weights.safetensors").extras) == 0


def test_cards_and_weights_that_disagree_about_levels_are_refused(bundle):
    card = bundle / "card.yaml"
    fields = read_yaml(card)
    card.write_text(dump_yaml(fields | {"levels": []}))
    with pytest.raises(BundleError, match="the weights hold 2 further levels, the card 0"):
        load(bundle)
    card.write_text(dump_yaml(fields | {"levels": fields["levels"][::-1]}))
    with pytest.raises(CardError, match="levels must become sparser"):
        load(bundle)
