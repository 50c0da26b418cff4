"""Inventory of what can be pruned: kinds, input axes, what is left out and why, the share reached."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.optional import usable_torchvision
from zoo.shared.errors import MaskError
from zoo.shared.masks.patterns import NM
from zoo.shared.pruning.inventory import inventory, prunable_parameters
from zoo.shared.pruning.sparsifier import sparsify

usable_torchvision()  # transformers imports it


class Tied(nn.Module):
    """An embedding that is also the head, and layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm((2, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.memory = nn.LSTM(4, 4)
        self.up = nn.ConvTranspose1d(4, 8, 2)
        self.head = nn.Linear(4, 8)
        self.head.weight = self.embed.weight
        self.position = nn.Parameter(torch.zeros(2, 4))


def test_embeddings_norms_and_tied_heads_are_left_out():
    model = Tied()
    found = inventory(model)
    assert prunable_parameters(model) == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "memory.weight_ih_l0",
        "memory.weight_hh_l0",
        "up.weight",
    ]
    reasons = {w.name: w.reason for w in found.weights if w.reason}
    assert reasons == {
        "embed.weight": "an embedding, tied to the head",
        "norm.weight": "a norm",
        "norm.bias": "a norm",
        "position": "not the weight of a layer",
    }
    assert found.axes["up.weight"] == 0
    reached = sum(model.get_parameter(name).numel() for name in prunable_parameters(model))
    assert found.share == pytest.approx(reached / sum(p.numel() for p in model.parameters()))
    assert "left out, an embedding, tied to the head: 1 x" in str(found)
    assert list(sparsify(model, sparsity=0.5, names=["head.weight", "embed.weight"])) == ["embed.weight"]
    with pytest.raises(MaskError, match="no shape yet"):
        prunable_parameters(nn.LazyLinear(3))


def test_an_untied_head_of_a_vocabulary_is_left_out_and_a_classifier_is_not():
    language = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16))
    assert prunable_parameters(language) == ["1.weight"]
    assert prunable_parameters(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16))) == ["0.weight", "1.weight"]


def test_conv1d_of_gpt2_is_pruned_along_its_inputs():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    assert {w.kind for w in inventory(model).reached} == {"Conv1D"}
    masks = sparsify(model, pattern="2:4")
    assert set(masks) == {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for name, mask in masks.items():
        assert mask.pattern == NM(2, 4, dim=0)
        inputs = model.get_submodule(name.removesuffix(".weight")).weight.shape[0]
        assert bool((mask.keep.unflatten(0, (inputs // 4, 4)).sum(1) == 2).all())


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_fused_experts_are_reached_and_routers_are_not(family):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 32, "vocab_size": 24, "head_dim": 8, "moe_intermediate_size": 32}
    sizes |= {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{family}Config")(**sizes)
    found = inventory(getattr(transformers, f"{family}ForCausalLM")(config))
    experts = {w.name.rpartition(".")[2]: w for w in found.reached if w.kind == "fused experts"}
    assert set(experts) == {"gate_up_proj", "down_proj"}
    for name, inputs in (("gate_up_proj", 16), ("down_proj", 32)):
        assert experts[name].shape[experts[name].axis] == inputs
    reasons = {w.reason for w in found.weights if w.reason}
    assert {"a router", "an embedding", "the head of a vocabulary"} <= reasons
    assert found.share > 0.8
