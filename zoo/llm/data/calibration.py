"""Calibration text: random windows of a corpus's training documents, the same for every method of a seed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.llm.data import corpus
from zoo.llm.data.tokenization import TOKENIZERS, tokenizer_of
from zoo.llm.train import token_stream


def random_windows(
    tokens: Int[Tensor, " n"], windows: int, length: int, seed: int
) -> Int[Tensor, "windows length"]:
    """Windows at random places of a text; they may overlap.

    Raises:
        ConfigError: a count or length below 1.
        DataError: the text is shorter than a window.
    """
    if windows < 1 or length < 1:
        raise ConfigError(f"windows and their length must be at least 1; received {windows} and {length}")
    if len(tokens) < length:
        raise DataError(
            f"the calibration text has {len(tokens)} tokens, a window {length}: give more text or shorter "
            "windows"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length + 1, (windows,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length)]


@dataclasses.dataclass
class Calibrated:
    """Options of the methods that look at text."""

    text: str | None = None
    """Corpus whose training documents are looked at: embedded, shakespeare, tinystories or wikitext2; by
    default the one that the model's tokenizer was made from, else embedded."""

    windows: int = 64
    """Windows of text."""

    length: int = 256
    """Tokens per window."""

    seed: int = 0
    """Of the windows' places, and of whatever else is random."""

    def batches(self, model: nn.Module, size: int = 8) -> list[Int[Tensor, "batch length"]]:
        """The windows as batches of token ids.

        Raises:
            ConfigError: a model without a tokenizer, or windows beyond its context.
            DataError: too little text.
        """
        config: Any = model.config
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and self.length > context:
            raise ConfigError(f"windows of {self.length} tokens exceed the model's context of {context}")
        documents = corpus(self.text or default_text(model)).train
        tokens = token_stream(documents, tokenizer_of(model))
        return list(random_windows(tokens, self.windows, self.length, self.seed).split(size))


def default_text(model: nn.Module) -> str:
    """The corpus that a packaged tokenizer was made from; `embedded` for others."""
    name = getattr(getattr(model, "config", None), "zoo_tokenizer", None)
    return TOKENIZERS[name][0] if name in TOKENIZERS else "embedded"


def extras_of(model: nn.Module) -> dict[str, Tensor]:
    """What the model's bundle holds beside its weights, for the bundle that is made of it."""
    found = getattr(model, "zoo_info", None)
    return dict(found.extras) if found is not None else {}
