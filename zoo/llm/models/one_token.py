"""LLaMA layers that decode one token without torch's operations between the products.

In a packed model every LLaMA layer becomes an `OneTokenLayer`. One token of one sequence, with a cache and
without a mask, is two calls of `zoo.shared.ops.decoder_layer` where all seven projections are weights that it
knows (dense, with thresholds or without, packed, four-bit groups); where one is not, or someone waits for one
to be called, the projections and the FFN are called, and what lies between is `zoo.shared.ops.one_token`.
All else (prompts, batches, padding, gradients, hooks on norms) goes through transformers' own code, which is
the definition.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from zoo.llm.models.quantised import PackedGroupLinear
from zoo.llm.models.thresholds import ThresholdedActivation, ThresholdedLinear
from zoo.shared.masks import Mask
from zoo.shared.ops import packing
from zoo.shared.ops.decoder_layer import LayerWeights, layer_inputs, layer_outputs
from zoo.shared.ops.dispatch import runs_natively
from zoo.shared.ops.layout import VALUE_TYPES
from zoo.shared.ops.modules import LinearByRows, SparseLinear, WideningLinear
from zoo.shared.ops.one_token import attend, normalise, rotate
from zoo.shared.ops.sparse_linear import plan
from zoo.shared.ops.weights import SparseWeight

_ATTENTION, _FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class OneTokenLayer(LlamaDecoderLayer):
    """A decoder layer with the parts of another one, made by `one_token_layer`."""

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
        weights = self._weights()
        token = self._called if weights is None else functools.partial(self._fused, weights)
        return token(hidden_states, past_key_values, cosine.view(-1), sine.view(-1))

    def _fused(self, weights: LayerWeights, x: Tensor, cache: Any, cosine: Tensor, sine: Tensor) -> Tensor:
        row, heads = x.view(-1), (1, -1, 1, weights.head)
        q, k, v = layer_inputs(row, weights, cosine, sine)
        keys, values = cache.update(k.view(heads), v.view(heads), self.self_attn.layer_idx)
        return layer_outputs(row, q, keys[0], values[0], weights).view(x.shape)

    def _called(self, x: Tensor, cache: Any, cosine: Tensor, sine: Tensor) -> Tensor:
        attention, before, after = self.self_attn, self.input_layernorm, self.post_attention_layernorm
        n = normalise(x.view(-1), before.weight, before.variance_epsilon).view(x.shape)
        q, k, v = attention.q_proj(n), attention.k_proj(n), attention.v_proj(n)
        q, k = rotate(q.view(-1), k.view(-1), cosine, sine)
        heads = (1, -1, 1, len(cosine))
        keys, values = cache.update(k.view(heads), v.view(heads), attention.layer_idx)
        attended = attend(q, keys[0], values[0], attention.scaling).view(1, 1, -1)
        h = x + attention.o_proj(attended)
        y: Tensor = h + self.mlp(normalise(h.view(-1), after.weight, after.variance_epsilon).view(x.shape))
        return y

    def _undisturbed(self) -> bool:
        """Whether nobody waits for a part to be called that never is, or for gradients of a part."""
        parts: Any = self._modules
        passed_over = parts["self_attn"], parts["input_layernorm"], parts["post_attention_layernorm"]
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        return not (trains or nn.modules.module._has_any_global_hook() or any(map(_hooked, passed_over)))

    def _weights(self) -> LayerWeights | None:
        """The weights that the parts have now; None where they must be called."""
        parts: dict[str, Any] = self._modules
        own, ffn = parts["self_attn"]._modules, parts["mlp"]._modules
        if type(parts["mlp"]) is not LlamaMLP or _hooked(parts["mlp"]):
            return None
        projections = [own[name] for name in _ATTENTION] + [ffn[name] for name in _FFN]
        norms = parts["input_layernorm"], parts["post_attention_layernorm"]
        found = [_weight(each) for each in projections] + [norm._parameters["weight"] for norm in norms]
        gates = ffn["act_fn"]
        if any(each is None for each in found) or _counts(gates):
            return None
        found += [_threshold(each) for each in (*projections, gates)]
        kept: tuple[list[Any], LayerWeights | None] | None = self.__dict__.get("_kept")
        if kept is None or any(one is not other for one, other in zip(kept[0], found, strict=True)):
            kept = self._kept = found, self._join(found)
        return kept[1]

    def _join(self, found: list[Any]) -> LayerWeights | None:
        attention, norms = self.self_attn, (self.input_layernorm, self.post_attention_layernorm)
        epsilon, activation = norms[0].variance_epsilon, self.mlp.act_fn
        if isinstance(activation, ThresholdedActivation):
            activation = activation.activation
        silu = torch.equal(activation(_PROBE), nn.functional.silu(_PROBE))
        if not silu or norms[1].variance_epsilon != epsilon or not all(map(_skips_for_one_row, found)):
            return None
        names = [name.removesuffix("_proj") for name in (*_ATTENTION, *_FFN)]
        tensors: dict[str, Any] = dict(zip([*names, "input_norm", "output_norm"], found, strict=False))
        *thresholds, gates = found[len(tensors) :]
        return LayerWeights(
            **tensors,
            epsilon=epsilon,
            head=attention.head_dim,
            scale=attention.scaling,
            thresholds={name: t for name, t in zip(names, thresholds, strict=True) if t is not None},
            gate_threshold=gates,
        )


def _hooked(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks)


def _weight(part: Any) -> Any:
    """The weight of a projection as `LayerWeights` takes it; None for one that must be called."""
    kind, parameters = type(part), part._parameters
    if parameters.get("bias") is not None or part._buffers.get("bias") is not None or _counts(part):
        return None
    if kind in _DENSE:
        return parameters["weight"]
    return part.panels if kind is PackedGroupLinear else part.weight if kind is SparseLinear else None


def _threshold(part: Any) -> Tensor | None:
    """The threshold of a projection or an activation, if it has one."""
    kept = part._modules.get("threshold")
    return None if kept is None else kept._buffers["threshold"]


def _counts(part: Any) -> bool:
    """Whether someone waits for a part to be called, or counts what its threshold drops."""
    kept = part._modules.get("threshold")
    return _hooked(part) or (kept is not None and (kept.counting or _hooked(kept)))


def _skips_for_one_row(weight: Any) -> bool:
    """Whether a packed weight multiplies one row by what it keeps, and not by a dense copy."""
    if not isinstance(weight, SparseWeight):
        return True
    return plan(weight.values.new_empty(1, weight.shape[1]), weight).backend == "native"


# Each multiplies one row by the dense weight.
_DENSE = (nn.Linear, LinearByRows, WideningLinear, ThresholdedLinear)


@packing.register_packer(LlamaDecoderLayer, masked=False)
def one_token_layer(module: nn.Module, masks: Mapping[str, Mask]) -> nn.Module | None:
    """The layer for decoding, which shares the parts of `module`; None for attention of another kind."""
    if type(module) is not LlamaDecoderLayer or module.self_attn.config._attn_implementation != "sdpa":
        return None
    norms: list[Any] = [module.input_layernorm, module.post_attention_layernorm]
    if not all(type(norm) is LlamaRMSNorm and norm.weight.dtype in VALUE_TYPES for norm in norms):
        return None
    layer: Any = copy.copy(module)
    layer.__class__ = OneTokenLayer
    packed: nn.Module = layer
    return packed


_PROBE = torch.linspace(-4, 4, 9)
