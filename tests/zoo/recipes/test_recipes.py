"""Recipes for models that people know: every entry is sound, one of each library is tried end to end."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

import zoo.cli.remake
import zoo.recipes.check
from zoo.cli import main
from zoo.errors import ConfigError
from zoo.recipes import Entry, entries, select
from zoo.recipes.__main__ import check
from zoo.recipes.check import check_parameters, tried
from zoo.registry import METHODS, RECIPE_CHECKS

PAGE = Path(__file__).parents[3] / "docs" / "recipes.md"


def test_every_entry_names_a_method_with_its_options_and_stands_on_the_page():
    rows = {line.split("|")[1].strip(): line for line in PAGE.read_text().splitlines() if line[:2] == "| "}
    for name, entry in entries().items():
        fields = {one.name for one in dataclasses.fields(METHODS.get(entry.method))}
        assert {option.replace("-", "_") for option in entry.options} <= fields, name
        assert (entry.shape is not None) == (entry.library == "transformers"), name
        words = " ".join(entry.words()).removeprefix("--method ")
        assert f"| {words} |" in rows[name], f"python -m zoo.recipes --check docs/recipes.md {name}"
        assert "%" in rows[name].split("|")[-2], f"{name}: what was tried gave no share"


def test_stated_parameters_are_those_of_the_real_configurations():
    for entry in {one.base: one for one in entries().values()}.values():
        if entry.library == "transformers" or importlib.util.find_spec(entry.library):
            check_parameters(entry, RECIPE_CHECKS.get(entry.library)())
    wrong = dataclasses.replace(entries()["sparsegpt-gpt2-s50"], parameters=124.6)
    with pytest.raises(ConfigError, match="states 124.6 million parameters; counted 124.4"):
        check_parameters(wrong, RECIPE_CHECKS.get("transformers")())


def test_there_are_about_thirty_of_all_four_libraries():
    libraries = [entry.library for entry in entries().values()]
    assert len(libraries) >= 30 and set(libraries) == {"transformers", "diffusers", "timm", "graph"}


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("wanda-mixtral-8x7b-2to4", 0.5),  # streamed, of a checkpoint that transformers converts
        ("wanda-gemma-3-270m-s50", 0.5),
        ("ecodiff-pixart-xl-2", None),
        ("prune-convnext-tiny-s80", 0.8),
        ("teddy-gcn-ogbn-arxiv", 0.8),
    ],
)
def test_a_recipe_works_on_its_configuration_at_reduced_size(name, share, tmp_path):
    entry = entries()[name]
    needed = {"timm": "timm", "diffusers": "diffusers"}.get(entry.library)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    found = tried(entry, tmp_path)
    assert found.note == ""
    assert found.zeros == pytest.approx(share, abs=0.01) if share is not None else 0.05 < found.zeros < 0.5


def test_what_fails_is_told_and_counted(tmp_path, monkeypatch):
    bad = dataclasses.replace(entries()["wanda-gemma-3-270m-s50"], options={"sparsity": 1.5})
    monkeypatch.setattr(zoo.recipes.__main__, "select", lambda names: [bad])
    assert check(tmp_path / "page.md", []) == 1
    assert "zoo sparsify ended with 2" in (tmp_path / "page.md").read_text()


def test_the_command_line_lists_shows_and_prints_what_make_would_run(tmp_path, capsys):
    assert main(["recipes", "list", "wanda-*", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {one["method"] for one in listed} == {"wanda"}
    assert listed[0]["commands"][0].startswith("zoo sparsify hf://HuggingFaceTB/SmolLM2-135M --method wanda")
    assert main(["recipes", "show", "wanda-llama-3.2-1b-2to4"]) == 0
    assert "hf://meta-llama/Llama-3.2-1B" in capsys.readouterr().out
    assert main(["recipes"]) == 0 and "hub/prune-resnet50-s80" in capsys.readouterr().out
    assert main(["make", "hub/prune-resnet50-s80", "--out", str(tmp_path), "--dry-run"]) == 0
    expected = f"zoo sparsify hf://timm/resnet50.a1_in1k --method prune --sparsity 0.8 --out {tmp_path}/prune"
    assert capsys.readouterr().out.startswith(expected)
    assert main(["make", "hub/prune-resnet50-s80"]) == 2 and "--out DIR" in capsys.readouterr().err
    assert main(["recipes", "list", "wonda-*"]) == 2 and "no recipe" in capsys.readouterr().err


def test_making_by_a_recipe_prints_one_json_document(tmp_path, capsys, monkeypatch):
    argv = ["make", "hub/wanda-llama-3.2-1b-2to4", "--out", str(tmp_path), "--json"]
    monkeypatch.setattr(zoo.cli, "dispatch", lambda words: print("a table") or 0)
    assert zoo.cli.remake.make_command(argv[1:]) == 0
    captured = capsys.readouterr()
    assert (
        json.loads(captured.out)[0].startswith("zoo sparsify hf://meta-llama") and "a table" in captured.err
    )
    monkeypatch.undo()
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    assert main(argv) == 3
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "HubError"


def test_expectations_are_those_of_the_measured_size():
    entry = entries()["wanda-llama-3.2-1b-2to4"]
    assert entry.minutes() == pytest.approx(417.2 / 60, rel=0.01) and not entry.streamed
    eight = entries()["wanda-llama-3.1-8b-2to4"]
    assert eight.streamed and eight.gib() == pytest.approx(3.8, abs=0.4)  # the embedding and two blocks
    assert entries()["sparsegpt-gpt2-s50"].minutes() is None, "nobody measured it"
    assert isinstance(select(("hub/prune-*",))[0], Entry)
