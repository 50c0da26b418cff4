"""Text from a model, streamed, with the time that it took."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from zoo.errors import ConfigError
from zoo.llm.data.tokenization import tokenizer_of
from zoo.llm.scoring import encode, first_tokens
from zoo.shared.measure.modes import float32


@dataclass(frozen=True)
class Generated:
    """What a model wrote.

    Attributes:
        text: the continuation, without the prompt.
        prompt_tokens, new_tokens: their numbers; `new_tokens` counts the one that ended the text.
        prefill_seconds: until the first new token was known.
        decode_tokens_per_second: rate of the tokens after the first; None where there is only one.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def generate(
    model: nn.Module,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continue a prompt by transformers' own `generate`, with its KV cache.

    Args:
        model: any causal LM with a tokenizer (`zoo.llm.tokenizer_of`), sparse or dense.
        prompt: the beginning of the text; empty to begin anew.
        max_new_tokens: at most so many tokens, and no more than the model's context has room for.
        temperature: of sampling; 0 takes the most probable token each time.
        seed: of sampling.
        on_text: called with each piece of text as it is ready.

    Raises:
        ConfigError: a prompt that fills the context, or impossible options.
    """
    if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise ConfigError(
            f"max_new_tokens must be at least 1 and temperature finite and not negative. Received: "
            f"{max_new_tokens}, {temperature}."
        )
    tokenizer = tokenizer_of(model)
    ids = first_tokens(tokenizer) + encode(tokenizer, prompt)
    context = int(model.config.get_text_config().max_position_embeddings)  # type: ignore[union-attr, operator]
    if len(ids) >= context:
        raise ConfigError(
            f"The prompt has {len(ids)} tokens, the model's context {context}. Shorten the prompt."
        )
    if not ids:
        raise ConfigError("This model's tokenizer has no token to begin a text with: give a prompt.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config: Any = copy.deepcopy(model.generation_config)  # penalties, and which tokens end a text
    config.update(
        max_new_tokens=min(max_new_tokens, context - len(ids)),
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=None,
        top_p=None,
        pad_token_id=pad,
    )
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    device = next(model.parameters()).device
    inputs = torch.tensor([ids], device=device)
    streamer = _Streamer(tokenizer, on_text, len(ids))
    was_training = model.training
    model.eval()
    with float32(model), torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        streamer.start = time.perf_counter()
        model.generate(  # type: ignore[operator]
            inputs, attention_mask=torch.ones_like(inputs), generation_config=config, streamer=streamer
        )
    model.train(was_training)
    first, last, count = streamer.first, streamer.last, len(streamer.ids)
    rate = (count - 1) / (last - first) if count > 1 and last > first else None
    return Generated(streamer.text, len(ids), count, first - streamer.start, rate)


def to_extras(model: nn.Module) -> dict[str, Tensor]:
    """A model's generation configuration as a bundle's extra tensor, where it adds to its configuration."""
    own: Any = model.generation_config
    configuration: Any = model.config
    told, known = own.to_diff_dict(), GenerationConfig.from_model_config(configuration).to_diff_dict()
    differs = {key: value for key, value in told.items() if known.get(key) != value}
    differs.pop("transformers_version", None)
    if not differs:
        return {}
    return {"generation/json": torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)}


def take_extras(model: nn.Module, extras: Mapping[str, Tensor]) -> None:
    """Give a loaded model the generation configuration of its bundle; see `to_extras`.

    Raises:
        ConfigError: what is stored is no such configuration.
    """
    try:
        fields = json.loads(extras["json"].numpy().tobytes())
        model.generation_config = GenerationConfig.from_dict(fields)  # type: ignore[assignment]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"The stored generation configuration cannot be read: {error}.") from error


class _Streamer(BaseStreamer):
    """Collects tokens, times them, and hands on the text that more tokens cannot change."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None, prompt: int) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.text = ""
        self.start = self.first = self.last = 0.0
        self._prompt = prompt
        self._begun = False

    def put(self, value: torch.Tensor) -> None:
        """Take new tokens; the first call brings the prompt."""
        if not self._begun:
            self._begun = True
            return
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.ids += value.flatten().tolist()
        self._flush(final=False)

    def end(self) -> None:
        """The text is complete."""
        self._flush(final=True)

    def _flush(self, final: bool) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not final and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return  # the bytes of a character that is not complete yet
        new, self.text = text[len(self.text) :], text
        if new and self.on_text is not None:
            self.on_text(new)
