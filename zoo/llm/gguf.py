"""`zoo export MODEL --to gguf`: LLaMA-like weights, dense, as llama.cpp and its like read them.

Written by the package `gguf` of llama.cpp, in half or single precision as the model is. Queries and keys are
stored with the two halves of their rotation interleaved, as that format wants it. transformers reads the file
back in a process of its own, and its logits are compared; llama.cpp itself is not run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zoo.bundles.interchange import CheckedExport
from zoo.errors import ConfigError
from zoo.llm.data.tokenization import tokenizer_of
from zoo.llm.models.thresholds import thresholds_of

#: transformers' model type -> architecture of the format, and whether queries and keys are interleaved there.
ARCHITECTURES = {"llama": ("LLAMA", True), "mistral": ("LLAMA", True), "qwen2": ("QWEN2", False)}


class ExportGguf(CheckedExport):
    """Write a language model as GGUF, for llama.cpp."""

    suffix = ".gguf"
    run_alone = """
import os
from transformers import AutoModelForCausalLM
name = os.path.basename(file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
outputs = [model(input_ids=case[0], use_cache=False).logits.detach() for case in cases]
"""

    def write_file(self, function: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
        try:
            import gguf
        except ModuleNotFoundError as error:
            raise ConfigError("gguf is not installed. Run: pip install 'sparse-model-zoo[gguf]'") from error
        model: Any = getattr(function, "model", function)
        config = getattr(model, "config", None)
        name, interleaved = ARCHITECTURES.get(getattr(config, "model_type", ""), ("", False))
        if config is None or not name:
            raise ConfigError(
                f"GGUF is written of {', '.join(ARCHITECTURES)}; received {type(model).__name__}"
            )
        if thresholds_of(model) or not isinstance(config.intermediate_size, int):
            raise ConfigError(
                "GGUF has no form for thresholds on activations, nor for FFNs of unequal widths"
            )
        kind = getattr(gguf.MODEL_ARCH, name)
        writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[kind])
        _describe(writer, model, config)
        _add_tokenizer(writer, model)
        names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for own, tensor in model.state_dict().items():
            if own == "lm_head.weight" and config.tie_word_embeddings:
                continue
            theirs = names.get_name(own, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise ConfigError(f"GGUF has no name for {own!r} of a {type(model).__name__}")
            count = heads.get(own.split(".")[-2]) if interleaved else None
            writer.add_tensor(theirs, interleave(tensor, count).numpy() if count else tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection whose halves of a head rotate together, as pairs: first, middle, second, ..."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _describe(writer: Any, model: nn.Module, config: Any) -> None:
    writer.add_name(type(model).__name__)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", 1e4)}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"GGUF is written of plain rotations; received {rope['rope_type']}")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, model: nn.Module) -> None:
    """Byte-level BPE, as that of the zoo's models.

    Raises:
        ConfigError: another kind of tokenizer.
    """
    tokenizer = tokenizer_of(model)
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    before = stored.get("pre_tokenizer") or {}
    steps = [step["type"] for step in before.get("pretokenizers", [before])]
    kinds = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
    if stored["model"]["type"] != "BPE" or tuple(steps) not in kinds:
        raise ConfigError(
            f"GGUF is written with byte-level BPE; this tokenizer is {stored['model']['type']} after {steps}"
        )
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    special = {one["id"] for one in stored["added_tokens"] if one["special"]}
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    usual, control, unused = 1, 3, 5  # llama.cpp's types of tokens
    types = [control if n in special else usual if n in by_id else unused for n in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kinds[tuple(steps)])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = stored["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    for name in ("bos", "eos"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
