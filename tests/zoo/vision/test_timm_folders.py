"""`zoo sparsify` of a folder that timm wrote for a hub."""

from __future__ import annotations

import json

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.cli.make import foreign_folder
from zoo.shared.masks import masks_of

pytest.importorskip("timm", reason="timm is not installed")

from zoo.optional import import_timm  # noqa: E402
from zoo.vision.timm_folders import load_folder, sparsify_folder  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    timm = import_timm()
    small = {"layers": [1, 1, 1, 1], "stem_width": 8}
    model = timm.create_model("resnet18", num_classes=4, **small)
    timm.models.save_for_hf(model, tmp_path / "dense", safe_serialization=True, model_args=small)
    return tmp_path / "dense"


def test_the_result_is_one_that_timm_loads(folder, tmp_path):
    assert foreign_folder(str(folder)) == ("vision", sparsify_folder), "before transformers' config.json"
    command = ["sparsify", str(folder), "--method", "prune", "--out", str(tmp_path / "out")]
    assert main([*command, "--sparsity", "0.7"]) == 0
    timm = import_timm()
    made = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    dense = dict(load_folder(folder).named_parameters())
    zeros = total = 0
    for name, weight in made.named_parameters():
        if weight.dim() == 4:
            zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
            kept = weight != 0
            assert (weight[kept] == dense[name][kept]).all()
    assert zeros / total == pytest.approx(0.7, abs=0.02)
    assert main([*command, "--sparsity", "0.7"]) == 2, "the folder is taken"


def test_masks_on_a_public_base(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    commit = "0123456789" * 4
    base = tmp_path / "cache" / "hub" / "timm--net" / "models" / commit
    base.parent.mkdir(parents=True)
    folder.rename(base)
    (base / ".complete").touch()
    words = ["sparsify", f"hf://timm/net@{commit}", "--method", "prune", "--sparsity", "0.7", "--share"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "into=timm.create_model" in capsys.readouterr().err
    dense = load_folder(base)
    made = zoo.load(tmp_path / "out", into=load_folder(base))
    masks = masks_of(made)
    assert masks.sparsity() == pytest.approx(0.7, abs=0.02)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor * masks[name].keep if name in masks else tensor)
    file = tmp_path / "out" / "weights.safetensors"
    assert file.stat().st_size < 0.1 * (base / "model.safetensors").stat().st_size
    assert main([*words, "--out", str(tmp_path / "out")]) == 2, "the folder is taken"
    assert main([*words, "--out", str(tmp_path / "out"), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ("", ["--method", "bip", "--sparsity", "0.5"], "learns from data"),
        ("pickle", ["--method", "prune", "--sparsity", "0.5"], "pickled weights are not read"),
        ("name", ["--method", "prune", "--sparsity", "0.5"], "timm cannot make a 'resnet19' of it"),
    ],
)
def test_what_is_refused(folder, tmp_path, capsys, change, words, message):
    if change == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif change == "name":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architecture": "resnet19"}))
    assert main(["sparsify", str(folder), *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
