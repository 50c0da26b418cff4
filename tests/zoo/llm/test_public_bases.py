"""Bundles of masks on a hub's model: what they hold, how they load, and which bases are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from zoo.bundles.card import read_card
from zoo.bundles.catalog import cache_folder, open_bundle, twin_of
from zoo.bundles.store import load
from zoo.cli import main
from zoo.errors import BundleError
from zoo.llm.data.tokenization import packaged, tokenizer_of
from zoo.shared.masks import masks_of
from zoo.shared.store.formats import load_packed

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    """A hub's model as `zoo pull` leaves it in the cache."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    root = cache_folder() / "hub" / "acme--net"
    folder = root / "models" / COMMIT
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, bos_token_id=0, eos_token_id=0, **SIZES)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    packaged("shakespeare").save_pretrained(folder)
    (folder / ".complete").touch()
    (root / "model-refs").mkdir()
    (root / "model-refs" / "main").write_text(COMMIT)
    (tmp_path / "mine.txt").write_text("\n\n".join(f"line {i} of a text " * 40 for i in range(8)))
    return folder


def sparsify(tmp_path: Path, *words: str, model: str = "hf://acme/net") -> int:
    out, text = str(tmp_path / "out"), str(tmp_path / "mine.txt")
    options = ["--text", text, "--windows", "2", "--length", "32", "--share", "--out", out]
    return main(["sparsify", model, *words, *options])


def test_masks_alone_are_stored_and_the_model_comes_back_bit_for_bit(base, tmp_path, capsys):
    assert sparsify(tmp_path, "--method", "wanda", "--sparsity", "0.5") == 0
    assert f"out holds masks; the rest is that of hf://acme/net@{COMMIT}" in capsys.readouterr().err
    stored = load_packed(tmp_path / "out" / "weights.safetensors")
    assert stored.tensors and all(tensor.dtype == torch.bool for tensor in stored.tensors.values())
    assert not stored.extras, "the tokenizer is the base's, too"
    weights = (tmp_path / "out" / "weights.safetensors").stat().st_size
    assert weights < 0.25 * (base / "model.safetensors").stat().st_size
    model, dense = load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    masks = masks_of(model)
    assert masks.sparsity() == pytest.approx(0.5, abs=2e-3)
    for name, tensor in dense.state_dict().items():
        kept = tensor * masks[name].keep if name in masks else tensor
        assert torch.equal(model.state_dict()[name], kept), name
    assert tokenizer_of(model).get_vocab() == packaged("shakespeare").get_vocab()
    twin = twin_of(open_bundle(tmp_path / "out"))
    assert (twin.folder / "weights.safetensors").stat().st_size < 10_000 and twin.card.stands_on.files
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["rebase", str(tmp_path / "out"), "--whole", "--out", str(tmp_path / "whole")]) == 0
    assert read_card(tmp_path / "whole" / "card.yaml").schema_version == 1
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in load(tmp_path / "whole").state_dict().items()
    )
    again = ["rebase", str(tmp_path / "whole"), "--base", "hf://acme/net", "--out", str(tmp_path / "again")]
    assert main(again) == 0
    assert (tmp_path / "again" / "weights.safetensors").stat().st_size == weights


def test_weights_that_a_method_changes_are_stored_and_said(base, tmp_path, capsys):
    assert sparsify(tmp_path, "--method", "sparsegpt", "--sparsity", "0.5") == 0
    assert "masks and 7 tensors that sparsegpt changed" in capsys.readouterr().err
    assert load(tmp_path / "out") is not None


def test_of_channels_that_were_cut_only_which_are_left_is_stored(base, tmp_path, capsys):
    assert sparsify(tmp_path, "--method", "cfsp", "--ratio", "0.25") == 0
    assert f"the rest is that of hf://acme/net@{COMMIT}" in capsys.readouterr().err
    stored = load_packed(tmp_path / "out" / "weights.safetensors")
    assert {name.split(".")[-2] for name in stored.tensors} == {"gate_proj", "up_proj", "down_proj"}
    assert all(tensor.dtype == torch.bool and tensor.dim() == 1 for tensor in stored.tensors.values())
    dense = AutoModelForCausalLM.from_pretrained(base, dtype="auto").state_dict()
    kept = stored.tensors["model.layers.0.mlp.down_proj.weight"]
    down = load(tmp_path / "out").state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(down, dense["model.layers.0.mlp.down_proj.weight"][:, kept])


def test_bases_that_are_missing_or_others_are_refused(base, tmp_path, capsys):
    assert sparsify(tmp_path, "--method", "wanda", "--sparsity", "0.5") == 0
    moved = shutil.copytree(base, tmp_path / "files")
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=f"model.safetensors is not that of hf://acme/net@{COMMIT}"):
        load(tmp_path / "out")
    weights.unlink()
    with pytest.raises(BundleError, match=f"lacks model.safetensors.*zoo pull hf://acme/net@{COMMIT}"):
        load(tmp_path / "out")
    shutil.rmtree(base)
    with pytest.raises(BundleError, match=f"not on this machine.*zoo pull hf://acme/net@{COMMIT}"):
        load(tmp_path / "out")
    assert main(["show", str(tmp_path / "out")]) == 0
    assert f"hf://acme/net@{COMMIT}" in capsys.readouterr().out
    moved.rename(tmp_path / "out" / "base")
    assert load(tmp_path / "out") is not None
    card = tmp_path / "out" / "card.yaml"
    text = card.read_text()
    card.write_text(text.replace(f"revision: {COMMIT}", f"revision: {COMMIT[::-1]}"))
    with pytest.raises(BundleError, match="the card's base is not the one that its weights were saved on"):
        load(tmp_path / "out")
    card.write_text(text)
    masks = tmp_path / "out" / "weights.safetensors"
    masks.write_bytes(masks.read_bytes()[:-1] + b"\xff")
    with pytest.raises(BundleError, match="damaged"):
        load(tmp_path / "out")


def test_a_folder_of_ones_own_is_no_public_base(base, tmp_path, capsys):
    mine = shutil.copytree(base, tmp_path / "mine")
    assert sparsify(tmp_path, "--method", "wanda", "--sparsity", "0.5", model=str(mine)) == 2
    assert "give its address, hf://OWNER/NAME" in capsys.readouterr().err and not (tmp_path / "out").exists()
