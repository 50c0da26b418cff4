"""Layers that decode one token in native calls: the same logits and text as transformers' own layers, and
these wherever someone must see more."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from zoo.llm.models import serving
from zoo.llm.models.one_token import OneTokenLayer
from zoo.llm.models.quantised import PackedGroupLinear, replace_module
from zoo.llm.models.serving import pack_model
from zoo.llm.models.thresholds import attach
from zoo.shared import ops
from zoo.shared.masks import MaskSet
from zoo.shared.measure.activations import counting_sparsity, realised_sparsity
from zoo.shared.ops import _native, decoder_layer, packing, quantise_groups
from zoo.shared.ops import one_token as one_token_ops
from zoo.shared.ops.modules import SparseLinear

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")
TOKENS = torch.tensor([[5, 17, 3, 60, 2, 9, 33]])


def plain_llama(**changes: object) -> nn.Module:
    """Two layers with weights of transformers' own making."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=96, num_hidden_layers=2, initializer_range=0.2, **{**sizes, **changes})
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def llama(**changes: object) -> nn.Module:
    """Two layers of packed four-bit groups."""
    model = plain_llama(**changes)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            keep = torch.rand(module.out_features, module.in_features // 16) < 0.6
            groups = quantise_groups(module.weight, keep)
            replace_module(model.model.layers, name, PackedGroupLinear(groups, module.bias))
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a layer was run in native calls."""
    from zoo.llm.models import one_token

    seen: list[int] = []

    def counted(*args: object) -> torch.Tensor:
        seen.append(1)
        return decoder_layer.layer_outputs(*args)

    monkeypatch.setattr(one_token, "layer_outputs", counted)
    return seen


def logits(model: nn.Module, **options: object) -> torch.Tensor:
    """Of each token but the first three, which are a prompt."""
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(TOKENS[:, :3], past_key_values=cache)
        for i in range(3, TOKENS.shape[1]):
            found.append(model(TOKENS[:, i : i + 1], past_key_values=cache, **options).logits)
    return torch.cat(found, 1)


def test_tokens_and_text_are_those_of_the_plain_layers(calls: list[int]) -> None:
    plain = llama()
    model = packing.pack(copy.deepcopy(plain), MaskSet({}))
    assert all(type(layer) is OneTokenLayer for layer in model.model.layers)
    assert list(model.state_dict()) == list(plain.state_dict())
    found = logits(model)
    assert len(calls) == 8
    torch.testing.assert_close(found, logits(plain), rtol=1e-3, atol=1e-3)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **options), plain.generate(TOKENS, **options))
    assert len(calls) > 24
    torch.testing.assert_close(logits(copy.deepcopy(model)), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_of_half_precision_models(dtype: torch.dtype, calls: list[int]) -> None:
    """As near to fp32's as the plain layers are, which round after each step."""
    exact = logits(llama())
    plain = llama().to(dtype)
    model = packing.pack(copy.deepcopy(plain), MaskSet({}))
    found = logits(model)
    assert found.dtype == dtype and len(calls) == 8
    error, allowed = ((each.float() - exact).norm() for each in (found, logits(plain)))
    assert float(error) <= 1.5 * float(allowed) < 0.2 * float(exact.norm())


@pytest.mark.parametrize(
    "case", ["mask", "autocast", "batch", "hook", "gradient", "trained", "reference", "double"]
)
def test_what_the_calls_cannot_do_goes_the_plain_way(case: str, calls: list[int]) -> None:
    plain = llama()
    model = packing.pack(copy.deepcopy(plain), MaskSet({}))
    cache = DynamicCache(config=model.config)
    ids, options, grad = TOKENS[:, :3], {}, case == "gradient"
    if case == "mask":
        options["attention_mask"] = torch.tensor([[0, 1, 1, 1]])
    elif case == "batch":
        ids = ids.repeat(2, 1)
    elif case == "hook":
        seen: list[int] = []
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    elif case == "trained":
        model.model.norm.requires_grad_(True)
        model.model.layers.requires_grad_(True)
    elif case == "double":
        model.double()
    with torch.no_grad():
        model(
            ids,
            past_key_values=cache,
            **({"attention_mask": torch.tensor([[0, 1, 1]])} if case == "mask" else {}),
        )
    hidden = model.model.embed_tokens(ids[:, -1:]).requires_grad_(grad)
    with (
        ops.backend("reference" if case == "reference" else "auto"),
        torch.set_grad_enabled(grad or case == "trained"),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
    ):
        y = model(inputs_embeds=hidden, past_key_values=cache, **options).logits
    assert not calls
    if case == "hook":
        assert len(seen) == 4
    if grad:
        assert torch.autograd.grad(y.sum(), hidden)[0].isfinite().all()


@pytest.mark.parametrize("case", ["part", "norm", "content", "precision"])
def test_what_is_changed_afterwards_is_seen(case: str, calls: list[int]) -> None:
    plain = llama() if case == "part" else plain_llama()
    model = packing.pack(copy.deepcopy(plain), MaskSet({}))
    logits(model)
    for each in (model, plain):
        for layer in each.model.layers:
            if case == "part":
                changed = layer.mlp.up_proj.panels
                groups = quantise_groups(torch.ones(changed.shape), torch.ones(96, 4, dtype=torch.bool))
                layer.mlp.up_proj = PackedGroupLinear(groups)
            elif case == "norm":
                layer.input_layernorm.weight = nn.Parameter(torch.full((64,), 2.0), requires_grad=False)
            elif case == "content":
                layer.mlp.up_proj.weight.data.mul_(-2)
                layer.self_attn.k_proj.weight.data = torch.ones(32, 64)
        if case == "precision":
            each.to(torch.bfloat16)
    before = len(calls)
    close = {"rtol": 0.1, "atol": 0.1} if case == "precision" else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(logits(model), logits(plain), **close)
    assert len(calls) == before + 8


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "gelu"}, {"mlp_bias": True}, {"attention_bias": True}, {"head_dim": 24}]
)
def test_layers_that_are_not_fused_call_their_parts(
    changes: dict[str, object], calls: list[int], attended: list[int]
) -> None:
    for plain in (llama(**changes), plain_llama(**changes)):
        model = packing.pack(copy.deepcopy(plain), MaskSet({}))
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-3, atol=1e-3)
    assert len(calls) == (16 if "head_dim" in changes else 0)
    assert len(calls) + len(attended) == 16


def test_other_attention_stays() -> None:
    eager = plain_llama()
    eager.set_attn_implementation("eager")
    model = packing.pack(eager, MaskSet({}))
    assert not any(isinstance(layer, OneTokenLayer) for layer in model.model.layers)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the attention of a token was a native call."""
    from zoo.llm.models import one_token

    seen: list[int] = []

    def counted(*args: object) -> torch.Tensor:
        seen.append(1)
        return one_token_ops.attend(*args)

    monkeypatch.setattr(one_token, "attend", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", [("dense",), ("packed", "dense", "packed"), ("panels", "packed", "dense")])
def test_layers_of_any_weights_decode_like_the_plain_ones(
    kinds: tuple[str, ...], dtype: torch.dtype, calls: list[int]
) -> None:
    plain = plain_llama()
    model = packing.pack(plain_llama(), MaskSet({}))
    names = [name for name, part in plain.model.layers.named_modules() if isinstance(part, nn.Linear)]
    for number, name in enumerate(names):
        linear, kind = plain.model.layers.get_submodule(name), kinds[number % len(kinds)]
        keep = torch.rand(linear.out_features, linear.in_features // 16) < 0.6
        if kind == "panels":
            packed: nn.Module = PackedGroupLinear(quantise_groups(linear.weight, keep))
            replace_module(plain.model.layers, name, copy.deepcopy(packed))
        elif kind == "packed":
            mask = torch.rand(linear.weight.shape) < 0.3
            linear.weight.data.mul_(mask)
            packed = SparseLinear.from_dense(linear, mask).requires_grad_(False)
        else:
            packed = copy.deepcopy(linear)
        replace_module(model.model.layers, name, packed)
    with ops.backend("native"):
        found = logits(model.to(dtype))
    assert len(calls) == 8 and found.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(found, logits(plain), rtol=1e-3, atol=1e-3)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(TOKENS, **options), plain.generate(TOKENS, **options))
    else:
        exact = logits(plain)
        error, allowed = ((each.float() - exact).norm() for each in (found, logits(plain.to(dtype))))
        assert float(error) <= 1.5 * float(allowed) < 0.2 * float(exact.norm())


@pytest.mark.parametrize("way", ["fused", "called"])
def test_thresholds_stay(
    way: str, calls: list[int], attended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "called":
        monkeypatch.setattr(serving, "SMALL", 0)
    plain = plain_llama()
    thresholds = {f"model.layers.{i}.mlp.act_fn": torch.rand(96) / 5 for i in (0, 1)}
    thresholds |= {f"model.layers.{i}.self_attn.q_proj": torch.tensor(0.5) for i in (0, 1)}
    plain = attach(plain, thresholds)
    model = pack_model(copy.deepcopy(plain))
    expected = logits(plain)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert len(calls if way == "fused" else attended) == 8 and not (attended if way == "fused" else calls)
    if way == "fused":
        attach(model, {name: value * 1e9 for name, value in thresholds.items()})
        assert not torch.allclose(logits(model), expected, rtol=1e-2)
    with counting_sparsity(model):
        logits(model)
    assert realised_sparsity(model)["model.layers.0.self_attn.q_proj.threshold"] > 0.1
    assert model.model.layers[0].self_attn.q_proj.threshold.seen == TOKENS.numel() * 64


def test_hooks_of_parts_are_called(calls: list[int], attended: list[int]) -> None:
    plain, seen = plain_llama(), []
    model = packing.pack(copy.deepcopy(plain), MaskSet({}))
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-3, atol=1e-3)
    assert len(seen) == 5 and len(attended) == len(calls) == 4


@pytest.mark.parametrize("part", ["self_attn", "input_layernorm", "post_attention_layernorm"])
def test_a_hook_on_a_part_that_would_not_be_called_goes_the_plain_way(part: str, attended: list[int]) -> None:
    plain = plain_llama()
    model = packing.pack(copy.deepcopy(plain), MaskSet({}))
    seen: list[int] = []
    for layer in model.model.layers:
        layer.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(logits(model), logits(plain))
    assert not attended and len(seen) == 10
