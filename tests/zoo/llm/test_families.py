"""The matrix of methods and transformers families: the exact share and pattern, or one clear line."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.llm.models.serving import pack_model
from zoo.llm.models.thresholds import thresholds_of
from zoo.registry import METHODS
from zoo.shared.errors import SparseError, StructureError
from zoo.shared.masks import masks_of
from zoo.shared.ops import SparseLinear
from zoo.shared.pruning.inventory import inventory
from zoo.shared.train import Job

VOCABULARY, WIDTH, HEADS, LAYERS = 96, 32, 4, 2
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_MIXED = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

#: Model type -> what its configuration needs beside the common sizes. Families with a gated FFN of three
#: linear layers first, then those with other FFNs, mixtures of experts, and what is no decoder of attention.
GATED: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": _GROUPED,
    "olmo2": {"num_key_value_heads": 2},
    "stablelm": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2},
}
UNGATED: dict[str, dict[str, Any]] = {
    "phi3": {"num_key_value_heads": 2},
    "glm4": _GROUPED,
    "phi": {},
    "starcoder2": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": WIDTH},
    "bloom": {"n_layer": LAYERS, "n_head": HEADS},
    "falcon": {"multi_query": True},
    "gpt_neox": {},
    "gptj": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "rotary_dim": 4},
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "n_inner": 64},
    "gpt_bigcode": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**_GROUPED, **_MIXED},
    "qwen3_moe": {**_GROUPED, **_MIXED},
    "qwen2_moe": {"num_key_value_heads": 2, **_MIXED, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_key_value_heads": 2, **_MIXED},
}
OTHERS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "expand": 2, "time_step_rank": 4},
    "t5": {"d_model": WIDTH, "d_ff": 64, "d_kv": 8, "num_layers": LAYERS, "num_heads": HEADS},
}
FAMILIES = GATED | UNGATED | MIXTURES | OTHERS


def family(kind: str) -> nn.Module:
    """A random model of a family, in eval mode."""
    return copy.deepcopy(_family(kind))


@functools.cache
def _family(kind: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_COMMON, **FAMILIES[kind]})
    build = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = build.from_config(config).eval()
    with torch.no_grad():  # the usual start at 0.02 would hide errors behind the residual stream
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def token_ids(count: int = 3, size: int = 2, length: int = 16, seed: int = 1) -> list[torch.Tensor]:
    """Batches of token ids that no family takes for padding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (size, length), generator=generator) for _ in range(count)]


JOB = Job(token_ids(1))
WEIGHT_METHODS = {
    "wanda": {"sparsity": 0.7},
    "wanda-2:4": {"pattern": "2:4"},
    "sparsegpt": {"sparsity": 0.7},
    "sparsegpt-2:4": {"pattern": "2:4"},
}
GATED_METHODS = {
    "cats": {"chunk": 1},
    "chess": {"chunk": 1},
    "teal": {"budget": "uniform"},
    "cfsp": {"ratio": 0.5, "coarse": "uniform"},
}
IDS = token_ids(1, seed=7)[0]


def run(kind, method, options):
    return METHODS.get(method.partition("-")[0])(windows=2, **options).sparsify(family(kind), JOB)


def logits(model):
    ids = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **ids).logits


def generated(model):
    return model.generate(IDS[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


def wanted_weights(model):
    """Matrices of the blocks that the inventory reaches, without convolutions, and their input axes."""
    weights = [weight for weight in inventory(model).reached if weight.kind != "convolution"]
    return {weight.name: weight.axis for weight in weights}


@pytest.mark.usefixtures("packs_all")
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "t5"])
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_weights_are_pruned_to_the_exact_share_and_pattern(kind, method, tmp_path):
    made = run(kind, method, WEIGHT_METHODS[method])
    axes = wanted_weights(made.model)
    assert set(made.masks) == set(axes) and masks_of(made.model).lost_zeros(made.model) == []
    for name, mask in made.masks.items():
        if method.endswith("2:4"):
            groups = mask.keep.movedim(axes[name], -1).unflatten(-1, (-1, 4)).sum(-1)
            assert bool((groups == 2).all()), name
        else:
            assert mask.kept == mask.numel - int(0.7 * mask.numel), name
    if method != "wanda":
        return
    masked, text = logits(made.model), generated(made.model)
    made.model.save_pretrained(tmp_path)
    again = type(made.model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), masked) and torch.equal(generated(again), text)
    assert made.masks.lost_zeros(again) == []
    packed = pack_model(copy.deepcopy(made.model))
    assert sum(isinstance(module, SparseLinear) for module in packed.modules()) >= 2
    torch.testing.assert_close(logits(packed), masked, rtol=1e-3, atol=1e-3)
    if kind not in MIXTURES:  # sums in another order may choose another expert
        assert torch.equal(generated(packed), text)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "t5"])
def test_ecoflap_shares_an_exact_total_over_the_blocks(kind):
    made = run(kind, "ecoflap", {"sparsity": 0.6})
    total = sum(mask.numel for mask in made.masks.values())
    assert set(made.masks) == set(wanted_weights(made.model))
    assert sum(mask.kept for mask in made.masks.values()) == total - int(0.6 * total)


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("method", GATED_METHODS)
def test_methods_of_gated_ffns_take_every_family_that_has_one(kind, method, tmp_path):
    dense = logits(family(kind))
    made = run(kind, method, GATED_METHODS[method])
    assert not torch.equal(logits(made.model), dense)
    if method == "cfsp":
        assert made.parts["ffn channels"]["kept"] * 2 == made.parts["ffn channels"]["total"]
        made.model.save_pretrained(tmp_path)
        again = type(made.model).from_pretrained(tmp_path).eval()
        assert torch.equal(logits(again), logits(made.model))
    else:
        assert len(thresholds_of(made.model)) >= 2
        text = generated(made.model)
        packed = pack_model(copy.deepcopy(made.model))
        torch.testing.assert_close(logits(packed), logits(made.model), rtol=1e-2, atol=1e-2)
        assert torch.equal(generated(packed), text)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in GATED])
@pytest.mark.parametrize("method", GATED_METHODS)
def test_other_families_are_refused_in_one_line(kind, method):
    with pytest.raises(ConfigError, match=r"The FFN of \w+ .*gated FFN") as refusal:
        run(kind, method, GATED_METHODS[method])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", FAMILIES)
def test_gqsa_codes_plain_linear_layers_or_says_what_stands_in_the_way(kind):
    options = {"block_epochs": 0, "model_epochs": 0}
    if kind in MIXTURES or kind in OTHERS or kind == "gpt2":
        with pytest.raises(SparseError, match="plain linear layers|do not fit|cannot be walked") as refusal:
            run(kind, "gqsa", options)
        assert "\n" not in str(refusal.value)
        return
    made = run(kind, "gqsa", options)
    part = made.parts["groups"]
    assert part["kept"] * 2 == part["total"] and torch.isfinite(logits(made.model)).all()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "ecoflap"])
def test_a_network_whose_blocks_hand_on_more_than_a_state_is_refused(method):
    with pytest.raises(
        StructureError, match="T5ForConditionalGeneration does not run.*such as prune"
    ) as refusal:
        run("t5", method, {"sparsity": 0.5})
    assert "\n" not in str(refusal.value)
