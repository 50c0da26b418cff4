"""`zoo sparsify FOLDER`: transformers' folders in, folders that transformers and the zoo load out."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import zoo.llm.folders
from zoo.bundles.catalog import find
from zoo.bundles.store import load
from zoo.cli import main
from zoo.harness.runner import evaluate
from zoo.llm.data.tokenization import packaged, tokenizer_of
from zoo.llm.domain import measured
from zoo.shared.masks import masks_of

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}


@pytest.fixture
def folder(tmp_path):
    """A function that writes a folder as a hub has them, and a text of one's own beside it."""

    def write(kind):
        from transformers import AutoConfig

        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=1024, bos_token_id=0, eos_token_id=0, **SIZES[kind])
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        model.generation_config = GenerationConfig(eos_token_id=[0, 5], repetition_penalty=1.3)
        model.save_pretrained(tmp_path / kind)
        tokenizer = packaged("shakespeare")
        tokenizer.save_pretrained(tmp_path / kind)
        (tmp_path / kind / "chat_template.jinja").write_text(TEMPLATE)
        (tmp_path / "mine.txt").write_text("\n\n".join(f"line {i} of a text " * 120 for i in range(8)))
        return tmp_path / kind

    return write


def command(source, out, *words):
    text = ["--text", str(source.parent / "mine.txt"), "--windows", "4", "--length", "32"]
    return main(["sparsify", str(source), *words, *text, "--out", str(out)])


@pytest.mark.parametrize(
    "kind,words,share", [("gpt2", ["--pattern", "2:4"], 0.5), ("llama", ["--sparsity", "0.7"], 0.7)]
)
def test_a_folder_becomes_one_that_transformers_loads_and_a_bundle(folder, tmp_path, kind, words, share):
    source, out = folder(kind), tmp_path / "out"
    assert command(source, out, "--method", "wanda", *words) == 0
    again = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert again.dtype == torch.bfloat16
    own = load(out)
    state = own.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert masks_of(own).lost_zeros(again) == [] and masks_of(own).sparsity() == pytest.approx(
        share, abs=2e-3
    )
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert tokenizer_of(own).chat_template == TEMPLATE
    for config in (again.generation_config, own.generation_config):
        assert config.eos_token_id == [0, 5] and config.repetition_penalty == 1.3
    card, dense = find(out).card, find(tmp_path / "out-dense").card
    assert card.dense_twin == dense.name and card.metrics[0].task == f"llm/text:{tmp_path / 'mine.txt'}"
    assert card.metrics[0].dense.value == dense.metrics[0].value
    [record] = evaluate([str(out)], [measured(str(tmp_path / "mine.txt"))[0]])
    assert record.metrics["word_perplexity"].value == pytest.approx(card.metrics[0].value)
    assert main(["eval", str(out), "--data", str(tmp_path / "mine.txt")]) == 0


def test_what_transformers_has_no_form_for_is_said(folder, tmp_path, capsys):
    source, out = folder("llama"), tmp_path / "out"
    assert command(source, out, "--method", "cats") == 0
    assert "no form for what cats adds" in capsys.readouterr().err
    assert not (out / "model.safetensors").exists() and (out / "card.yaml").is_file()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_large_folders_are_streamed_to_the_same_weights(folder, tmp_path, kind, monkeypatch, capsys):
    source = folder(kind)
    words = ["--method", "wanda", "--sparsity", "0.5"]
    assert command(source, tmp_path / "whole", *words) == 0
    monkeypatch.setattr(zoo.llm.folders, "WHOLE", 1)
    assert command(source, tmp_path / "streamed", *words) == 0
    assert "50.0 % of" in capsys.readouterr().err
    whole, streamed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "streamed")
    )
    same = total = 0
    for name, tensor in whole.state_dict().items():
        same, total = same + int((tensor == streamed.state_dict()[name]).sum()), total + tensor.numel()
    assert total - same <= 0.002 * total  # batches of another size sum in another order
    assert AutoTokenizer.from_pretrained(tmp_path / "streamed").chat_template == TEMPLATE
    assert command(source, tmp_path / "no", "--method", "ecoflap") == 2
    assert "which wanda and sparsegpt can; received ecoflap" in capsys.readouterr().err


def test_folders_that_are_no_language_model_are_refused(folder, tmp_path, capsys):
    source = folder("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    assert command(source, tmp_path / "out", "--method", "wanda", "--sparsity", "0.5") == 2
    assert "no-such-model" in capsys.readouterr().err
    shutil.rmtree(source)
    assert command(source, tmp_path / "out", "--method", "wanda", "--sparsity", "0.5") == 2


def test_ones_own_output_is_overwritten_whole_or_not_at_all(folder, tmp_path, capsys):
    source, out = folder("llama"), tmp_path / "out"
    words = ["--method", "wanda", "--sparsity"]
    assert command(source, out, *words, "0.5") == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert command(source, out, *words, "0.7") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert command(source, out, "--method", "wanda", "--pattern", "5:4", "--overwrite") == 2
    assert command(source, out, *words, "1.5", "--overwrite") == 2
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert command(source, out, *words, "0.7", "--overwrite") == 0
    assert masks_of(load(out)).sparsity() == pytest.approx(0.7, abs=2e-3)
    again = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert masks_of(load(out)).lost_zeros(again) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "mine.txt", "out", "out-dense"]
    for file in out.iterdir():
        file.unlink()
    (out / "diary.txt").write_text("mine")
    assert command(source, out, *words, "0.5", "--overwrite") == 2
    assert "not replaced, not even by --overwrite" in capsys.readouterr().err
    assert (out / "diary.txt").read_text() == "mine"
