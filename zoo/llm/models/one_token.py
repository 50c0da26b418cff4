"""LLaMA layers that decode one token without torch's operations between the products.

In a packed model a LLaMA layer becomes a `PartsLayer`, whose norms, rotation and attention are calls of
`zoo.shared.ops.one_token`, its projections and its FFN being whatever modules they are; or, where all seven
projections are `PackedGroupLinear`, a `PanelLayer`, two calls of `zoo.shared.ops.decoder_layer`. They take
one token of one sequence, with a cache and without a mask; all else (prompts, batches, padding, gradients,
hooks on a part that is not called) goes through transformers' own code, which is the definition.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from zoo.llm.models.quantised import PackedGroupLinear
from zoo.shared.masks import Mask
from zoo.shared.ops import packing
from zoo.shared.ops.decoder_layer import LayerWeights, layer_inputs, layer_outputs
from zoo.shared.ops.layout import VALUE_TYPES
from zoo.shared.ops.one_token import attend, normalise, rotate, runs_natively

_ATTENTION, _FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class OneTokenLayer(LlamaDecoderLayer):
    """A decoder layer with the parts of another one, which takes a token alone in a way of its own."""

    def forward(  # type: ignore[override]  # transformers' signature, of which it uses these
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        alone = hidden_states.shape[:2] == (1, 1) and attention_mask is None and not self.training
        whole = alone and past_key_values is not None and position_embeddings is not None
        if not whole or not runs_natively(hidden_states) or not self._undisturbed():
            y: Tensor = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **options,
            )
            return y
        cosine, sine = cast(tuple[Tensor, Tensor], position_embeddings)
        return self._token(hidden_states, past_key_values, cosine.view(-1), sine.view(-1))

    def _token(self, hidden_states: Tensor, cache: Any, cosine: Tensor, sine: Tensor) -> Tensor:
        raise NotImplementedError

    def _undisturbed(self) -> bool:
        raise NotImplementedError


class PartsLayer(OneTokenLayer):
    """A layer whose norms, rotation and attention are native calls, its other parts being called."""

    def _token(self, hidden_states: Tensor, cache: Any, cosine: Tensor, sine: Tensor) -> Tensor:
        shape, attention = hidden_states.shape, self.self_attn
        before, after = self.input_layernorm, self.post_attention_layernorm
        n = normalise(hidden_states.view(-1), before.weight, before.variance_epsilon).view(shape)
        q, k, v = attention.q_proj(n), attention.k_proj(n), attention.v_proj(n)
        q, k = rotate(q.view(-1), k.view(-1), cosine, sine)
        heads = (1, -1, 1, len(cosine))
        keys, values = cache.update(k.view(heads), v.view(heads), attention.layer_idx)
        attended = attend(q, keys[0], values[0], attention.scaling).view(1, 1, -1)
        h = hidden_states + attention.o_proj(attended)
        y: Tensor = h + self.mlp(normalise(h.view(-1), after.weight, after.variance_epsilon).view(shape))
        return y

    def _undisturbed(self) -> bool:
        """Whether nobody waits for a part to be called that is not."""
        return not nn.modules.module._has_any_global_hook() and not any(map(_hooked, self._passed_over()))

    def _passed_over(self) -> tuple[nn.Module, ...]:
        parts: Any = self._modules
        return parts["self_attn"], parts["input_layernorm"], parts["post_attention_layernorm"]


class PanelLayer(OneTokenLayer):
    """A layer of packed four-bit groups, made by `panel_layer`: a token is two native calls."""

    weights: LayerWeights

    def _token(self, hidden_states: Tensor, cache: Any, cosine: Tensor, sine: Tensor) -> Tensor:
        weights, x = self.weights, hidden_states.view(-1)
        q, k, v = layer_inputs(x, weights, cosine, sine)
        shape = (1, -1, 1, weights.head)
        keys, values = cache.update(k.view(shape), v.view(shape), self.self_attn.layer_idx)
        return layer_outputs(x, q, keys[0], values[0], weights).view(hidden_states.shape)

    def _undisturbed(self) -> bool:
        """Whether the parts are those that `weights` was made of, and nobody waits for one to be called."""
        weights: LayerWeights = self.weights
        parts: dict[str, Any] = self._modules
        own, ffn = parts["self_attn"]._modules, parts["mlp"]._modules
        projections = [own[name] for name in _ATTENTION] + [ffn[name] for name in _FFN]
        norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
        if any(map(_hooked, (*projections, *norms, parts["self_attn"], parts["mlp"]))):
            return False
        panels = (weights.q, weights.k, weights.v, weights.o, weights.gate, weights.up, weights.down)
        return (
            all(p.__dict__.get("panels") is each for p, each in zip(projections, panels, strict=True))
            and norms[0].weight.data_ptr() == weights.input_norm.data_ptr()
            and norms[1].weight.data_ptr() == weights.output_norm.data_ptr()
            and not nn.modules.module._has_any_global_hook()
        )


def _hooked(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks)


@packing.register_packer(LlamaDecoderLayer, masked=False)
def parts_layer(module: nn.Module, masks: Mapping[str, Mask]) -> nn.Module | None:
    """The layer for decoding, which shares the parts of `module`; None for attention of another kind."""
    if type(module) is not LlamaDecoderLayer or module.self_attn.config._attn_implementation != "sdpa":
        return None
    norms: list[Any] = [module.input_layernorm, module.post_attention_layernorm]
    if not all(type(norm) is LlamaRMSNorm and norm.weight.dtype in VALUE_TYPES for norm in norms):
        return None
    layer: Any = copy.copy(module)
    layer.__class__ = PartsLayer
    packed: nn.Module = layer
    return packed


@packing.register_composite_packer
def panel_layer(module: nn.Module) -> nn.Module | None:
    """The layer for decoding, which shares the parts of `module`; None for one that is another kind of layer
    or has other parts."""
    if type(module) is not PartsLayer:
        return None
    projections: list[Any] = [getattr(module.self_attn, name) for name in _ATTENTION]
    projections += [getattr(module.mlp, name) for name in _FFN]
    if not all(isinstance(each, PackedGroupLinear) and each.bias is None for each in projections):
        return None
    norms: list[Any] = [module.input_layernorm, module.post_attention_layernorm]
    silu = torch.equal(module.mlp.act_fn(_PROBE), nn.functional.silu(_PROBE))
    if not silu or norms[0].variance_epsilon != norms[1].variance_epsilon:
        return None
    layer: Any = copy.copy(module)
    layer.__class__ = PanelLayer
    panels: dict[str, Any] = {
        name.removesuffix("_proj"): each.panels
        for name, each in zip(_ATTENTION + _FFN, projections, strict=True)
    }
    layer.weights = LayerWeights(
        **panels,
        input_norm=norms[0].weight.detach(),
        output_norm=norms[1].weight.detach(),
        epsilon=norms[0].variance_epsilon,
        head=module.self_attn.head_dim,
        scale=module.self_attn.scaling,
    )
    packed: nn.Module = layer
    return packed


_PROBE = torch.linspace(-4, 4, 9)
