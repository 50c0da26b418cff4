"""Tokenizers: packaged ones that many bundles share, and foreign ones that a bundle carries.

A packaged tokenizer is a file of the `tokenizers` library beside this module, named by the architecture's
argument. A foreign one lies in the bundle's extras as the bytes of the same JSON. Neither runs code.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from zoo.errors import ConfigError, UnknownNameError
from zoo.llm.data import corpus
from zoo.names import suggestion

END = "<|endoftext|>"  # begins and ends a document; id 0 of the packaged tokenizers
_SETTINGS = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "clean_up_tokenization_spaces",
    "chat_template",
)


def tokenizer_of(model: nn.Module) -> PreTrainedTokenizerFast:
    """The tokenizer that belongs to a model of the zoo or of `load_pretrained`.

    Raises:
        ConfigError: the model has none, or one with more tokens than the model.
    """
    known = model.__dict__.get("zoo_tokenizer")
    config = getattr(model, "config", None)
    if known is None and (name := getattr(config, "zoo_tokenizer", None)) is not None:
        known = packaged(name)
    if known is None:
        raise ConfigError(
            f"{type(model).__name__} has no tokenizer, which methods and data of language models "
            "need. If it is one, load it with zoo.load or zoo.llm.load_pretrained, or give it one: "
            "zoo.llm.data.tokenization.remember(model, tokenizer)."
        )
    return known


def remember(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make `tokenizer` the one that `tokenizer_of(model)` finds.

    Raises:
        ConfigError: it has tokens that the model has no embedding for.
    """
    size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    if len(tokenizer) > size:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {size}: it does not fit. Give the "
            "tokenizer that the model was trained with."
        )
    model.__dict__["zoo_tokenizer"] = tokenizer


def folder() -> Path:
    """Where the packaged tokenizers lie."""
    return Path(__file__).parent / "tokenizers"


@functools.cache
def packaged(name: str) -> PreTrainedTokenizerFast:
    """A packaged tokenizer.

    Raises:
        UnknownNameError: there is none of that name.
    """
    path = folder() / f"{name}.json"
    if not path.is_file() or path.parent != folder():
        names = [file.stem for file in folder().glob("*.json")]
        raise UnknownNameError(f"Unknown tokenizer {name!r}. {suggestion(name, names)}")
    return wrap(Tokenizer.from_file(str(path)))


#: Packaged tokenizer -> the text whose training documents it was made from, and its size.
TOKENIZERS = {"shakespeare": ("embedded", 1024), "stories": ("tinystories", 2048)}


def make_tokenizer(name: str) -> Tokenizer:
    """The packaged tokenizer of that name, made again from its training documents."""
    text, size = TOKENIZERS[name]
    return train_bpe(corpus(text).train, size)


def wrap(tokenizer: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    """transformers' interface to a tokenizer; by default `END` begins, ends and pads."""
    defaults: dict[str, Any] = {"bos_token": END, "eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(settings or defaults))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: lossless on any text, words with their leading space, digits one by one.

    Args:
        texts: documents to count pairs in; training text only.
        vocab_size: tokens, of which 256 are bytes and one is `END`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def score_bpe(pieces: list[tuple[bytes, float]]) -> PreTrainedTokenizerFast:
    """The tokenizer of SentencePiece's BPE: <s>, a leading space, characters, then the merge of best score.

    Args:
        pieces: text and score of each token in order of the ids; ids 0 to 2 are unk, bos, eos, ids 3 to 258
            the bytes.
    """
    names = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    names += [piece.decode("utf-8").replace(" ", "▁") for piece, _ in pieces[259:]]
    ids = {name: index for index, name in enumerate(names)}
    if len(ids) != len(pieces):
        raise ConfigError(f"The tokenizer file holds {len(pieces)} tokens, of which {len(ids)} differ.")
    merges = [
        (-pieces[index][1], name[:cut], name[cut:])
        for name, index in ids.items()
        if index > 258
        for cut in range(1, len(name))
        if name[:cut] in ids and name[cut:] in ids
    ]
    ranked = [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])]
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=ranked, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokenizer_in(source: str | os.PathLike[str], offline: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of a transformers folder or hub id.

    Raises:
        ConfigError: there is none, or one that would need code of its own.
    """
    try:
        found = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, local_files_only=offline)
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{source} holds no tokenizer that transformers reads: {text}. Save one there with "
            "save_pretrained, or load with tokenizer=False."
        ) from error
    if not isinstance(found, PreTrainedTokenizerFast):
        raise ConfigError(f"{source} has a tokenizer in Python ({type(found).__name__}). Give a fast one.")
    return found


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def first_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What stands before a text: the token that begins one, else the one that ends one."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    return []


def token_stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Int[Tensor, " n"]:
    """All documents one after the other, each begun by the tokenizer's first token."""
    start, ids = first_tokens(tokenizer), list[int]()
    for document in documents:
        ids += [*start, *encode(tokenizer, document)]
    return torch.tensor(ids, dtype=torch.long)


def to_extras(tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """A tokenizer as a bundle's extra tensors.

    Raises:
        ConfigError: a tokenizer in Python, which has no file of the `tokenizers` library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} is written in Python and cannot be stored. Give a fast one."
        )
    settings = {
        key: value for key in _SETTINGS if (value := _plain(getattr(tokenizer, key, None))) is not None
    }
    return {
        "tokenizer/json": _bytes_to_tensor(backend.to_str().encode()),
        "tokenizer/settings": _bytes_to_tensor(json.dumps(settings).encode()),
    }


def take_extras(model: nn.Module, extras: Mapping[str, Tensor]) -> None:
    """Give a loaded model the tokenizer of its bundle; see `to_extras`.

    Raises:
        ConfigError: what is stored is no tokenizer, or does not fit the model.
    """
    try:
        tokenizer = Tokenizer.from_str(_tensor_to_bytes(extras["json"]).decode())
        settings = json.loads(_tensor_to_bytes(extras["settings"]))
    except Exception as error:  # the library raises bare Exception for JSON that it does not know
        raise ConfigError(f"The stored tokenizer cannot be read: {error}. Save the bundle again.") from error
    remember(model, wrap(tokenizer, **{key: settings[key] for key in _SETTINGS if key in settings}))


def _plain(value: Any) -> str | bool | None:
    return value if isinstance(value, (bool, type(None))) else str(value)


def _bytes_to_tensor(content: bytes) -> UInt8[Tensor, " n"]:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _tensor_to_bytes(tensor: UInt8[Tensor, " n"]) -> bytes:
    return tensor.numpy().tobytes()
