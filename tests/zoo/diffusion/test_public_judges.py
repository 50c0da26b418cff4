"""CLIP score and FID: refused without their weights; with a stand-in for the network they are computed."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from tokenizers import pre_tokenizers  # noqa: E402
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer  # noqa: E402

from zoo.diffusion import public_judges  # noqa: E402
from zoo.diffusion.data import load_pictures  # noqa: E402
from zoo.diffusion.models import TextToImage  # noqa: E402
from zoo.diffusion.paired import images_of  # noqa: E402
from zoo.errors import ConfigError, TaskError  # noqa: E402
from zoo.harness.tasks import get_task  # noqa: E402


def test_without_weights_the_remedy_is_named_and_there_is_no_number(tmp_path, monkeypatch) -> None:
    for name in ("clip_score", f"clip_score:{tmp_path}"):
        with pytest.raises(ConfigError, match="Download openai/clip-vit-base-patch16 and give its folder"):
            get_task(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sparse-model-zoo\[fid\]'"):
        get_task("fid")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (tmp_path / "other.pth").write_bytes(b"random")
    for name in ("fid", f"fid:{tmp_path / 'other.pth'}"):
        with pytest.raises(ConfigError, match="Download pt_inception-2015-12-05-6726825d.pth"):
            get_task(name)


def test_the_clip_score_is_that_of_the_folder_and_missing_weights_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(public_judges, "IMAGES", 3)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokens = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**sizes, "vocab_size": len(words), "eos_token_id": len(words) - 1}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}))
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokens).save_pretrained(tmp_path)
    clip.save_pretrained(tmp_path)
    model = TextToImage(side=8, widths=(16, 16), attention=(True, True), text_width=16, text_layers=1).eval()
    task = get_task(f"clip_score:{tmp_path}")
    with torch.no_grad():
        first = task.evaluate(model)
        noise = torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        pixels = images(list(public_judges.as_bytes(images_of(model, noise))), return_tensors="pt")
        words_ = tokens(["a photo of a one"], return_tensors="pt")
        out = clip.eval()(**words_, **pixels)
    own = torch.cosine_similarity(out.image_embeds, out.text_embeds)[1]
    assert first.n == 3 and first.samples["clip_score"][1] == pytest.approx(100 * float(own), abs=1e-2)
    with pytest.raises(TaskError, match="got a Linear"):
        task.evaluate(torch.nn.Linear(1, 1))
    state = {name: value for name, value in clip.state_dict().items() if "text_projection" not in name}
    clip.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match="lacks CLIP's weight 'text_projection"):
        task.evaluate(model)


def test_the_inception_distance_is_of_the_models_images_to_the_test_images(tmp_path, monkeypatch) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")

    class Means(torch.nn.Module):
        num_features = 2

        def forward(self, x):
            return x.float().mean((2, 3))[:, :2]

    real = fid.FrechetInceptionDistance
    stand_in = lambda feature_extractor_weights_path: real(feature=Means())  # noqa: E731
    monkeypatch.setattr(fid, "FrechetInceptionDistance", stand_in)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(public_judges, "DIGEST", "")
    (tmp_path / "weights.pth").write_bytes(b"stand-in")
    task, test = get_task(f"fid:{tmp_path / 'weights.pth'}"), load_pictures("digits").test
    monkeypatch.setattr(public_judges, "_made", lambda *_: test)
    assert task.evaluate(torch.nn.Identity()).metrics["fid"].value == pytest.approx(0, abs=1e-3)
    monkeypatch.setattr(public_judges, "_made", lambda *_: test * 0 - 1)
    assert task.evaluate(torch.nn.Identity()).metrics["fid"].value > 1000
    colours = public_judges.as_bytes(torch.tensor([-1.0, 1.0, 3.0]).view(3, 1, 1, 1))
    assert colours[:, 2].flatten().tolist() == [0, 255, 255]
