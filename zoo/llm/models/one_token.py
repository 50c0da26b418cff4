"""LLaMA layers of packed four-bit groups that decode one token in two native calls.

A layer whose seven projections are `PackedGroupLinear` becomes an `OneTokenLayer` when a model is packed. One
token of one sequence, with a cache and without a mask, goes through `zoo.shared.ops.decoder_layer`; all else
(prompts, batches, padding, gradients, hooks on a part of the layer) through transformers' own code, which is
the definition.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from zoo.llm.models.quantised import PackedGroupLinear
from zoo.shared.ops import packing
from zoo.shared.ops.decoder_layer import LayerWeights, layer_inputs, layer_outputs, runs_natively
from zoo.shared.ops.layout import VALUE_TYPES

_ATTENTION, _FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class OneTokenLayer(LlamaDecoderLayer):
    """A decoder layer with the parts of another one; made by `one_token_layer`."""

    weights: LayerWeights

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
        weights, x = self.weights, hidden_states.view(-1)
        cosine, sine = cast(tuple[Tensor, Tensor], position_embeddings)
        q, k, v = layer_inputs(x, weights, cosine.view(-1), sine.view(-1))
        shape = (1, -1, 1, weights.head)
        keys, values = past_key_values.update(k.view(shape), v.view(shape), self.self_attn.layer_idx)
        return layer_outputs(x, q, keys[0], values[0], weights).view(hidden_states.shape)

    def _undisturbed(self) -> bool:
        """Whether the parts are those that `weights` was made of, and nobody waits for one to be called."""
        weights: LayerWeights = self.weights
        parts: dict[str, Any] = self._modules
        own, ffn = parts["self_attn"]._modules, parts["mlp"]._modules
        projections = [own[name] for name in _ATTENTION] + [ffn[name] for name in _FFN]
        norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
        for part in (*projections, *norms, parts["self_attn"], parts["mlp"]):
            if part._forward_hooks or part._forward_pre_hooks:
                return False
        panels = (weights.q, weights.k, weights.v, weights.o, weights.gate, weights.up, weights.down)
        return (
            all(p.__dict__.get("panels") is each for p, each in zip(projections, panels, strict=True))
            and norms[0].weight.data_ptr() == weights.input_norm.data_ptr()
            and norms[1].weight.data_ptr() == weights.output_norm.data_ptr()
            and not nn.modules.module._has_any_global_hook()
        )


@packing.register_composite_packer
def one_token_layer(module: nn.Module) -> nn.Module | None:
    """The layer for decoding, which shares the parts of `module`; None for one that is another kind of layer
    or has other parts."""
    if type(module) is not LlamaDecoderLayer or module.self_attn.config._attn_implementation != "sdpa":
        return None
    projections: list[Any] = [getattr(module.self_attn, name) for name in _ATTENTION]
    projections += [getattr(module.mlp, name) for name in _FFN]
    if not all(isinstance(each, PackedGroupLinear) and each.bias is None for each in projections):
        return None
    norms: list[Any] = [module.input_layernorm, module.post_attention_layernorm]
    silu = torch.equal(module.mlp.act_fn(_PROBE), nn.functional.silu(_PROBE))
    same = norms[0].variance_epsilon == norms[1].variance_epsilon
    if not silu or not same or any(norm.weight.dtype not in VALUE_TYPES for norm in norms):
        return None
    layer: Any = copy.copy(module)
    layer.__class__ = OneTokenLayer
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
