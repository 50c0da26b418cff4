"""The matrix of methods and transformers families: the exact share and pattern, or one clear line."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

from zoo.errors import ConfigError
from zoo.llm.families import FAMILIES, GATED, MIXTURES, OTHERS, family, token_ids
from zoo.llm.matrix import said
from zoo.llm.models import serving
from zoo.llm.models.serving import pack_model
from zoo.llm.models.thresholds import thresholds_of
from zoo.registry import METHODS
from zoo.shared.errors import SparseError, StructureError
from zoo.shared.masks import masks_of
from zoo.shared.ops import SparseLinear
from zoo.shared.pruning.inventory import inventory
from zoo.shared.train import Job

JOB = Job(token_ids(1))
WEIGHT_METHODS = {
    "wanda": {"sparsity": 0.7},
    "wanda-2:4": {"pattern": "2:4"},
    "sparsegpt": {"sparsity": 0.7},
    "sparsegpt-2:4": {"pattern": "2:4"},
}
GATED_METHODS = {
    "cats": {"chunk": 1},
    "chess": {"chunk": 1},
    "teal": {"budget": "uniform"},
    "cfsp": {"ratio": 0.5, "coarse": "uniform"},
}
IDS = token_ids(1, seed=7)[0]


@pytest.fixture(autouse=True)
def _small_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SMALL", 0)


def run(kind, method, options):
    return METHODS.get(method.partition("-")[0])(windows=2, **options).sparsify(family(kind), JOB)


def logits(model):
    ids = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **ids).logits


def generated(model):
    return model.generate(IDS[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


def wanted_weights(model):
    """Matrices of the blocks that the inventory reaches, without convolutions, and their input axes."""
    weights = [weight for weight in inventory(model).reached if weight.kind != "convolution"]
    return {weight.name: weight.axis for weight in weights}


@pytest.mark.usefixtures("packs_all")
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "t5"])
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_weights_are_pruned_to_the_exact_share_and_pattern(kind, method, tmp_path):
    made = run(kind, method, WEIGHT_METHODS[method])
    axes = wanted_weights(made.model)
    assert set(made.masks) == set(axes) and masks_of(made.model).lost_zeros(made.model) == []
    for name, mask in made.masks.items():
        if method.endswith("2:4"):
            groups = mask.keep.movedim(axes[name], -1).unflatten(-1, (-1, 4)).sum(-1)
            assert bool((groups == 2).all()), name
        else:
            assert mask.kept == mask.numel - int(0.7 * mask.numel), name
    if method != "wanda":
        return
    masked, text = logits(made.model), generated(made.model)
    made.model.save_pretrained(tmp_path)
    again = type(made.model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), masked) and torch.equal(generated(again), text)
    assert made.masks.lost_zeros(again) == []
    packed = pack_model(copy.deepcopy(made.model))
    assert sum(isinstance(module, SparseLinear) for module in packed.modules()) >= 2
    torch.testing.assert_close(logits(packed), masked, rtol=1e-3, atol=1e-3)
    if kind not in MIXTURES:  # sums in another order may choose another expert
        assert torch.equal(generated(packed), text)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "t5"])
def test_ecoflap_shares_an_exact_total_over_the_blocks(kind):
    made = run(kind, "ecoflap", {"sparsity": 0.6})
    total = sum(mask.numel for mask in made.masks.values())
    assert set(made.masks) == set(wanted_weights(made.model))
    assert sum(mask.kept for mask in made.masks.values()) == total - int(0.6 * total)


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("method", GATED_METHODS)
def test_methods_of_gated_ffns_take_every_family_that_has_one(kind, method, tmp_path):
    dense = logits(family(kind))
    made = run(kind, method, GATED_METHODS[method])
    assert not torch.equal(logits(made.model), dense)
    if method == "cfsp":
        assert made.parts["ffn channels"]["kept"] * 2 == made.parts["ffn channels"]["total"]
        made.model.save_pretrained(tmp_path)
        again = type(made.model).from_pretrained(tmp_path).eval()
        assert torch.equal(logits(again), logits(made.model))
    else:
        assert len(thresholds_of(made.model)) >= 2
        text = generated(made.model)
        packed = pack_model(copy.deepcopy(made.model))
        torch.testing.assert_close(logits(packed), logits(made.model), rtol=1e-2, atol=1e-2)
        assert torch.equal(generated(packed), text)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in GATED])
@pytest.mark.parametrize("method", GATED_METHODS)
def test_other_families_are_refused_in_one_line(kind, method):
    with pytest.raises(ConfigError, match=r"The FFN of \w+ .*gated FFN") as refusal:
        run(kind, method, GATED_METHODS[method])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", FAMILIES)
def test_gqsa_codes_plain_linear_layers_or_says_what_stands_in_the_way(kind):
    options = {"block_epochs": 0, "model_epochs": 0}
    if kind in MIXTURES or kind in OTHERS or kind == "gpt2":
        with pytest.raises(SparseError, match="plain linear layers|do not fit|cannot be walked") as refusal:
            run(kind, "gqsa", options)
        assert "\n" not in str(refusal.value)
        return
    made = run(kind, "gqsa", options)
    part = made.parts["groups"]
    assert part["kept"] * 2 == part["total"] and torch.isfinite(logits(made.model)).all()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "ecoflap"])
def test_a_network_whose_blocks_hand_on_more_than_a_state_is_refused(method):
    with pytest.raises(
        StructureError, match="T5ForConditionalGeneration does not run.*such as prune"
    ) as refusal:
        run("t5", method, {"sparsity": 0.5})
    assert "\n" not in str(refusal.value)


def matrix():
    """The cells of docs/matrix.md, by family and method, and its numbered refusals."""
    text = Path(__file__).parents[3].joinpath("docs/matrix.md").read_text()
    cells, names = {}, []
    for row in re.findall(r"^\| (.*) \|$", text, re.MULTILINE):
        first, *others = row.split(" | ")
        names = others if first == "family" else names
        cells |= {(first, name): cell for name, cell in zip(names, others, strict=True) if first != "family"}
    return cells, dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))


def test_the_page_of_families_and_methods_is_whole_and_shows_no_breach():
    cells, refusals = matrix()
    packages = ("zoo.llm.", "zoo.methods.")
    methods = [name for name in METHODS.names() if METHODS.get(name).__module__.startswith(packages)]
    assert set(cells) == {(kind, name) for kind in FAMILIES for name in methods}
    assert {cell for cell in cells.values() if cell != "yes"} == {f"no ({number})" for number in refusals}
    assert not any("BREAKS" in line for line in refusals.values())


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("opt", "wanda"),
        ("gpt2", "bip"),
        ("t5", "bdwp"),
        ("phi", "cats"),
        ("mixtral", "gqsa"),
        ("t5", "wanda"),
    ],
)
def test_cells_of_the_page_are_what_is_said_now(kind, method):
    cells, refusals = matrix()
    now = said(kind, method)
    cell = cells[kind, method]
    assert " ".join(now.split()) == (cell if cell == "yes" else refusals[cell[4:-1]])
