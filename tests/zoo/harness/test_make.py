"""`zoo make`: every bundle has a recipe; rows of another package; what is kept, resumed, refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from zoo.bundles import make as making
from zoo.bundles.card import Card, mean_and_spread, read_card
from zoo.bundles.catalog import select
from zoo.bundles.make import Target, make, round_to, train
from zoo.bundles.publish import cost_beside
from zoo.bundles.recipes import Row, depth, find_row, read_rows, rows, select_rows
from zoo.bundles.store import load, save
from zoo.errors import ConfigError, UnknownNameError
from zoo.harness import seed_checks
from zoo.harness.verify import verify
from zoo.registry import ARCHITECTURES, MAKERS, METHODS, TASKS
from zoo.shared.masks import masks_of
from zoo.shared.store.io import read_json
from zoo.shared.train import Recipe

from .test_cli import process, run

PACKAGED = [bundle for bundle in select() if (bundle.folder.parents[1] / "recipes.yaml").is_file()]


@pytest.mark.parametrize("bundle", PACKAGED, ids=lambda bundle: bundle.card.name)
def test_every_bundle_has_a_row_that_says_what_its_card_says(bundle):
    card, row = bundle.card, find_row(bundle.card.name)
    assert card.training.command == f"zoo make {card.name}"
    assert (card.summary, card.citation, card.evidence) == (row.summary, row.citation, row.evidence)
    assert card.method.name == row.method
    assert {len(metric.per_seed) for metric in card.metrics} == {row.seeds}
    assert (card.base is not None) == row.share
    stated = [name for figure in row.figures for name in figure.get("metrics", ())]
    assert not stated or stated == [metric.metric for metric in card.metrics]
    for figure in row.figures:
        assert figure["task"] in TASKS and figure["protocol"] in {metric.protocol for metric in card.metrics}
    assert (card.imported.model_dump() if card.imported else None) == row.imported
    if row.data:
        assert card.data.model_dump(exclude={"sha256"}) == row.data
    if row.method != "dense":
        assert card.dense_twin == (row.twin or row.source)
    if row.architecture is not None:
        assert card.architecture.name == row.architecture and row.architecture in ARCHITECTURES


def test_all_bundles_are_packaged_with_a_row():
    assert len(PACKAGED) >= 111
    assert {bundle.card.name for bundle in PACKAGED} <= set(rows())


@pytest.mark.parametrize(
    "row", [row for row in rows().values() if row.domain != "toy"], ids=lambda row: row.name
)
def test_rows_name_makers_and_options_that_exist(row):
    assert row.maker in MAKERS
    assert row.source is None or row.source in rows()
    if row.maker == "sparsify":
        kind = METHODS.get(row.method)
        known = {field.name for field in dataclasses.fields(kind)}
        kind(**row.method_options(), **{key: value for key, value in row.recipe.items() if key in known})
        Recipe(**{key: value for key, value in row.recipe.items() if key not in known})


def test_a_toy_package_makes_its_bundles(capsys, toy, tmp_path):
    out = tmp_path / "made"
    code, text, err = run(capsys, "make", "toy/*", "--out", out)
    assert code == 0, err
    assert [line.rpartition("/")[2] for line in text.split()] == ["dense-made", "fifth-made", "half-made"]
    dense, fifth, half = (
        read_card(out / name / "card.yaml") for name in ("dense-made", "fifth-made", "half-made")
    )
    assert dense.training.command == "zoo make toy/dense-made"
    assert dense.training.environment["torch"] == torch.__version__ and dense.training.environment["cpu"]
    assert list(dense.metrics[0].per_seed) == [0, 1] and dense.metrics[0].protocol == "after the last step"
    assert half.dense_twin == fifth.dense_twin == "toy/dense-made"
    assert half.metrics[0].dense.per_seed == dense.metrics[0].per_seed
    assert half.metrics[0].per_seed[1] != half.metrics[0].per_seed[0], "each from the dense model of its seed"
    assert fifth.metrics[0].per_seed[1] == fifth.metrics[0].per_seed[0], "both from the stored model"
    assert fifth.base.name == "toy/dense-made" and half.base is None
    assert torch.equal(load(out / "dense-made").first.weight, toy.train(0).first.weight)
    assert masks_of(load(out / "half-made")).sparsity() == 0.5
    for report in verify([out / "dense-made", out / "half-made"]):
        assert not report.failed
        # Nothing vouches for seed 1, whose model is not in the bundle.
        assert [check.figure for check in report.unknown] == ["toy/accuracy: accuracy, seeds 1"]
    code, text, err = run(capsys, "verify", out / "dense-made", "--seeds", "--json")
    assert code == 0, err
    again = [check for check in json.loads(text)[0]["checks"] if check["figure"].endswith("made again")]
    assert [(check["figure"][-18:], check["how"], check["ok"]) for check in again] == [
        (f", seed {seed} made again"[-18:], "measured", True) for seed in (0, 1)
    ]
    card = out / "dense-made" / "card.yaml"
    lie = dense.metrics[0].per_seed | {1: dense.metrics[0].per_seed[1] + 0.125}
    fields = dense.to_dict()
    mean, spread = mean_and_spread(lie)
    fields["metrics"][0] |= {"per_seed": lie, "mean": mean, "spread": spread}
    honest = card.read_text()
    card.write_text(Card.model_validate(fields).to_yaml())
    code, text, err = run(capsys, "verify", out / "dense-made", "--seeds", "--json")
    assert code == 1
    wrong = [check["figure"] for check in json.loads(text)[0]["checks"] if check["ok"] is False]
    assert wrong == ["toy/accuracy: accuracy, seed 1 made again"]
    card.write_text(honest)
    code, text, err = run(capsys, "make", "toy/dense-made", "--out", out)
    assert code == 0 and not text and "is there; --overwrite" in err


def test_evidence_of_every_seed_is_recorded(toy, tmp_path, monkeypatch):
    row = dataclasses.replace(find_row("toy/dense-made"), evidence="results/toy.json")
    path = make(row, Target(tmp_path / "cards", repository=tmp_path))
    card = read_card(path / "card.yaml")
    assert card.evidence == "results/toy.json"
    recorded = read_json(tmp_path / "results" / "toy.json")["per_seed"]["toy/dense-made"]
    assert {int(s): v for s, v in recorded["toy/accuracy"]["accuracy"].items()} == card.metrics[0].per_seed
    monkeypatch.setattr(seed_checks, "REPOSITORY", tmp_path)
    assert verify(path)[0].ok


@pytest.mark.parametrize("factor,expected", [(2, 2), (0.5, 1)])
def test_dense_bytes_are_the_larger_of_the_models_and_its_twins(toy, tmp_path, factor, expected):
    """As of a model of halves beside a twin of singles, or the other way round."""
    folder = make(find_row("toy/dense-made"), Target(tmp_path))
    card, model = read_card(folder / "card.yaml"), load(folder)
    own = card.cost.bytes.dense
    sizes = card.cost.bytes.model_copy(update={"dense": int(factor * own)})
    twin = card.model_copy(update={"cost": card.cost.model_copy(update={"bytes": sizes})})
    fields = card.to_dict() | {"cost": cost_beside(model, "toy/accuracy", twin)}
    saved = read_card(save(model, tmp_path / "again", card=fields) / "card.yaml")
    assert saved.cost.bytes.dense == expected * own


def test_finished_seeds_are_kept_and_others_are_not_taken_for_them(toy, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(log))
    half, target = find_row("toy/half-made"), Target(tmp_path)
    first = train(half, 1, target)
    again = train(half, 1, target)
    assert log.read_text().split("\n")[:-1] == ["train dense-made 1"], (
        "its dense start is made once, and kept"
    )
    assert again.seconds == first.seconds
    for key, value in first.made.model.state_dict().items():
        assert torch.equal(value, again.made.model.state_dict()[key])
    assert again.made.masks.equal(first.made.masks)
    dense = find_row("toy/dense-made")
    train(dataclasses.replace(dense, recipe={"steps": 5}), 1, target)
    assert log.read_text().count("train dense-made 1") == 2, "another recipe is another training"
    with monkeypatch.context() as patch:
        patch.setattr(making, "code_digest", lambda *objects: "other code")
        train(dense, 1, target)
    assert log.read_text().count("train dense-made 1") == 3, "and so is other code"


def test_sources_come_first_and_may_be_missing(toy, tmp_path):
    names = [row.name for row in select_rows(("toy/half-made", "toy/*"))]
    assert names[0] == "toy/dense-made" and len(names) == 3
    assert depth(find_row("vision/spark-resnet8-digits-tuned")) == 2
    with pytest.raises(UnknownNameError, match="zoo make toy/dense-made"):
        make(find_row("toy/fifth-made"), Target(tmp_path))


def test_a_dry_run_makes_nothing(capsys, toy, tmp_path):
    code, text, _ = run(capsys, "make", "toy/*", "--out", tmp_path, "--dry-run", "--json")
    assert code == 0 and not list(tmp_path.iterdir())
    shown = {one["name"]: one for one in json.loads(text)}
    assert shown["toy/half-made"]["from"] == "toy/dense-made" and not shown["toy/half-made"]["there"]
    code, text, _ = run(capsys, "make", "graph/dense-gcn-digits", "--dry-run")
    assert code == 0 and "graph/gcn" in text and "there" in text


def test_processes_share_the_rows(toy_environment, tmp_path):
    done = process(toy_environment, "make", "toy/*", "--out", tmp_path, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith("-made")) == [
        "dense-made",
        "fifth-made",
        "half-made",
    ]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "--dry-run"),
        (["toy/dense-mad"], "toy/dense-made"),
        (["toy/dense-made", "--jobs", "0"], "--jobs"),
    ],
)
def test_wrong_usage_is_named(capsys, toy, argv, word):
    code, _, err = run(capsys, "make", *argv)
    assert code == 2 and word in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groups: 3", "expected a list"),
        ("groups:\n  - {summary: x}", "needs a mapping `bundles`"),
        ("groups:\n  - bundles: {one: {summary: x}}", "lacks 'citation'"),
        ("groups:\n  - bundles: {one: {summary: x, citation: y, sed: 3}}", "unknown field 'sed'"),
        ("groups:\n  - bundles: {One: {summary: x, citation: y}}", "no legal name"),
    ],
)
def test_malformed_rows_are_refused(tmp_path, text, message):
    (tmp_path / "recipes.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_rows(tmp_path / "recipes.yaml", "toy")


def test_fields_of_a_group_and_of_a_row(tmp_path):
    (tmp_path / "recipes.yaml").write_text(
        "groups:\n  - summary: s\n    citation: c\n    options: {a: 1, b: 2}\n    seeds: 2\n"
        "    bundles:\n      one: {options: {b: 3}, from: two}\n      two:\n"
    )
    one, two = read_rows(tmp_path / "recipes.yaml", "toy")
    assert one == Row("toy/one", "s", "c", source="toy/two", options={"a": 1, "b": 3}, seeds=2)
    assert two.options == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"figures": ()}, "names no figures"),
        ({"method": "prune"}, "neither `from` nor `twin`"),
        ({"maker": "sparsify"}, "needs a model to start from"),
    ],
)
def test_rows_that_lack_something_are_refused(toy, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(dataclasses.replace(find_row("toy/dense-made"), **changes), Target(tmp_path))


class Whole(nn.Module):
    full_precision = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1, 1.0]))
        self.register_buffer("mean", torch.tensor(0.3))
        self.register_buffer("grid", torch.tensor([0.1, 0.7]), persistent=False)


def test_rounding_leaves_alone_what_is_not_stored() -> None:
    model = Whole()
    round_to(model, torch.float16)
    assert (
        model.weight.dtype == torch.float32
        and model.weight.tolist() == torch.tensor([0.1, 1.0]).half().tolist()
    )
    assert model.mean == torch.tensor(0.3).half() and torch.equal(model.grid, torch.tensor([0.1, 0.7]))
    plain = nn.Linear(2, 1)
    round_to(plain, torch.bfloat16)
    assert plain.weight.dtype == torch.bfloat16
