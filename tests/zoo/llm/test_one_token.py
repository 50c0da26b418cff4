"""Layers that decode one token in native calls: the same logits and text as transformers' own layers, and
these wherever someone must see more."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import zoo
from zoo.llm.models.one_token import OneTokenLayer, PanelLayer, PartsLayer
from zoo.llm.models.quantised import PackedGroupLinear, replace_module
from zoo.llm.models.serving import pack_model
from zoo.llm.models.thresholds import attach
from zoo.shared import ops
from zoo.shared.masks import MaskSet
from zoo.shared.ops import _native, decoder_layer, packing, quantise_groups
from zoo.shared.ops import one_token as one_token_ops

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
    assert all(type(layer) is PanelLayer for layer in model.model.layers)
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
    "case", ["mask", "autocast", "batch", "hook", "gradient", "reference", "double", "part", "norm"]
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
    elif case == "double":
        model.double()
    elif case == "part":
        for each in (model, plain):
            for layer in each.model.layers:
                changed = layer.mlp.up_proj.panels
                layer.mlp.up_proj = PackedGroupLinear(
                    quantise_groups(torch.ones(changed.shape), torch.ones(96, 4, dtype=torch.bool))
                )
    elif case == "norm":
        for each in (model, plain):
            for layer in each.model.layers:
                layer.input_layernorm.weight = nn.Parameter(torch.full((64,), 2.0), requires_grad=False)
    with torch.no_grad():
        model(
            ids,
            past_key_values=cache,
            **({"attention_mask": torch.tensor([[0, 1, 1]])} if case == "mask" else {}),
        )
    hidden = model.model.embed_tokens(ids[:, -1:]).requires_grad_(grad)
    with (
        ops.backend("reference" if case == "reference" else "auto"),
        torch.set_grad_enabled(grad),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
    ):
        y = model(inputs_embeds=hidden, past_key_values=cache, **options).logits
    assert not calls
    if case in ("part", "norm"):
        torch.testing.assert_close(logits(model), logits(plain))
    if case == "hook":
        assert len(seen) == 4
    if grad:
        assert torch.autograd.grad(y.sum(), hidden)[0].isfinite().all()


def test_other_layers_stay() -> None:
    for changes in ({"hidden_act": "gelu"}, {"mlp_bias": True}, {"attention_bias": True}):
        model = packing.pack(llama(**changes), MaskSet({}))
        assert not any(isinstance(layer, PanelLayer) for layer in model.model.layers)
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


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 24}])
def test_layers_of_any_weights_decode_like_the_plain_ones(
    changes: dict[str, object], attended: list[int]
) -> None:
    plain = plain_llama(**changes)
    model = copy.deepcopy(plain)
    masks = zoo.sparsify(model, sparsity=0.75)
    for name, mask in masks.items():
        plain.get_parameter(name).mul_(mask.keep)
    model = packing.pack(model, masks)
    assert all(type(layer) is PartsLayer for layer in model.model.layers)
    found = logits(model)
    assert len(attended) == 8
    torch.testing.assert_close(found, logits(plain), rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **options), plain.generate(TOKENS, **options))


def test_thresholds_and_hooks_of_called_parts_stay(attended: list[int]) -> None:
    plain = plain_llama()
    thresholds = {f"model.layers.{i}.mlp.act_fn": torch.full((96,), 0.05) for i in (0, 1)}
    thresholds |= {f"model.layers.{i}.self_attn.q_proj": torch.tensor(0.3) for i in (0, 1)}
    plain = attach(plain, thresholds)
    model = pack_model(copy.deepcopy(plain))
    seen: list[int] = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-3, atol=1e-3)
    assert len(attended) == 8 and len(seen) == 5


@pytest.mark.parametrize("part", ["self_attn", "input_layernorm", "post_attention_layernorm"])
def test_a_hook_on_a_part_that_would_not_be_called_goes_the_plain_way(part: str, attended: list[int]) -> None:
    plain = plain_llama()
    model = packing.pack(copy.deepcopy(plain), MaskSet({}))
    seen: list[int] = []
    for layer in model.model.layers:
        layer.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(logits(model), logits(plain))
    assert not attended and len(seen) == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_as_near_to_single_precision_as_the_plain_layers(
    dtype: torch.dtype, attended: list[int]
) -> None:
    exact, plain = logits(plain_llama()), plain_llama().to(dtype)
    found = logits(packing.pack(copy.deepcopy(plain), MaskSet({})))
    assert found.dtype == dtype and len(attended) == 8
    error, allowed = ((each.float() - exact).norm() for each in (found, logits(plain)))
    assert float(error) <= 1.5 * float(allowed) < 0.2 * float(exact.norm())
