"""Tiny random models of 26 transformers families: what the tests and docs/matrix.md run every method on."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

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


def sizes(kind: str) -> dict[str, Any]:
    """What a tiny configuration of a family is made with; of one that is not listed the common sizes."""
    return {**_COMMON, **FAMILIES.get(kind, {})}


def family(kind: str) -> nn.Module:
    """A random model of a family, the same one each time, in eval mode."""
    return copy.deepcopy(_family(kind))


@functools.cache
def _family(kind: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes(kind))
    build: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: nn.Module = build.from_config(config).eval()
    with torch.no_grad():  # the usual start at 0.02 would hide errors behind the residual stream
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def token_ids(count: int = 3, size: int = 2, length: int = 16, seed: int = 1) -> list[Tensor]:
    """Batches of token ids [size, length] that no family takes for padding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (size, length), generator=generator) for _ in range(count)]
