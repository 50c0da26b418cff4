"""`zoo export --to onnx | torch-export | gguf`: checked by the other library in a process of its own."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import zoo
from zoo.bundles.interchange import ExportOnnx, ExportProgram, example_inputs
from zoo.cli import main
from zoo.errors import ConfigError, MissingDataError
from zoo.shared.masks import masks_of

SPARSE = "vision/bip-convnet-digits-s90"


def test_a_program_of_torch_runs_without_the_zoo(tmp_path, capsys):
    file = tmp_path / "deep" / "m.pt2"
    assert main(["export", SPARSE, "--to", "torch-export", "--out", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = zoo.load(SPARSE)
    program = torch.export.load(file)
    masks = masks_of(model)
    assert report["zeros"] == sum(mask.numel - mask.kept for mask in masks.values())
    assert report["inputs"] == [["batch", 1, 8, 8]] and report["bytes"] == file.stat().st_size
    for name, mask in masks.items():
        assert (program.state_dict[name][~mask.keep] == 0).all()
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(program.module()(images), model.eval()(images))
    with pytest.raises(ConfigError, match="is there already"):
        ExportProgram(SPARSE, file).run()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("graph/teddy-gcn-digits-g30-w80", "edges"),
        ("llm/chess-50-stories", "thresholds"),
        ("llm/gqsa-w4s50-stories", "the decoding of four-bit codes"),
    ],
)
def test_tensors_that_are_another_function_are_said_and_kept_apart_from_the_card(
    tmp_path, capsys, name, what
):
    assert main(["export", name, "--to", str(tmp_path / "folder")]) == 2
    assert f"computes with {what} besides its tensors" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
    assert main(["export", name, "--to", str(tmp_path / "x.safetensors")]) == 0
    assert f"computes with {what} besides" in capsys.readouterr().err


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    write = ExportProgram.write_file

    def other(self, function, inputs, file):
        with torch.no_grad():
            next(function.parameters()).mul_(1.1)
        write(self, function, inputs, file)
        with torch.no_grad():
            next(function.parameters()).div_(1.1)

    monkeypatch.setattr(ExportProgram, "write_file", other)
    with pytest.raises(ConfigError, match="computes something else from .pt2"):
        ExportProgram(SPARSE, tmp_path / "m.pt2").run()
    assert not (tmp_path / "m.pt2").exists()


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        ("graph/dense-gcn-digits", "m.pt2", "takes Tensor, Adjacency of one piece"),
        (SPARSE, "m.onnx", "a name that ends in .pt2"),
    ],
)
def test_what_has_no_form_there_is_refused(model, name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        ExportProgram(model, tmp_path / name).run()


def test_a_model_that_cannot_be_traced_is_refused_in_a_line(tmp_path):
    class Counting(nn.Module):
        def forward(self, x):
            return x * int(x.sum().item() * 10)

    with pytest.raises(ConfigError, match="Counting cannot be traced for export: "):
        ExportProgram(SPARSE, tmp_path).write_file(Counting(), (torch.ones(2, 3),), tmp_path / "m.pt2")


def test_onnx_runs_in_onnxruntime_and_its_zeros_come_back(tmp_path):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is not installed (the extra `onnx`)")
    from zoo.shared.masks.foreign_onnx import onnx_state

    report = ExportOnnx(SPARSE, tmp_path / "m.onnx").run()
    assert report["difference"] < 1e-5 and "29,736 pruned weights as zeros" in ExportOnnx.describe(report)
    _, masks = onnx_state(tmp_path / "m.onnx")
    assert masks.equal(masks_of(zoo.load(SPARSE)))


def test_gguf_is_read_back_by_transformers(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (the extra `gguf`)")
    from zoo.llm.gguf import ExportGguf, interleave

    rows = torch.arange(8.0)[:, None]
    assert interleave(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    name = "llm/wanda-50-shakespeare"
    report = ExportGguf(name, tmp_path / "m.gguf").run()
    assert report["difference"] < 1e-5
    model = zoo.load(name)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    dropped = sum(int((tensor.data == 0).sum()) for key, tensor in stored.items() if "blk" in key)
    assert dropped >= report["zeros"]
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == model.config.vocab_size
    for other, message in [
        ("llm/chess-50-shakespeare", "no form for thresholds"),
        (SPARSE, "GGUF is written of llama, mistral, qwen2; received"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ExportGguf(other, tmp_path / "other.gguf").run()


def test_language_models_are_shown_token_ids():
    model = zoo.load("llm/dense-shakespeare")
    (ids,) = example_inputs(model, "llm")
    assert ids.shape == (2, 16) and int(ids.max()) < model.config.vocab_size


def test_noise_of_their_size_stands_for_images_that_are_not_at_hand(monkeypatch):
    from zoo.vision import data

    monkeypatch.delenv("ZOO_DATA", raising=False)
    data._own.cache_clear()
    (images,) = example_inputs(zoo.load("vision/magnitude-resnet20-cifar10-s80"), "vision")
    assert images.shape == (2, 3, 32, 32) and images.std() > 0.5
    (photos,) = example_inputs(zoo.load("vision/deep-compression-squeezenet-imagenet"), "vision")
    assert photos.shape == (2, 3, 227, 227)
    with pytest.raises(MissingDataError):
        example_inputs(zoo.load("vision/dense-edsr-x2"), "vision")
