"""ECoFLaP: probes, exact budgets, and the mechanism on models whose parts matter unequally."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import spearmanr

from zoo.errors import ConfigError, DataError
from zoo.llm.methods.ecoflap import (
    block_weights,
    first_order_scores,
    group_counts,
    language_loss,
    tensor_counts,
    zeroth_order_scores,
)
from zoo.llm.methods.sparsegpt import sparsegpt_pruner
from zoo.llm.methods.wanda import wanda_pruner
from zoo.llm.pruning import prune_blocks
from zoo.shared.blocks import find_chains
from zoo.shared.masks.patterns import Unstructured


@pytest.mark.parametrize("sparsity", [0.333, 0.5, 0.61, 0.7])
def test_totals_are_exact_to_one_weight(llama, batches, sparsity):
    generator = torch.Generator().manual_seed(0)
    scores = {name: float(torch.rand((), generator=generator)) for name in block_weights(llama, batches)}
    counts = tensor_counts(llama, scores, sparsity)
    sizes = {name: weight.numel() for name, weight in block_weights(llama, batches).items()}
    total = sum(sizes.values())
    assert sum(counts.values()) == total - int(sparsity * total)
    for block in ("model.layers.0.", "model.layers.1."):
        shares = [counts[n] / sizes[n] for n in sizes if n.startswith(block)]
        assert max(shares) - min(shares) < 2e-3 and min(shares) > 1 - sparsity - 0.1 - 2e-3


def test_shares_follow_the_scores_between_floor_and_ceiling():
    sizes = {"a": 1000, "b": 1000, "c": 1000}
    counts = group_counts(sizes, {"a": 1.0, "b": 2.0, "c": 3.0}, 0.5, 0.6)
    assert counts == {"a": 450, "b": 500, "c": 550}  # 400 each, 300 shared as 1 : 2 : 3
    full = group_counts(sizes, {"a": 0.0, "b": 1.0, "c": 100.0}, 0.2, 0.5)
    assert full["c"] == 1000 and sum(full.values()) == 2400 and full["b"] == 900 and full["a"] == 500
    assert group_counts(sizes, {"a": 0.0, "b": 0.0, "c": 1.0}, 0.3, 0.9)["c"] == 1000


def test_bad_budgets_are_refused():
    sizes = {"a": 100, "b": 100}
    with pytest.raises(ConfigError, match="max_sparsity must lie between"):
        group_counts(sizes, {"a": 1.0, "b": 1.0}, 0.6, 0.5)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        group_counts(sizes, {"a": 1.0, "b": 1.0}, 1.0, 1.0)
    with pytest.raises(DataError, match="one of them positive"):
        group_counts(sizes, {"a": 0.0, "b": 0.0}, 0.5, 0.6)
    with pytest.raises(DataError, match="finite"):
        group_counts(sizes, {"a": float("nan"), "b": 1.0}, 0.5, 0.6)


def test_weights_come_back_bit_for_bit_and_the_mode_too(llama, batches):
    before = copy.deepcopy(llama.state_dict())
    pointers = {name: weight.data_ptr() for name, weight in block_weights(llama, batches).items()}
    llama.train()
    zeroth_order_scores(llama, batches[:2])
    assert llama.training and all(torch.equal(before[k], v) for k, v in llama.state_dict().items())
    assert pointers == {name: weight.data_ptr() for name, weight in block_weights(llama, batches).items()}


def test_weights_come_back_after_an_error(llama, batches):
    before = copy.deepcopy(llama.state_dict())
    calls = []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no loss today")
        return language_loss(model, batch)

    with pytest.raises(RuntimeError, match="no loss today"):
        zeroth_order_scores(llama, batches, loss_fn=failing)
    assert all(torch.equal(before[k], v) for k, v in llama.state_dict().items())


def test_probes_estimate_the_gradient_norms(llama, batches):
    short = [batch[:1, :6] for batch in batches]
    exact = first_order_scores(llama, short)
    probed = zeroth_order_scores(llama, short, probes=8)  # 32 probes of each tensor
    names = list(exact)
    rank = spearmanr([exact[name] for name in names], [probed[name] for name in names]).statistic
    assert rank > 0.8
    ratio = sum(probed.values()) / sum(exact.values())
    assert 0.8 < ratio < 1.25


def test_half_precision_is_refused(llama, batches):
    with pytest.raises(ConfigError, match="float32"):
        zeroth_order_scores(llama.bfloat16(), batches)


@pytest.mark.parametrize("local", [wanda_pruner, sparsegpt_pruner])
def test_local_pruning_meets_the_counts(llama, batches, local):
    counts = tensor_counts(llama, first_order_scores(llama, batches), 0.613)
    masks = prune_blocks(llama, batches, local(Unstructured(), 0.0, counts.__getitem__))
    assert {name: mask.kept for name, mask in masks.items()} == counts


def test_a_sensitive_block_keeps_more(llama, batches):
    with torch.no_grad():  # the second block hardly writes to the residual stream
        llama.model.layers[1].self_attn.o_proj.weight.mul_(0.01)
        llama.model.layers[1].mlp.down_proj.weight.mul_(0.01)
    counts = tensor_counts(llama, zeroth_order_scores(llama, batches), 0.5, 0.8, "sum")
    kept = [sum(v for k, v in counts.items() if k.startswith(f"model.layers.{i}.")) for i in (0, 1)]
    assert kept[0] > kept[1]


def tiny_vlm():
    """A LLaVA of two vision layers and two language layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=39,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config).eval()


def test_both_towers_of_a_vision_language_model_are_pruned():
    model = tiny_vlm()
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((2, 4), 39), torch.randint(39, (2, 6), generator=generator)], 1)
    batch = {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    scores = zeroth_order_scores(model, [batch] * 4)
    counts = tensor_counts(model, scores, 0.5, group_score="mean")
    masks = prune_blocks(model, [batch], wanda_pruner(Unstructured(), 0.0, counts.__getitem__))
    assert len(find_chains(model)) == 2
    assert {name: mask.kept for name, mask in masks.items()} == counts
    total = sum(mask.numel for mask in masks.values())
    assert sum(counts.values()) == total - total // 2
    assert any("vision" in name for name in masks) and any("language" in name for name in masks)
    assert torch.isfinite(model(**batch).loss)
