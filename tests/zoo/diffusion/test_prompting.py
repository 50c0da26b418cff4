"""Scores that need prompts, on whole pipelines of the real families at reduced width with random weights."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

import diffusers  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from zoo.cli import main  # noqa: E402
from zoo.diffusion.families import family  # noqa: E402
from zoo.diffusion.folders import load_parts  # noqa: E402
from zoo.diffusion.gates import gated  # noqa: E402
from zoo.diffusion.methods.ecodiff import EcoDiff, gates  # noqa: E402
from zoo.diffusion.methods.laptop import Laptop, output_loss, removable_layers  # noqa: E402
from zoo.diffusion.methods.stable_diffusion import PruneParts  # noqa: E402
from zoo.diffusion.models import make_tokenizer, vocabulary  # noqa: E402
from zoo.diffusion.prompting import STEPS, Pipeline, in_single, read_captions  # noqa: E402
from zoo.diffusion.units import unit_groups  # noqa: E402
from zoo.errors import ConfigError  # noqa: E402
from zoo.shared.store.io import read_json  # noqa: E402

PROMPTS = ["a photo of a seven", "the digit two", "a four"]
GUIDED = ("sd15", "sdxl", "sd3", "flux", "pixart")  # by prompts; the others by classes or nothing


def clip(kind: type, width: int, projection: int = 16) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=len(vocabulary()),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=10,
            projection_dim=projection,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def t5() -> Any:
    config = T5Config(vocab_size=len(vocabulary()), d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, shift_factor=0.0
    ).eval()


def pipeline_of(name: str, scheduler: Any = None) -> Any:
    """A pipeline round a network of `families`."""
    torch.manual_seed(0)
    net, _ = family(name)
    words = vocabulary()
    ddim = scheduler or DDIMScheduler(clip_sample=False, steps_offset=1)
    flow = scheduler or FlowMatchEulerDiscreteScheduler()
    if name == "sd15":
        parts = (vae(), clip(CLIPTextModel, 24), make_tokenizer(words), net, ddim, None, None)
        return diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    if name == "sdxl":
        net = diffusers.UNet2DConditionModel(
            **{
                **net.config,
                "cross_attention_dim": 24,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 2,
                "projection_class_embeddings_input_dim": 16 + 12,
            }
        ).eval()
        two = clip(CLIPTextModel, 8), clip(CLIPTextModelWithProjection, 16)
        tokens = make_tokenizer(words), make_tokenizer(words)
        return diffusers.StableDiffusionXLPipeline(vae(), *two, *tokens, net, ddim)
    if name == "sd3":
        two = clip(CLIPTextModelWithProjection, 8, 8), clip(CLIPTextModelWithProjection, 8, 8)
        t = [make_tokenizer(words) for _ in range(3)]
        return diffusers.StableDiffusion3Pipeline(net, flow, vae(), two[0], t[0], two[1], t[1], t5(), t[2])
    if name == "flux":
        words_of = make_tokenizer(words), make_tokenizer(words)
        return diffusers.FluxPipeline(
            flow, vae(), clip(CLIPTextModel, 16), words_of[0], t5(), words_of[1], net
        )
    if name == "pixart":
        return diffusers.PixArtSigmaPipeline(make_tokenizer(words), t5(), vae(), net, ddim)
    if name == "dit":
        net = diffusers.DiTTransformer2DModel(**{**net.config, "num_embeds_ada_norm": 1000}).eval()
        return diffusers.DiTPipeline(net, vae(), ddim)
    return diffusers.DDPMPipeline(net, ddim)


def source(name: str, scheduler: Any = None) -> Pipeline:
    prompts = ["1", "2", "3"] if name == "dit" else PROMPTS
    return Pipeline(pipeline_of(name, scheduler), prompts, side=16 if name in ("flux", "pixart") else 0)


@pytest.mark.parametrize("name", [*GUIDED, "dit", "ddpm"])
def test_layers_are_scored_on_what_the_pipeline_itself_feeds_its_denoiser(name: str) -> None:
    own = source(name)
    net = own.network
    seen: list[torch.Tensor] = []
    hook = net.register_forward_hook(
        lambda *a: seen.append(a[-1][0] if isinstance(a[-1], tuple) else a[-1].sample)
    )
    outputs = own.outputs(STEPS, guided=False)
    hook.remove()
    with torch.no_grad():
        (again,) = outputs()
    assert torch.equal(again, torch.cat(seen)), "replayed calls give what the run gave"
    removable = removable_layers(net)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert output_loss(net, [], outputs) == 0
    assert all(output_loss(net, [layer.name], outputs) > 0 for layer in removable[:2])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net._forward_pre_hooks


@pytest.mark.parametrize("name", GUIDED)
def test_the_gradient_through_a_pipeline_is_that_of_differences(name: str) -> None:
    """With fixed gates, along a random direction, in double precision."""
    own = source(name)
    for part in own.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double().requires_grad_(False)
    groups = unit_groups(own.network)
    generator = torch.Generator().manual_seed(3)
    direction = {g.name: torch.randn(g.count, generator=generator, dtype=torch.float64) for g in groups}

    def loss(shift: float | torch.Tensor, recompute: bool = False) -> torch.Tensor:
        factors = {name: 0.8 + shift * way for name, way in direction.items()}
        with gated(own.network, factors):
            value = own.drawn(0, 2, 3)(recompute).square().mean()
            if value.requires_grad:
                value.backward()
        return value.detach()

    found = []
    for recompute in (False, True):
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss(shift, recompute)
        assert shift.grad is not None
        found.append(float(shift.grad))
    step = 1e-4
    expected = float(loss(step) - loss(-step)) / (2 * step)
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] != 0
    assert found[0] == pytest.approx(expected, rel=2e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers', by numpy 2
@pytest.mark.parametrize(
    "kind", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"]
)
def test_recomputation_with_schedulers_that_remember_steps(kind: str) -> None:
    own = source(
        "sd15",
        getattr(diffusers, kind)(
            steps_offset=1, **({"clip_sample": False} if kind == "DDIMScheduler" else {})
        ),
    )
    own.require_gradients()
    groups = unit_groups(own.network)
    found = []
    for recompute in (False, True):
        variables = {g.name: torch.full((g.count,), 0.5, requires_grad=True) for g in groups}
        torch.manual_seed(5)
        with torch.no_grad():
            target = own.drawn(0, 2, 4)(False)
        EcoDiff(recompute=recompute).descend(own.network, variables, own.drawn(0, 2, 4), target)
        found.append(torch.cat([v.grad for v in variables.values()]))
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-8) and float(found[0].abs().max()) > 0


def test_recomputation_keeps_no_activations_of_earlier_steps() -> None:
    own = source("sd15")
    own.pipe.unet.requires_grad_(False)

    def kept(steps: int, recompute: bool) -> int:
        variables = {
            g.name: torch.full((g.count,), 0.5, requires_grad=True) for g in unit_groups(own.network)
        }
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, gated(own.network, gates(variables, 0.5)):
            own.drawn(0, 2, steps)(recompute)
        return total

    assert kept(8, True) - kept(2, True) < (kept(8, False) - kept(2, False)) / 10


@pytest.mark.parametrize("name", [*GUIDED, "dit", "ddpm"])
def test_wanda_sees_the_denoiser_and_the_text_encoders_along_the_sampler(name: str, tmp_path) -> None:
    own = source(name)
    own.pipe.save_pretrained(tmp_path / "dense")
    parts = load_parts(tmp_path / "dense", read_json(tmp_path / "dense" / "model_index.json"))
    for part, network in parts.named_children():
        setattr(own.pipe, part, network)
    parts.source = own
    made = PruneParts(score="wanda", prompts=3, sampling_steps=2, sparsity=0.5).sparsify(parts)
    assert made.masks and all(0.4 < float((~mask.keep).float().mean()) < 0.6 for mask in made.masks.values())


WORDS = {
    "prune-parts": ["--score", "wanda", "--prompts", "2", "--sampling-steps", "2", "--sparsity", "0.5"],
    "ecodiff": ["--updates", "2", "--prompts", "2", "--sampling-steps", "2", "--keep", "0.5"],
    "laptop": ["--images", "4", "--remove", "0.05"],
}


SIDES = {name: ["--image-side", "16"] for name in ("flux", "pixart")}


@pytest.mark.parametrize("method", WORDS)
@pytest.mark.parametrize("name", GUIDED)
def test_the_folder_of_a_pipeline_by_scores_that_need_prompts(
    name: str, method: str, tmp_path, capsys
) -> None:
    pipe = pipeline_of(name)
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "dense")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    words = ["--captions", str(tmp_path / "prompts.txt"), *SIDES.get(name, []), *WORDS[method]]
    command = ["sparsify", str(tmp_path / "dense"), "--method", method, *words]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    again = type(pipe).from_pretrained(tmp_path / "out", use_safetensors=True, dtype=torch.float16)
    denoiser = again.unet if hasattr(again, "unet") else again.transformer
    dense = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    part = "unet" if hasattr(again, "unet") else "transformer"
    (stored,) = (tmp_path / "out" / part).glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(stored).values()} == {torch.float16}
    left = [sum(int((p != 0).sum()) for p in net.parameters()) for net in (denoiser, dense)]
    assert left[0] < 0.98 * left[1]
    if method == "prune-parts":  # what stays was not rounded on the way
        for mine, theirs in zip(denoiser.parameters(), dense.parameters(), strict=True):
            assert torch.equal(mine, theirs * (mine != 0))


def test_the_seed_decides_the_masks_that_are_learned(tmp_path) -> None:
    groups = unit_groups(pipeline_of("sd15").unet)
    method = EcoDiff(updates=2, prompts=2, sampling_steps=2)
    found = []
    for seed in (0, 0, 1):
        model = torch.nn.Module()
        pipe = pipeline_of("sd15")
        model.unet, model.source = pipe.unet, Pipeline(pipe, PROMPTS, seed)
        scores = method.scores(model, groups, None)
        found.append(torch.cat([scores[group.name] for group in groups]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_every_tensor_gets_its_own_precision_back() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model[0].to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with in_single(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        model[1].weight.data[0] = 0
    after = model.state_dict()
    assert {name: value.dtype for name, value in after.items()} == {n: v.dtype for n, v in before.items()}
    assert float(after["1.weight"][0].abs().sum()) == 0
    assert all(torch.equal(after[name], before[name]) for name in before if name != "1.weight")


def test_what_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(ConfigError, match="at least two prompts are needed; received 1"):
        Pipeline(pipeline_of("sd15"), ["one"])
    with pytest.raises(ConfigError, match="give their numbers instead of prompts"):
        Pipeline(pipeline_of("dit"), PROMPTS)
    for name in ("dit", "ddpm"):
        with pytest.raises(ConfigError, match="finished images, through which no gradient passes"):
            source(name).require_gradients()
    for kind, options, message in (
        ("DDPMScheduler", {"clip_sample": False}, "not known to be deterministic"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "clip_sample=False"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='dpmsolver"),
    ):
        with pytest.raises(ConfigError, match=message):
            source("sd15", getattr(diffusers, kind)(steps_offset=1, **options)).require_gradients()
    with pytest.raises(ConfigError, match="--score output"):
        source("sd15").outputs(4, guided=True)
    with pytest.raises(ConfigError, match="no prompts can be read"):
        read_captions(tmp_path / "nothing.txt")
    own = torch.nn.Module()
    own.unet = copy.deepcopy(pipeline_of("sd15").unet)
    with pytest.raises(ConfigError, match="captions=FILE"):
        EcoDiff().sparsify(own)
    with pytest.raises(ConfigError, match="trained on images"):
        Laptop(distil=True).sparsify(own)
    for method in (EcoDiff(score="norm"), Laptop(score="magnitude"), PruneParts()):  # which need no prompts
        with pytest.raises(ConfigError, match="brings its own"):
            dataclasses.replace(method, captions=tmp_path / "prompts.txt").sparsify(own)
        with pytest.raises(ConfigError, match="give captions, too"):
            dataclasses.replace(method, image_side=64).sparsify(own)

    def refused(*words: str, folder: str = "dense") -> str:
        capsys.readouterr()
        assert main(
            ["sparsify", str(tmp_path / folder), "--method", "ecodiff", *words, "--out", str(tmp_path / "o")]
        )
        assert not (tmp_path / "o").exists()
        return capsys.readouterr().err

    pipe = pipeline_of("sd15")
    pipe.save_pretrained(tmp_path / "dense")
    pipe.unet.save_pretrained(tmp_path / "alone")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    captions = ["--captions", str(tmp_path / "prompts.txt")]
    assert "--captions FILE" in refused()
    assert "network alone" in refused(*captions, folder="alone")
    assert "--epochs is for models of the zoo" in refused(*captions, "--epochs", "3")
    index = (tmp_path / "dense" / "model_index.json").read_text()
    (tmp_path / "dense" / "model_index.json").write_text(index.replace("StableDiffusionPipeline", "os"))
    assert "no pipeline 'os'" in refused(*captions)
    (tmp_path / "dense" / "model_index.json").write_text(
        index.replace('"DDIMScheduler"', '"system"').replace(
            '"scheduler": [\n    "diffusers"', '"scheduler": [\n    "os"'
        )
    )
    assert "is of 'os', which is not read" in refused(*captions)
