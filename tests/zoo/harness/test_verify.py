"""Verification finds every kind of lie that the card's schema lets pass."""

from __future__ import annotations

import shutil

import pytest

from zoo.bundles.card import Card, mean_and_spread, read_card
from zoo.bundles.catalog import find
from zoo.bundles.store import load, save
from zoo.cli import main
from zoo.errors import ConfigError, DataError
from zoo.harness import seed_checks
from zoo.harness.evidence import record_evidence
from zoo.harness.verify import verify


@pytest.fixture
def beside(toy_bundles, tmp_path):
    """Copies of the toy bundles, to be spoilt."""
    shutil.copytree(toy_bundles["dense"].parent, tmp_path / "copies")
    return tmp_path / "copies"


def rewrite(folder, change):
    """Change the card's fields, as a liar with a consistent card would."""
    fields = read_card(folder / "card.yaml").to_dict()
    change(fields)
    card = Card.model_validate(fields)
    (folder / "card.yaml").write_text(card.to_yaml())


def failed(folder):
    [report] = verify(folder)
    assert not report.ok
    return [check.figure for check in report.checks if check.ok is False]


def test_honest_cards_come_back(toy_zoo):
    reports = verify("toy/*")
    models = [f"toy/{name}-mlp@1.0.0" for name in ("dense", "half", "tenth")]
    assert [report.model for report in reports] == models
    for report in reports:
        assert report.ok, [check for check in report.checks if not check.ok]
    figures = [check.figure for check in reports[1].checks]
    for figure in (
        "sha256",
        "parameters, dense",
        "parameters, kept",
        "bytes, dense",
        "bytes, packed",
        "bytes on disk",
        "FLOPs, dense",
        "FLOPs, sparse",
        "weights, kept",
        "weights, pattern",
        "weights, sparsity",
        "sparsity, overall",
        "zeros where masks drop",
        "toy/accuracy: accuracy",
        "toy/accuracy: accuracy, stderr",
        "toy/accuracy: accuracy, dense twin",
        "toy/accuracy: accuracy, seed 0",
        "toy/accuracy: accuracy, dense twin, seed 0",
        "toy/accuracy: accuracy per seed, card of toy/dense-mlp",
    ):
        assert figure in figures


def _set(path, value):
    def change(fields):
        *parents, last = path
        for key in parents:
            fields = fields[key]
        fields[last] = value

    return change


def _kept(fields):
    part = fields["sparsity"]["parts"]["weights"]
    part["kept"] += 1
    part["sparsity"] = fields["sparsity"]["overall"] = 1 - part["kept"] / part["total"]


def _on_disk(fields):
    fields["cost"]["bytes"]["on_disk"] = fields["weights"]["bytes"] = fields["weights"]["bytes"] + 1


def _seeds(per_seed):
    """Other values per seed, whose mean and spread are right."""

    def change(fields):
        mean, spread = mean_and_spread(per_seed)
        fields["metrics"][0] |= {"per_seed": per_seed, "mean": mean, "spread": spread}

    return change


def _seed_zero(fields):
    _seeds({0: fields["metrics"][0]["value"] + 0.01, 1: 0.9})(fields)


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        (_set(["cost", "parameters", "dense"], 10_000), "parameters, dense"),
        (_set(["cost", "parameters", "kept"], 5), "parameters, kept"),
        (_set(["cost", "bytes", "dense"], 1), "bytes, dense"),
        (_set(["cost", "bytes", "sparse"], 1), "bytes, packed"),
        (_set(["cost", "flops", "dense"], 1 << 40), "FLOPs, dense"),
        (_set(["cost", "flops", "sparse"], 1), "FLOPs, sparse"),
        (_set(["metrics", 0, "value"], 0.99), "toy/accuracy: accuracy"),
        (_set(["metrics", 0, "stderr"], 0.5), "toy/accuracy: accuracy, stderr"),
        (_set(["metrics", 0, "metric"], "f1"), "toy/accuracy: f1"),
        (_set(["metrics", 0, "dense", "value"], 0.5), "toy/accuracy: accuracy, dense twin"),
        (_seed_zero, "toy/accuracy: accuracy, seed 0"),
        (_seeds({1: 0.9, 2: 0.8}), "toy/accuracy: accuracy, seed 0"),
        (_set(["sparsity", "parts", "weights", "pattern"], "2:4"), "weights, pattern"),
        (_kept, "weights, kept"),
        (_set(["weights", "sha256"], "0" * 64), "sha256"),
    ],
)
def test_each_lie_is_found(beside, change, figure):
    rewrite(beside / "half-mlp", change)
    assert figure in failed(beside / "half-mlp")


def test_damaged_weights_are_a_failed_check(beside):
    _on_disk_folder = beside / "tenth-mlp"
    rewrite(_on_disk_folder, _on_disk)
    assert failed(_on_disk_folder) == ["everything else"]
    (beside / "half-mlp" / "weights.safetensors").write_bytes(b"not weights")
    assert failed(beside / "half-mlp") == ["sha256", "everything else"]
    (beside / "dense-mlp" / "weights.safetensors").unlink()
    assert failed(beside / "dense-mlp") == ["sha256", "everything else"]


def test_values_per_seed_against_the_committed_evidence(beside, tmp_path, monkeypatch):
    folder = beside / "half-mlp"
    card = read_card(folder / "card.yaml")
    metric = card.metrics[0]
    figures = {card.name: metric, metric.dense.name: metric.dense}
    monkeypatch.setattr(seed_checks, "REPOSITORY", tmp_path)
    rewrite(folder, _set(["evidence"], "results/toy.json"))
    [absent] = verify(folder)
    assert absent.ok, "the one seed is measured"
    path = tmp_path / "results" / "toy.json"
    for name, figure in figures.items():
        record_evidence(path, name, metric.task, metric.metric, figure.per_seed)
    [present] = verify(folder)
    assert present.ok
    compared = [check for check in present.checks if "evidence of" in check.figure]
    assert len(compared) == 2 and {check.how for check in compared} == {"compared"}
    wrong = {seed: value + 0.01 for seed, value in metric.per_seed.items()}
    record_evidence(path, card.name, metric.task, metric.metric, wrong)
    assert failed(folder) == ["toy/accuracy: accuracy per seed, evidence of toy/half-mlp"]
    path.write_text('{"per_seed": {}}')
    assert len(failed(folder)) == 2


@pytest.mark.parametrize(
    ("evidence", "why"),
    [(None, "names no evidence"), ("results/none.json", "not at hand"), ("results/toy.json", "per_seed")],
)
def test_seeds_that_nothing_vouches_for_could_not_be_checked(beside, tmp_path, monkeypatch, evidence, why):
    monkeypatch.setattr(seed_checks, "REPOSITORY", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "toy.json").write_text("[]")
    folder = beside / "half-mlp"

    def change(fields):
        _seeds({0: fields["metrics"][0]["value"], 1: 0.9})(fields)
        fields["evidence"] = evidence

    rewrite(folder, change)
    [report] = verify(folder)
    assert not report.ok and not report.failed
    [unknown] = report.unknown
    assert unknown.figure == "toy/accuracy: accuracy, seeds 1" and why in unknown.note
    assert main(["verify", str(folder)]) == 3


def test_missing_data_are_no_failed_figure(beside, toy, monkeypatch):
    def gone(self, model, *, progress=None):
        raise DataError("the toy data are not there; set ZOO_DATA")

    monkeypatch.setattr(toy.Accuracy, "evaluate", gone)
    [report] = verify(beside / "half-mlp")
    assert [check.figure for check in report.unknown] == ["quality"] and not report.failed
    assert "ZOO_DATA" in report.unknown[0].note
    assert {"parameters, kept", "weights, kept"} <= {check.figure for check in report.checks if check.ok}


def test_a_missing_twin_is_no_failed_figure(beside):
    shutil.rmtree(beside / "dense-mlp")
    [report] = verify(beside / "half-mlp")
    assert not report.failed
    figures = {"dense twin", "parameters, dense", "bytes, dense", "FLOPs, dense"}
    assert {check.figure for check in report.unknown} == figures


def test_a_saved_model_verifies_after_it_was_loaded_and_saved_again(toy_zoo, tmp_path):
    model = load("toy/tenth-mlp")
    again = save(model, tmp_path / "again", card=model.zoo_info.card)
    assert verify(again)[0].ok


def test_a_bundle_on_its_twin_verifies(toy_zoo, tmp_path):
    model, card = load("toy/half-mlp"), find("toy/half-mlp").card
    folder = save(model, tmp_path / "less", card=card, base="toy/dense-mlp")
    [report] = verify(folder)
    assert report.ok, [check for check in report.checks if check.ok is False]
    figures = [check.figure for check in report.checks]
    assert "sha256 of the base toy/dense-mlp@1.0.0" in figures and "bytes on disk, of the base" in figures
    rewrite(folder, _set(["base", "bytes"], 17))
    assert failed(folder) == ["bytes on disk, of the base"]
    rewrite(folder, _set(["base", "sha256"], "0" * 64))
    assert failed(folder) == ["everything else"]


def test_a_module_has_no_card(toy):
    with pytest.raises(ConfigError, match="no bundle"):
        verify(toy.MLP())
