"""`zoo sparsify` of folders that diffusers wrote: every family, each method that looks at weights alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from zoo.cli import main  # noqa: E402
from zoo.diffusion.families import FAMILIES, family, output  # noqa: E402
from zoo.diffusion.models import make_tokenizer, vocabulary  # noqa: E402
from zoo.diffusion.pruned import load_network, plan_of  # noqa: E402

METHODS = {
    "prune-parts": ["--sparsity", "0.5"],
    "ecodiff": ["--score", "norm", "--keep", "0.5"],
    "laptop": ["--score", "magnitude", "--remove", "0.1"],
}


def sparsify(source, out, method: str, *words: str) -> int:
    return main(["sparsify", str(source), "--method", method, *words, "--out", str(out)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_every_family(name: str, method: str, tmp_path) -> None:
    net, inputs = family(name)
    net.save_pretrained(tmp_path / "dense")
    assert sparsify(tmp_path / "dense", tmp_path / "out", method, *METHODS[method]) == 0
    made = load_network(tmp_path / "out").eval()
    before, after = (sum(p.numel() for p in n.parameters()) for n in (net, made))
    zeros = sum(int((p == 0).sum()) for p in made.parameters())
    assert torch.isfinite(output(made, inputs)).all()
    if method == "prune-parts":
        assert after == before and zeros > 0.2 * before and plan_of(made) is None
    else:
        assert after < before and plan_of(made) is not None


@pytest.fixture
def pipeline(tmp_path):
    """A Stable Diffusion pipeline in half precision at reduced width, as a folder."""
    torch.manual_seed(0)
    words = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    unet, _ = family("sd15")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipe = StableDiffusionPipeline(
        vae,
        CLIPTextModel(config),
        make_tokenizer(words),
        unet,
        DDIMScheduler(clip_sample=False, steps_offset=1),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_becomes_one_that_diffusers_loads(method: str, pipeline, tmp_path, capsys) -> None:
    assert sparsify(pipeline, tmp_path / "out", method, *METHODS[method]) == 0
    assert "from_pretrained" in capsys.readouterr().err
    again = StableDiffusionPipeline.from_pretrained(
        tmp_path / "out", use_safetensors=True, safety_checker=None, dtype=torch.float16
    )
    dense = UNet2DConditionModel.from_pretrained(pipeline / "unet", dtype=torch.float16)
    before, after = (sum(p.numel() for p in n.parameters()) for n in (dense, again.unet))
    assert again.unet.dtype == torch.float16
    if method == "prune-parts":
        text = again.text_encoder.encoder.layers[0].mlp.fc1.weight
        kept = again.unet.mid_block.resnets[0].conv1.weight
        assert before == after
        for weight, share in ((text, 0.475), (kept, 0.5)):
            assert abs(float((weight == 0).float().mean()) - share) < 0.001
        assert float((again.unet.conv_in.weight == 0).float().mean()) == 0
    else:
        assert after < before
        assert json.loads((tmp_path / "out" / "model_index.json").read_text())["unet"] == [
            "zoo.diffusion.pruned",
            "PrunedUNet2DConditionModel",
        ]
    again.to(torch.float32)
    again.set_progress_bar_config(disable=True)
    image = again("a seven", num_inference_steps=1, guidance_scale=1.0, output_type="np").images
    assert image.shape[0] == 1


def test_a_text_encoder_that_is_in_use_elsewhere_is_not_touched(pipeline, tmp_path) -> None:
    """What is pruned is read from the folder anew, whoever else holds the same text encoder."""
    held = StableDiffusionPipeline.from_pretrained(pipeline, use_safetensors=True, safety_checker=None)
    before = {name: value.clone() for name, value in held.text_encoder.state_dict().items()}
    files = {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}
    assert sparsify(pipeline, tmp_path / "out", "prune-parts", "--text-sparsity", "0.9") == 0
    assert all(torch.equal(value, before[name]) for name, value in held.text_encoder.state_dict().items())
    assert files == {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}


def test_what_is_refused(pipeline, tmp_path, capsys) -> None:
    def refused(source, *words: str, method: str = "prune-parts") -> str:
        capsys.readouterr()
        assert sparsify(source, tmp_path / "out", method, *words) != 0
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "--vae-sparsity" in refused(pipeline, "--vae-sparsity", "0.5")  # a part that is not pruned
    for share in ("-0.1", "1", "nan"):
        assert "sparsity" in refused(pipeline, "--text-sparsity", share)
    assert "job" in refused(pipeline, "--score", "wanda")
    assert "job" in refused(pipeline, method="ecodiff")
    assert "job" in refused(pipeline, method="laptop")
    pickled = tmp_path / "pickled"
    shutil.copytree(pipeline, pickled)
    torch.save({}, pickled / "unet" / "diffusion_pytorch_model.bin")
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "pickled" in refused(pickled)
    shutil.rmtree(pickled / "unet")
    assert "unet" in refused(pickled)
    index = json.loads((pickled / "model_index.json").read_text())
    index["unet"] = [None, None]
    (pickled / "model_index.json").write_text(json.dumps(index))
    assert "no denoiser" in refused(pickled)
    index["unet"], index["text_encoder"] = ["diffusers", "UNet2DConditionModel"], ["os", "system"]
    (pickled / "model_index.json").write_text(json.dumps(index))
    assert "no model of transformers" in refused(pickled)
    assert "--lr" in refused(pipeline, "--lr", "0.1")  # nothing is trained
    (tmp_path / "there").mkdir()
    assert sparsify(pipeline, tmp_path / "there", "prune-parts") != 0
    assert sparsify(pipeline, pipeline, "prune-parts", "--overwrite") != 0
    assert (pipeline / "unet" / "config.json").is_file()


def test_the_seed_of_random_scores_is_the_one_given(pipeline, tmp_path) -> None:
    words = "--score", "random", "--overwrite", "--seed"
    states = []
    for seed in ("0", "0", "1"):
        assert sparsify(pipeline, tmp_path / "out", "prune-parts", *words, seed) == 0
        states.append(load_network(tmp_path / "out" / "unet").mid_block.resnets[0].conv1.weight.clone())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
