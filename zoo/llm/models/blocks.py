"""The parts of a decoder by name: what every method of this domain works on.

Llama, Mistral, Qwen 2 and 3, Gemma and their kin differ in norms, biases and rotary tables, but all have
`q_proj`, `k_proj`, `v_proj`, `o_proj` and a gated FFN y = W_down (act(W_gate x) * W_up x) of `gate_proj`,
`up_proj`, `down_proj`. That is what is looked for; no class is named, so that a new family needs no code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from zoo.errors import ConfigError
from zoo.shared.pruning.inventory import EXPERTS, inventory

_FFN = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        name: of `layer` in the model, e.g. `model.layers.0`.
        layer: the whole layer; its input and output are the residual stream [batch, tokens, d].
        attention: the module with q, k, v and o.
        mlp: the module with gate, up and down.
        q, k, v, o: projections of the attention: nn.Linear with weights [out, in], or what took its place.
        gate, up, down: projections of the FFN; gate and up [f, d], down [d, f].
        attention_name, mlp_name: names of the two modules in the model.
    """

    name: str
    layer: nn.Module
    attention: nn.Module
    mlp: nn.Module
    attention_name: str
    mlp_name: str

    q: Any
    k: Any
    v: Any
    o: Any
    gate: Any
    up: Any
    down: Any

    @property
    def activation(self) -> Any:
        """The function between gate and product: SiLU in Llama, tanh-GELU in Gemma."""
        return self.mlp.act_fn

    def linears(self) -> Iterator[tuple[str, Any]]:
        """The seven projections with their names in the model, in the order in which they run."""
        for letter, attribute in zip("qkvo", _ATTENTION, strict=True):
            yield f"{self.attention_name}.{attribute}", getattr(self, letter)
        for attribute in _FFN:
            yield f"{self.mlp_name}.{attribute}", getattr(self, attribute.removesuffix("_proj"))

    def weight_names(self) -> list[str]:
        """Names of the seven weights in the model."""
        return [f"{name}.weight" for name, _ in self.linears()]


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder layers of a causal language model, in order.

    Args:
        model: any model with a stack of layers whose FFN is gated; of a vision-language model the language
            part. Projections may be `nn.Linear` or modules that took their place.

    Raises:
        ConfigError: there is no stack of layers, or a layer whose FFN is not gated (GPT-2, OPT), is fused
            into one matrix (Phi-3) or is a mixture of experts; the message names it.
    """
    stack_name, stack = _layers(model)
    blocks = []
    for index, layer in enumerate(stack):
        name = f"{stack_name}.{index}"
        if experts := [weight.name for weight in inventory(layer).weights if weight.kind == EXPERTS]:
            raise ConfigError(
                f"The FFN of {type(model).__name__} ({name}, {type(layer).__name__}) is a mixture of fused "
                f"experts ({experts[0]}), where a gated FFN of three linear layers is needed; wanda, "
                "sparsegpt, ecoflap and prune take it."
            )
        mlp_name, mlp = _holder(model, name, layer, _FFN, "FFN")
        attention_name, attention = _holder(model, name, layer, _ATTENTION, "attention")
        if not callable(getattr(mlp, "act_fn", None)):
            raise ConfigError(
                f"{mlp_name} ({type(mlp).__name__}) names no activation act_fn between gate and up."
            )
        parts = {part.removesuffix("_proj"): getattr(attention, part) for part in _ATTENTION}
        parts |= {part.removesuffix("_proj"): getattr(mlp, part) for part in _FFN}
        blocks.append(Block(name, layer, attention, mlp, attention_name, mlp_name, **parts))
    return blocks


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of layers and its name in the model."""
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else model
    names = {id(module): name for name, module in model.named_modules()}
    for candidate in (decoder, model):
        lists = [
            module
            for module in (candidate.modules() if isinstance(candidate, nn.Module) else ())
            if isinstance(module, nn.ModuleList) and len(module) > 0 and id(module) in names
        ]
        if lists:
            # Outer lists come first in modules(); the decoder's own stack is the first one.
            return names[id(lists[0])], lists[0]
    raise ConfigError(
        f"{type(model).__name__} has no stack of decoder layers. Give a transformers causal LM with a "
        "gated FFN: Llama, Mistral, Qwen2, Qwen3, Gemma."
    )


def _holder(
    model: nn.Module, layer_name: str, layer: nn.Module, wanted: tuple[str, ...], what: str
) -> tuple[str, nn.Module]:
    """The one submodule of a layer that has all the wanted projections."""
    found = [
        (name, module)
        for name, module in layer.named_modules()
        if all(isinstance(getattr(module, attribute, None), nn.Module) for attribute in wanted)
    ]
    if len(found) == 1:
        name, module = found[0]
        return (f"{layer_name}.{name}" if name else layer_name), module
    why = (
        f"is a mixture of {len(found)} FFNs, of which a dense decoder has one"
        if found
        else f"has no {', '.join(wanted)}"
    )
    raise ConfigError(
        f"The {what} of {type(model).__name__} ({layer_name}, {type(layer).__name__} with "
        f"{_children(layer)}) {why}. Give a causal LM with a gated FFN: Llama, Mistral, Qwen2, Qwen3, Gemma."
    )


def _children(layer: nn.Module) -> str:
    """Names of a layer's matrices, for messages."""
    names = [name for name, module in layer.named_modules() if name and not list(module.children())]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
