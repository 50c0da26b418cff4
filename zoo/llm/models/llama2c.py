"""Reads a llama2.c checkpoint (version 0) and its tokenizer into transformers.

The file holds seven int32 (dim, hidden, layers, heads, kv heads, vocabulary, context; a negative vocabulary
says that the output layer is not the embedding), then float32 arrays: embedding, and for all layers the
attention norms, wq, wk, wv, wo, the FFN norms, w1 (gate), w2 (down), w3 (up), then the final norm and two
rotary tables that follow from the sizes, then the output layer if it is its own.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from zoo.errors import ConfigError, DataError, MissingDataError
from zoo.llm.data.tokenization import remember, score_bpe
from zoo.llm.models import llama

_HEADER = struct.Struct("<7i")


def read_llama2c(
    checkpoint: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None
) -> LlamaForCausalLM:
    """The model of a llama2.c file, in float32 and eval mode, with its tokenizer.

    Args:
        checkpoint: the version-0 `.bin` file.
        tokenizer: the `tok*.bin` file; None leaves the model without one.

    Raises:
        DataError: a file that is missing, is not of this format, or has another length than its sizes say.
    """
    path = Path(checkpoint)
    content = _read(path)
    if len(content) < _HEADER.size:
        raise DataError(f"{path} is too short for a llama2.c checkpoint ({len(content)} bytes).")
    dim, hidden, layers, heads, kv_heads, signed_vocab, context = _HEADER.unpack_from(content)
    vocab, tied = abs(signed_vocab), signed_vocab > 0
    if min(dim, hidden, layers, heads, kv_heads, vocab, context) < 1 or dim % heads or heads % kv_heads:
        raise DataError(
            f"{path} is no llama2.c checkpoint of version 0: its header reads {content[:28].hex()}."
        )
    head = dim // heads
    shapes = {
        "embed_tokens": (vocab, dim),
        "input_layernorm": (layers, dim),
        "self_attn.q_proj": (layers, dim, dim),
        "self_attn.k_proj": (layers, kv_heads * head, dim),
        "self_attn.v_proj": (layers, kv_heads * head, dim),
        "self_attn.o_proj": (layers, dim, dim),
        "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, hidden, dim),
        "mlp.down_proj": (layers, dim, hidden),
        "mlp.up_proj": (layers, hidden, dim),
        "norm": (dim,),
        "rotary": (2, context, head // 2),
    } | ({} if tied else {"lm_head": (vocab, dim)})
    wanted = _HEADER.size + 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    if len(content) != wanted:
        raise DataError(f"{path} has {len(content)} bytes; a llama2.c checkpoint of its sizes has {wanted}.")
    arrays, offset = {}, _HEADER.size
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        array = np.frombuffer(content, "<f4", count, offset).reshape(shape)
        arrays[name], offset = torch.from_numpy(array.copy()), offset + 4 * count
    try:
        with torch.random.fork_rng(devices=[]):
            model = llama(
                vocab, dim, hidden, layers, heads, kv_heads, context=context, tied=tied, bos=1, eos=2
            )
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from error
    model.load_state_dict(_state(arrays, layers, heads, kv_heads), strict=True)
    if tokenizer is not None:
        remember(model, read_tokenizer(tokenizer, vocab))
    return model.eval()


def read_tokenizer(path: str | os.PathLike[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a llama2.c `tok*.bin` file.

    It holds an int32 (the longest token), then float32 score, int32 length and bytes of each token.

    Raises:
        DataError: the file is missing or does not hold exactly `vocab_size` tokens.
    """
    content = _read(Path(path))
    pieces, offset = [], 4
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", content, offset)
            offset += 8
            if not 0 <= length <= len(content) - offset:
                raise struct.error(f"a token of {length} bytes at {offset}")
            pieces.append((content[offset : offset + length], score))
            offset += length
    except struct.error as error:
        raise DataError(f"{path} is no llama2.c tokenizer of {vocab_size} tokens: {error}.") from error
    if offset != len(content):
        raise DataError(
            f"{path} has {len(content) - offset} bytes after {vocab_size} tokens: it is another model's."
        )
    return score_bpe(pieces)


def _state(arrays: dict[str, Tensor], layers: int, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """transformers' names; rotary pairs are neighbours here and half a head apart there."""
    embedding = arrays.pop("embed_tokens")
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": arrays.pop("norm")}
    state["lm_head.weight"] = arrays.pop("lm_head", embedding)
    arrays.pop("rotary")
    for name, stacked in arrays.items():
        for layer in range(layers):
            weight = stacked[layer]
            if name.endswith("q_proj"):
                weight = _halves(weight, heads)
            elif name.endswith("k_proj"):
                weight = _halves(weight, kv_heads)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    return state


def _halves(weight: Float[Tensor, "out d"], heads: int) -> Float[Tensor, "out d"]:
    """Reorder the rows of each head from (0, 1), (2, 3), ... to even rows before odd rows."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingDataError(
            f"{path} cannot be read: {error.strerror}. Set ZOO_DATA to the folder of the data."
        ) from error
