"""Language models of the zoo: built from a card, or loaded from a transformers folder or hub id.

All are transformers' own classes, so that `generate`, the KV cache, batching, `save_pretrained` and
`torch.compile` are transformers'. What a method keeps beside the weights (thresholds, a tokenizer) comes back
through `EXTRAS`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from zoo.errors import ConfigError
from zoo.llm.data.tokenization import packaged, remember, tokenizer_in
from zoo.llm.models import one_token as one_token  # which tells `pack` of its layers
from zoo.llm.models.blocks import find_blocks
from zoo.llm.models.quantised import group_arguments, with_empty_groups

#: First part of an extra tensor's name -> "module:function". When a bundle with extras `first/rest` is
#: loaded, function(model, {rest: tensor}) puts them where the model uses them (thresholds, groups, ...).
EXTRAS = {
    "generation": "zoo.llm.generate:take_extras",
    "thresholds": "zoo.llm.models.serving:take_extras",
    "tokenizer": "zoo.llm.data.tokenization:take_extras",
}

_NAMES = {"zoo_tokenizer", "_name_or_path", "torch_dtype"}
MAX_LAYERS = 4096  # no model has as many; a card may say any number

# Fields of every configuration that say how a model was stored or is run, not what it is.
_NO_SIZES = {"transformers_version", "architectures", "return_dict", "dtype", "problem_type"}


def llama(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int | Sequence[int],
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    context: int = 512,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-5,
    tied: bool = True,
    tokenizer: str | None = None,
    bos: int | None = 0,
    eos: int | None = 0,
    quantised: Mapping[str, Any] | None = None,
) -> LlamaForCausalLM:
    """A LLaMA decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU; architecture `llm/llama`.

    Args:
        vocab_size: tokens of the tokenizer.
        hidden_size: d, width of the residual stream.
        intermediate_size: f, width of the FFN; one number, or one for each layer of a model that was cut.
        layers: decoder layers.
        heads: query heads; d / heads is the width of a head.
        kv_heads: key and value heads, which divide the query heads; by default as many as these.
        context: longest sequence.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of RMSNorm.
        tied: whether the output layer is the embedding.
        tokenizer: name of a packaged tokenizer; None where the bundle's extras hold one.
        bos, eos: ids that begin and end a text.
        quantised: `group` and `kept` of a model whose blocks keep their linear weights in four-bit groups (
            see `zoo.llm.models.quantised.with_empty_groups`); None for plain weights.

    Raises:
        ConfigError: widths that do not divide, a wrong number of FFN widths, a tokenizer that does not fit.
    """
    if not 1 <= layers <= MAX_LAYERS:
        raise ConfigError(f"layers must lie between 1 and {MAX_LAYERS}, received {layers}.")
    widths = [intermediate_size] * layers if isinstance(intermediate_size, int) else list(intermediate_size)
    if len(widths) != layers or min(widths) < 1:
        raise ConfigError(
            f"intermediate_size must give a positive width for each of {layers} layers: {widths}."
        )
    groups = heads if kv_heads is None else kv_heads
    if hidden_size % heads or heads % groups or (hidden_size // heads) % 2:
        raise ConfigError(
            f"heads ({heads}) must divide hidden_size ({hidden_size}) into even widths, and kv_heads "
            f"({groups}) heads."
        )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=max(widths),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=context,
        rms_norm_eps=norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tied,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    for layer, width in zip(model.model.layers, widths, strict=True):
        if width != config.intermediate_size:
            layer.mlp.gate_proj = nn.Linear(hidden_size, width, bias=False)
            layer.mlp.up_proj = nn.Linear(hidden_size, width, bias=False)
            layer.mlp.down_proj = nn.Linear(width, hidden_size, bias=False)
            layer.mlp.intermediate_size = width
    if quantised is not None:
        with_empty_groups(model, **quantised)
    return _with_extras(model, tokenizer)


def from_config(config: Mapping[str, Any], tokenizer: str | None = None) -> PreTrainedModel:
    """Any transformers causal LM from its configuration; architecture `llm/transformers`.

    Args:
        config: transformers' configuration as plain values, `model_type` included (`config_arguments`).
        tokenizer: name of a packaged tokenizer; None where the bundle's extras hold one.

    Raises:
        ConfigError: transformers knows no such model type, or a field is not one of the model's own: others
            name code to be fetched (attention kernels, `auto_map`).
    """
    fields = dict(config)
    kind = fields.pop("model_type", None)
    known = _own_fields(_config_class(kind))
    if foreign := sorted(fields.keys() - known):
        raise ConfigError(
            f"the configuration of a {kind} has no field {foreign[0]!r} that a card may set. Take it out."
        )
    try:
        made = AutoConfig.for_model(kind, **fields)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(made, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"transformers builds no causal LM of model_type {kind!r}: {_first_line(error)}"
        ) from error
    return _with_extras(model, tokenizer)


def _config_class(kind: object) -> Any:
    try:
        return type(AutoConfig.for_model(kind))  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"transformers builds no causal LM of model_type {kind!r}: {_first_line(error)}"
        ) from error


def _own_fields(config_class: Any) -> set[str]:
    """The fields by which a configuration says what the model is."""
    # Families without a field for the width of a head take it all the same.
    return {field.name for field in dataclasses.fields(config_class)} - _NO_SIZES | {"head_dim"}


def architecture_of(model: nn.Module) -> dict[str, Any]:
    """Name and arguments of the architecture for a card: what builds this model again.

    Raises:
        ConfigError: not a transformers model.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or config is None:
        raise ConfigError(
            f"{type(model).__name__} is no transformers model; its architecture cannot be written down."
        )
    name = getattr(config, "zoo_tokenizer", None)
    if type(model) is LlamaForCausalLM and _is_plain(config):
        widths = [block.gate.out_features for block in find_blocks(model)]
        quantised = group_arguments(model)
        return {
            "name": "llm/llama",
            "args": {
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "intermediate_size": widths[0] if len(set(widths)) == 1 else widths,
                "layers": config.num_hidden_layers,
                "heads": config.num_attention_heads,
                "kv_heads": config.num_key_value_heads,
                "context": config.max_position_embeddings,
                "rope_theta": float(config.rope_parameters["rope_theta"]),
                "norm_eps": config.rms_norm_eps,
                "tied": config.tie_word_embeddings,
                "tokenizer": name,
                "bos": config.bos_token_id,
                "eos": config.eos_token_id,
                **({"quantised": quantised} if quantised else {}),
            },
        }
    fields = config.to_diff_dict()
    own = _own_fields(type(config))
    plain = {key: value for key, value in fields.items() if key in own or key == "model_type"}
    again = AutoConfig.for_model(**plain).to_diff_dict()
    # What the family has no field for (a note of the user's, say) cannot matter to its network.
    lost = {key for key in (fields.keys() & own) - _NO_SIZES - _NAMES if again.get(key) != fields[key]}
    if lost:
        raise ConfigError(f"the configuration's {sorted(lost)[0]!r} cannot be written down; set its default.")
    return {"name": "llm/transformers", "args": {"config": plain, "tokenizer": name}}


def load_pretrained(
    source: str | os.PathLike[str], dtype: torch.dtype | str = torch.float32, tokenizer: bool = True
) -> PreTrainedModel:
    """A causal LM from a local transformers folder or a hub id, in eval mode on the CPU.

    Weights are read from safetensors only, and no code of the repository is run. Offline (`ZOO_OFFLINE=1` or
    `HF_HUB_OFFLINE=1`) only what is in the cache is found.

    Args:
        source: folder written by `save_pretrained`, or `owner/name` on the hub.
        dtype: precision of the weights in memory; "auto" for that of the file.
        tokenizer: whether to load the tokenizer from the same place, for `tokenizer_of`.

    Raises:
        ConfigError: nothing there, no safetensors, an architecture that transformers does not know, or a
            tokenizer that does not fit.
    """
    offline = "1" in (os.environ.get("ZOO_OFFLINE"), os.environ.get("HF_HUB_OFFLINE"))
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ConfigError(f"{source} has no config.json: give a folder that save_pretrained wrote.")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(source), dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=offline
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"{source} cannot be loaded as a causal LM from safetensors: {_first_line(error)}. Give a folder "
            "that save_pretrained wrote, or a hub id; ask the hub with ZOO_OFFLINE unset."
        ) from error
    model = _with_extras(model.eval(), getattr(model.config, "zoo_tokenizer", None))
    if tokenizer and getattr(model.config, "zoo_tokenizer", None) is None:
        remember(model, tokenizer_in(source, offline))
    return model


def load_extras(model: nn.Module, extras: Mapping[str, Tensor]) -> None:
    """Hand a bundle's extra tensors to those that know them; see `EXTRAS`."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in extras.items():
        first, _, rest = name.partition("/")
        grouped.setdefault(first, {})[rest] = tensor
    for first, tensors in grouped.items():
        if first in EXTRAS:
            module, _, function = EXTRAS[first].partition(":")
            getattr(importlib.import_module(module), function)(model, tensors)


def _with_extras(model: Any, tokenizer: str | None) -> Any:
    """Give a model what the zoo asks of one: `load_extras`, and the name of its packaged tokenizer."""
    if tokenizer is not None:
        found = packaged(tokenizer)
        if len(found) > model.config.vocab_size:
            raise ConfigError(
                f"The tokenizer {tokenizer!r} has {len(found)} tokens, the model {model.config.vocab_size}: "
                "it does not fit. Give the tokenizer that the model was trained with."
            )
        model.config.zoo_tokenizer = tokenizer
    model.load_extras = functools.partial(load_extras, model)
    return model


def _is_plain(config: Any) -> bool:
    """Whether `llama`'s arguments say all that this configuration says."""
    return bool(
        config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and not config.attention_dropout
        and config.head_dim == config.hidden_size // config.num_attention_heads
        and config.rope_parameters.get("rope_type") == "default"
        and isinstance(config.eos_token_id, (int, type(None)))
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
