"""Calibration data: a job's batches, or random windows of a text, the same for every method of a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.llm.loss import language_forward, language_loss
from zoo.shared.blocks import Forward
from zoo.shared.train import Job, Loss
from zoo.shared.train.batches import samples_in


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


@dataclass(frozen=True)
class Sample:
    """What a model is measured on.

    Attributes:
        batches: token ids [batch, length], a transformers model's keyword arguments, or a job's own batches.
        forward: runs a model on a batch; its result is not used.
        loss: of a model and a batch.
    """

    batches: list[Any]
    forward: Forward
    loss: Loss

    @classmethod
    def of(cls, model: nn.Module, batches: list[Any], loss: Loss) -> Sample:
        """Token ids of a transformers model, and mappings that hold them, run as those of a language model;
        other batches run by the loss."""
        first = batches[0]
        ids = first["input_ids"] if isinstance(first, dict) and "input_ids" in first else first
        if hasattr(model, "config") and isinstance(ids, Tensor) and not ids.is_floating_point():
            return cls(batches, language_forward, language_loss)
        return cls(batches, loss, loss)


@dataclass
class Calibrated:
    """Options of the methods that look at data. With a job its batches are looked at, else a text."""

    text: str | None = None
    """Text whose training documents are looked at: embedded, shakespeare, tinystories, wikitext2, or a .txt
    or .jsonl file; by default the one that the model's tokenizer was made from, else embedded."""

    windows: int = 64
    """Windows of text, or samples of a job."""

    length: int = 256
    """Tokens per window, at most as many as the model's context has."""

    seed: int = 0
    """Of the windows' places, and of whatever else is random."""

    needs_job: ClassVar[bool] = False

    def sample(self, model: nn.Module, job: Job | None = None, size: int = 8, times: int = 1) -> Sample:
        """The data that a method measures on.

        Args:
            model: with a tokenizer, unless there is a job.
            job: brings its own batches, of its own size.
            size: windows per batch of a text.
            times: so many times as many windows.

        Raises:
            ConfigError: neither a job nor a tokenizer.
            DataError: too little text.
        """
        wanted = times * self.windows
        if job is not None:
            first = job.sample(1, self.seed)
            return Sample.of(
                model, job.sample(-(-wanted // max(1, samples_in(first[0]))), self.seed), job.loss
            )
        from zoo.llm.data import corpus
        from zoo.llm.data.tokenization import token_stream, tokenizer_of

        tokens = token_stream(corpus(self.text or default_text(model)).train, tokenizer_of(model))
        windows = random_windows(tokens, wanted, min(self.length, context_limit(model)), self.seed)
        return Sample(list(windows.split(size)), language_forward, language_loss)

    def tokens(self, model: nn.Module, job: Job | None = None, size: int = 1, times: int = 1) -> list[Tensor]:
        """The sample as batches of token ids, [size, length], for methods of language models alone.

        Raises:
            ConfigError: see `sample`; or a job whose batches are no token ids.
        """
        found = []
        for batch in self.sample(model, job, size, times).batches:
            ids = batch.get("input_ids") if isinstance(batch, dict) else batch
            if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
                raise ConfigError(
                    f"{type(self).__name__} calibrates a language model: the job must give token ids "
                    f"[batch, length]; received {type(batch).__name__}"
                )
            found += list(ids.split(size))
        return found


def default_text(model: nn.Module) -> str:
    """The corpus that a packaged tokenizer was made from; `embedded` for others."""
    from zoo.llm.data.tokenization import TOKENIZERS

    name = getattr(getattr(model, "config", None), "zoo_tokenizer", None)
    return TOKENIZERS[name][0] if name in TOKENIZERS else "embedded"


def context_limit(model: nn.Module, most: int = 1 << 20) -> int:
    """Tokens of the longest window that the model takes, at most `most`."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return most if found is None else min(int(found), most)


def extras_of(model: nn.Module) -> dict[str, Tensor]:
    """What the model's bundle holds beside its weights, for the bundle that is made of it."""
    found = getattr(model, "zoo_info", None)
    return dict(found.extras) if found is not None else {}
