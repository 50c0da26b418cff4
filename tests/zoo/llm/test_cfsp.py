"""CFSP: shares, scores and the cut."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from zoo.errors import ConfigError
from zoo.llm.methods.cfsp import (
    channel_scores,
    choose_channels,
    cut_channels,
    ffn_groups,
    ffn_statistics,
    keep_shares,
    kept_width,
    recovery_ranks,
)
from zoo.llm.models.blocks import find_blocks
from zoo.shared.errors import ActivationError


@pytest.fixture
def statistics(llama, batches):
    return ffn_statistics(llama, batches)


def test_statistics_are_those_of_a_plain_pass(llama, batches, statistics):
    seen = []
    down = llama.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    angles = []
    norm, llama.model.norm = llama.model.norm, torch.nn.Identity()  # the last hidden state is normalised else
    with torch.no_grad():
        for batch in batches:
            states = llama(batch, output_hidden_states=True).hidden_states
            cosine = torch.cosine_similarity(states[1], states[2], dim=-1)
            angles.append(cosine.arccos() / math.pi)
    llama.model.norm = norm
    handle.remove()
    windows = sum(len(batch) for batch in batches)
    expected = (torch.cat(seen).square().sum(0) / windows).sqrt()
    torch.testing.assert_close(statistics[1].norms, expected, rtol=1e-4, atol=1e-6)
    assert statistics[1].angle == pytest.approx(float(torch.stack(angles).mean()), rel=1e-4)


def test_the_cut_network_equals_the_masked_one_and_has_the_predicted_size(llama, batches, statistics):
    keep = choose_channels(llama, statistics, 0.4)
    masked, smaller = copy.deepcopy(llama), copy.deepcopy(llama)
    ffn_groups(masked).masks(masked, keep).apply_(masked)
    before, after = cut_channels(smaller, keep)
    dropped = sum(int((~kept).sum()) for kept in keep.values())
    assert before - after == dropped * 3 * 32 and dropped > 0
    with torch.no_grad():
        torch.testing.assert_close(
            smaller(batches[0]).logits, masked(batches[0]).logits, rtol=1e-5, atol=1e-5
        )
    out = smaller.generate(batches[0][:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] <= 7


def test_biases_are_cut_too(batches):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    for block in find_blocks(model):
        torch.nn.init.normal_(block.gate.bias)
        torch.nn.init.normal_(block.up.bias)
    keep = choose_channels(model, ffn_statistics(model, batches), 0.5)
    masked = copy.deepcopy(model)
    ffn_groups(masked).masks(masked, keep).apply_(masked)
    cut_channels(model, keep)
    assert model.model.layers[0].mlp.gate_proj.bias.shape == (24,)
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]).logits, masked(batches[0]).logits, rtol=1e-5, atol=1e-5)


def test_the_released_score_is_the_channel_norm_alone_and_the_repaired_is_not(llama, statistics):
    block, norms = find_blocks(llama)[0], statistics[0].norms
    released = channel_scores(block, norms, "released", torch.Generator())
    torch.testing.assert_close(released, 3 / 32 * norms, rtol=1e-5, atol=1e-7)
    repaired = channel_scores(block, norms, "repaired", torch.Generator())
    down, up, gate = (part.weight.detach() for part in (block.down, block.up, block.gate))
    scaled = down.abs() * norms
    by_hand = torch.stack(
        [
            sum(
                scaled[r, c] / scaled[r].sum()
                + up[c, r].abs() / up[:, r].abs().sum()
                + gate[c, r].abs() / gate[:, r].abs().sum()
                for r in range(32)
            )
            / 32
            * norms[c]
            for c in range(8)
        ]
    )
    torch.testing.assert_close(repaired[:8], by_hand, rtol=1e-4, atol=1e-7)
    assert not torch.equal(repaired.argsort(), released.argsort())


def test_shares_average_to_the_ratio_and_stay_below_one():
    for ratio in (0.0, 0.1, 0.4, 0.8):
        shares = keep_shares([0.1, 0.3, 0.12, 0.2], ratio)
        assert sum(shares) / 4 == pytest.approx(1 - ratio)
        assert max(shares) < 1 or ratio == 0
        assert shares[1] == max(shares) and shares[0] == min(shares)
    assert keep_shares([0.2, 0.2], 0.25) == pytest.approx([0.75, 0.75])
    # sigmoid(13.1072 * 0.1) and sigmoid(-13.1072 * 0.1): their ratio, as nothing has to be shrunk
    low, high = keep_shares([0.1, 0.3], 0.5)
    assert high / low == pytest.approx(math.exp(13.1072 * 0.1))


def test_widths_round_as_stated():
    assert kept_width(172, 0.6) == 103 and kept_width(100, 0.29999999999999999) == 30
    assert kept_width(1000, 0.5, 128) == 512 and kept_width(1000, 0.99, 128) == 1000
    with pytest.raises(ConfigError, match="leaves none"):
        kept_width(100, 0.005)
    with pytest.raises(ConfigError, match="between 1 and the 100 channels"):
        kept_width(100, 0.5, 128)


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan")])
def test_ratios_out_of_range_are_refused(llama, statistics, ratio):
    with pytest.raises(ConfigError, match="ratio is the share"):
        choose_channels(llama, statistics, ratio)


def test_statistics_of_another_model_are_refused(llama, statistics):
    with pytest.raises(ConfigError, match="statistics of 1 blocks"):
        choose_channels(llama, statistics[:1], 0.2)


def test_an_ffn_that_is_not_gated_is_refused(batches):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=4)).eval()
    with pytest.raises(ConfigError, match="GPT2"):
        ffn_statistics(model, batches)


def test_nan_is_refused(llama, batches):
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ActivationError, match="not finite"):
        ffn_statistics(llama, batches)


def test_ranks_follow_the_angles_by_hand():
    """z = 13.1072 (-0.1, 0.1) gives sigmoids 0.21235 and 0.78765: of the six ranks that are left beside one
    for each block 1.27 and 4.73."""
    assert recovery_ranks([0.1, 0.3], 4) == [1 + 1, 1 + 5]
    assert recovery_ranks([0.2, 0.2, 0.2], 3) == [3, 3, 3]
    assert recovery_ranks([0.1, 0.3], 1) == [1, 1]
    with pytest.raises(ConfigError, match="rank of at least 1; received 0"):
        recovery_ranks([0.1], 0)


def test_recovery_trains_the_cut_model_and_merges(llama, batches):
    from zoo.llm.methods.cfsp import CFSP
    from zoo.llm.train import Windows, llm_recipe, window_loss
    from zoo.shared.train import Job

    text = torch.cat([batch.flatten() for batch in batches])
    job = Job(Windows(text, 8, 4), window_loss, None, llm_recipe(4, batch=4), 0, "cpu")
    plain = CFSP(ratio=0.5).sparsify(copy.deepcopy(llama), job).model
    made = CFSP(ratio=0.5, rank=3).sparsify(copy.deepcopy(llama), job)
    assert {n: p.shape for n, p in made.model.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }
    changed = {n for n, p in made.model.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert changed == {n for n, _ in plain.named_parameters() if "_proj" in n}
    assert all(parameter.requires_grad for parameter in made.model.parameters())
    assert made.hyperparameters["rank"] == 3
    with pytest.raises(ConfigError, match="rank 3 is of updates that are trained: pass job="):
        CFSP(ratio=0.5, rank=3).sparsify(copy.deepcopy(llama))
