"""Every registered method keeps the contract; the suite sees each way of breaking it; masks never loosen."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest
import torch
from torch import nn

import zoo
from zoo.methods.conformance import ConformanceError, check_method, images_job, plain_network
from zoo.methods.contract import Sparsified, default_recipe, needs_job
from zoo.registry import METHODS
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.pruning.sparsifier import sparsify

#: Options that make a method quick or possible on the small network; by default all are asked for 50 %.
OPTIONS = {
    "sparse-soup": {"members": 2, "phases": 1},
    "lottery-ticket": {"rounds": 1},
    "mask-sparsity": {"sparse_epochs": 1},
    "wgsef": {"sparse_epochs": 1},
    "pgf": {"pattern": "2:4"},
    "sr-ste": {"pattern": "2:4"},
    "bdwp": {"pattern": "2:4"},
    "ofb": {"sparse_epochs": 1},
}
TRACED = ("mask-sparsity", "wgsef", "random-search")  # their networks are traced
GENERAL = [
    name
    for name in METHODS.names()
    if METHODS.get(name).__module__.startswith("zoo.methods.") and name != "sparse-ift"
]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.traced) if n in TRACED else n for n in GENERAL],
)
def test_methods_of_no_domain_keep_the_contract_on_plain_layers(name):
    outcome = check_method(name, **OPTIONS.get(name, {}))
    assert outcome.taken, outcome.refusal


def test_methods_of_a_domain_refuse_a_plain_module_by_name_or_keep_the_contract():
    for name in METHODS.names():
        if name not in GENERAL and "job" in inspect.signature(METHODS.get(name).sparsify).parameters:
            sparsity = 0.5 if "sparsity" in {f.name for f in dataclasses.fields(METHODS.get(name))} else None
            outcome = check_method(name, sparsity=sparsity, **OPTIONS.get(name, {}))
            named = "Sequential" in outcome.refusal or "the job must give" in outcome.refusal
            assert outcome.taken or named, f"{name}: {outcome.refusal}"


def test_the_options_of_every_method_are_fields():
    assert [name for name in METHODS.names() if not dataclasses.is_dataclass(METHODS.get(name))] == []


@dataclasses.dataclass
class Toy:
    """A plug-in, with one way of breaking the contract or none."""

    sparsity: float = 0.9
    fault: str = ""

    def sparsify(self, model: nn.Module, job=None) -> Sparsified:
        wanted = 0.5 if self.fault == "takes anything" and not 0 <= self.sparsity < 1 else self.sparsity
        masks = sparsify(model, sparsity=wanted * (0.8 if self.fault == "misses the target" else 1))
        if self.fault == "unseeded":
            with torch.no_grad():
                model[0].bias.uniform_()
        if self.fault == "loses zeros":
            with torch.no_grad():
                model[0].weight.fill_(1.0)
        if self.fault == "raises":
            raise AttributeError("arguments")
        if self.fault == "returns other masks":
            set_masks(model, MaskSet({}))
        return Sparsified(model, masks)


def test_a_plug_in_is_checked_and_every_fault_is_seen():
    assert check_method(Toy).taken
    for fault, message in {
        "misses the target": "keeps .* at a sparsity of 0.5",
        "takes anything": "impossible sparsity 1.0",
        "unseeded": "two different '0.bias' for one seed",
        "loses zeros": "leaves weights",
        "returns other masks": "other masks than the model carries",
    }.items():
        with pytest.raises(ConformanceError, match=message):
            check_method(Toy, fault=fault)
    with pytest.raises(AttributeError):
        check_method(Toy, fault="raises")


#: The cheap ones, of every kind: at once, held, moving, gated, N:M, shrinking.
PAIRED = [
    "prune",
    "magnitude",
    "random-pruning",
    "dynamic-sparse",
    "lottery-jackpot",
    "bip",
    "sr-ste",
    "iss-p",
]


@pytest.mark.parametrize("first", PAIRED)
def test_masks_never_loosen_whatever_comes_second(first):
    start = run(first, plain_network(0), 0.6)
    for second in PAIRED:
        made = run(second, start.model, 0.3, deep=True)
        after = masks_of(made.model)
        for name, mask in start.masks.items():
            assert not bool((after[name].keep & ~mask.keep).any()), f"{first} then {second} loosens {name}"
        assert not after.lost_zeros(made.model)
        assert made.masks.equal(after), "the card counts the zeros that are there"


@pytest.mark.traced
def test_masks_survive_the_cut_of_channels():
    start = run("magnitude", plain_network(0), 0.6)
    for name in ("mask-sparsity", "wgsef"):
        made = run(name, start.model, 0.3)
        assert made.masks and not made.masks.lost_zeros(made.model)
        assert made.masks.sparsity() > 0.3


def run(name: str, model: nn.Module, sparsity: float, deep: bool = False) -> Sparsified:
    kind = METHODS.get(name)
    options = {"sparsity": sparsity, **OPTIONS.get(name, {})}
    if "pattern" in OPTIONS.get(name, {}):
        del options["sparsity"]
    if deep:
        model = copy.deepcopy(model)
    job = images_job(kind) if needs_job(kind) or default_recipe(kind) else None
    return zoo.sparsify(model, method=name, job=job, **options)
