"""Thresholds on decoders: what they do, what they leave as it was, and the packed execution that profits."""

from __future__ import annotations

import copy

import pytest
import torch

from zoo.errors import ConfigError, DataError
from zoo.llm.models import serving
from zoo.llm.models.blocks import find_blocks
from zoo.llm.models.serving import PackedGatedMLP, PackedInput, PackedSparseInput, pack_model
from zoo.llm.models.thresholds import (
    ThresholdedLinear,
    attach,
    detach,
    held_out_shares,
    skipped_share,
    thresholds_of,
    to_extras,
)
from zoo.shared.errors import BudgetError
from zoo.shared.masks import MaskSet, set_masks


@pytest.fixture(autouse=True)
def _small_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SMALL", 0)


def token_batches(count: int, size: int, length: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(96, (size, length), generator=generator) for _ in range(count)]


ACT, Q, OUT = ("model.layers.{}." + part for part in ("mlp.act_fn", "self_attn.q_proj", "self_attn.o_proj"))


def some_thresholds(model, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """About half of the gates and inputs of a random model fall below these."""
    found = {}
    for i, block in enumerate(find_blocks(model)):
        found[ACT.format(i)] = scale * torch.rand(block.gate.out_features) * 0.5
        found[Q.format(i)], found[OUT.format(i)] = torch.tensor(0.5 * scale), torch.tensor(0.2 * scale)
    return found


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_masked_outputs_are_the_formula(llama, batches):
    """One block by hand: gates and inputs of q and o strictly above their thresholds."""
    found = some_thresholds(llama)
    block = find_blocks(llama)[0]
    x = torch.randn(3, 32)
    g = torch.nn.functional.silu(block.gate(x))
    kept = torch.where(g.abs() > found[ACT.format(0)], g, 0)
    wanted = block.down(kept * block.up(x))
    q = block.q(torch.where(x.abs() > 0.5, x, 0))
    attach(llama, found)
    layer = llama.model.layers[0]
    torch.testing.assert_close(layer.mlp(x), wanted)
    torch.testing.assert_close(layer.self_attn.q_proj(x), q)
    assert torch.equal(layer.self_attn.k_proj(x), block.k(x)), "keys see the dense input"


def test_the_dense_model_comes_back(llama, batches, tmp_path):
    before, keys = logits(llama, batches[0]), list(llama.state_dict())
    parameters = {name: id(p) for name, p in llama.named_parameters()}
    attach(llama, some_thresholds(llama))
    sparse = logits(llama, batches[0])
    assert not torch.equal(sparse, before)
    assert list(llama.state_dict()) == keys and {n: id(p) for n, p in llama.named_parameters()} == parameters
    llama.save_pretrained(tmp_path)
    again = type(llama).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, batches[0]), before)
    attach(again, thresholds_of(llama))
    torch.testing.assert_close(logits(again, batches[0]), sparse)
    torch.testing.assert_close(logits(copy.deepcopy(llama), batches[0]), sparse)
    detach(llama)
    assert torch.equal(logits(llama, batches[0]), before) and not thresholds_of(llama)
    assert not any(isinstance(module, ThresholdedLinear) for module in llama.modules())


def test_cache_and_batches_change_nothing(llama):
    attach(llama, some_thresholds(llama))
    ids = token_batches(1, 3, 12)[0]
    whole = logits(llama, ids)
    torch.testing.assert_close(logits(llama, ids[1:2]), whole[1:2], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        first = llama(ids[:, :7], use_cache=True)
        steps = [first.logits]
        for i in range(7, 12):
            first = llama(ids[:, i : i + 1], past_key_values=first.past_key_values, use_cache=True)
            steps.append(first.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("size,length", [(1, 1), (3, 1), (8, 1), (2, 30)])
def test_packed_is_masked(make_llama, dtype, tolerance, size, length):
    llama = make_llama(ffn=72)
    attach(llama, some_thresholds(llama)).to(dtype)
    packed = pack_model(copy.deepcopy(llama))
    assert isinstance(packed.model.layers[0].mlp, PackedGatedMLP)
    assert isinstance(packed.model.layers[1].self_attn.q_proj, PackedInput)
    ids = token_batches(1, size, length)[0]
    wanted, found = logits(llama, ids), logits(packed, ids)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found / scale, wanted / scale, atol=tolerance, rtol=0)


def test_packed_generates_the_same_text(llama):
    attach(llama, some_thresholds(llama))
    packed = pack_model(copy.deepcopy(llama))
    ids = token_batches(1, 2, 5)[0].clamp(min=1)
    for kwargs in ({"do_sample": False}, {"num_beams": 3}):
        texts = [m.generate(ids, max_new_tokens=12, pad_token_id=0, **kwargs) for m in (llama, packed)]
        assert torch.equal(*texts)
    ids = token_batches(1, 4, 16)[0]
    for found, wanted in zip(*(held_out_shares(m, [ids]) for m in (packed, llama)), strict=True):
        assert found == pytest.approx(wanted, abs=0.01)


@pytest.mark.usefixtures("packs_all")
def test_thresholds_over_sparse_weights(llama, batches):
    """Masks and thresholds together: the packed product of both equals the masked one."""
    generator = torch.Generator().manual_seed(0)
    names = [name for block in find_blocks(llama) for name in block.weight_names()]
    masks = MaskSet({n: torch.rand(llama.get_parameter(n).shape, generator=generator) < 0.4 for n in names})
    masks.apply_(llama)
    set_masks(llama, masks)
    attach(llama, some_thresholds(llama))
    packed = pack_model(copy.deepcopy(llama))
    assert isinstance(packed.model.layers[0].self_attn.o_proj, PackedSparseInput)
    assert type(packed.model.layers[0].mlp.up_proj).__name__ == "SparseLinear"
    for ids in (batches[0], batches[0][:, :1]):
        torch.testing.assert_close(logits(packed, ids), logits(llama, ids), atol=1e-4, rtol=1e-4)


def test_an_ffn_of_another_formula_stays_masked(llama):
    mlp = llama.model.layers[0].mlp
    attach(llama, some_thresholds(llama))
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) + mlp.up_proj(x))
    packed = pack_model(llama)
    assert packed.model.layers[0].mlp is mlp and isinstance(packed.model.layers[1].mlp, PackedGatedMLP)


def test_report_counts_zeros_and_the_weights_they_spare(llama, batches):
    attach(llama, {ACT.format(0): torch.full((64,), float("inf")), Q.format(1): torch.tensor(0.0)})
    report = held_out_shares(llama, batches)
    assert report[0]["ffn"] == 1.0 and report[1]["q"] < 0.01
    # gate, up, down 3 * 32 * 64; q, o 32 * 32; k, v 32 * 16
    total = 3 * 32 * 64 + 2 * 32 * 32 + 2 * 32 * 16
    assert report[0]["skipped"] == pytest.approx(2 * 32 * 64 / total)
    assert skipped_share(report) == pytest.approx((report[0]["skipped"] + report[1]["skipped"]) / 2)
    with pytest.raises(DataError, match="no batch"):
        held_out_shares(llama, [])
    with pytest.raises(BudgetError, match="no thresholds"):
        held_out_shares(detach(llama), batches)


def test_refusals(llama):
    with pytest.raises(ConfigError, match="lacks.*another model"):
        attach(llama, {ACT.format(7): torch.tensor(1.0)})
    with pytest.raises(ConfigError, match=r"shape \(63,\).*64 channels"):
        attach(llama, {ACT.format(0): torch.ones(63)})
    with pytest.raises(BudgetError, match="negative or NaN"):
        attach(llama, {ACT.format(0): torch.tensor(-1.0)})
    assert not thresholds_of(llama)
    with pytest.raises(ConfigError, match="before the weights are packed"):
        attach(pack_model(attach(llama, {Q.format(0): torch.tensor(0.1)})), {Q.format(0): torch.tensor(0.1)})
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    with pytest.raises(ConfigError, match="gated FFN"):
        attach(gpt, {})


def test_extras_name_the_modules(llama):
    attach(llama, some_thresholds(llama))
    extras = to_extras(thresholds_of(llama))
    assert extras[f"thresholds/{ACT.format(1)}"].shape == (64,)
    assert extras[f"thresholds/{Q.format(0)}"].shape == ()


@pytest.mark.traced
def test_compiles_masked_and_packed(make_llama):
    llama = make_llama(layers=1)
    attach(llama, some_thresholds(llama))
    ids = token_batches(1, 1, 8)[0]
    wanted = logits(llama, ids)
    packed = pack_model(copy.deepcopy(llama))
    for model in (llama, packed):
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(logits(compiled, ids), wanted, atol=1e-4, rtol=1e-4)
