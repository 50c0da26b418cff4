"""Dropout while a language model trains, for architectures that have none of their own, as LLaMA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.llm.models.blocks import find_blocks


@contextmanager
def residual_dropout(model: nn.Module, share: float) -> Iterator[None]:
    """Drop what the embedding and each attention and FFN add to the residual stream (Vaswani et al. 2017,
    section 5.4), while the model is in training mode and the context lasts.

    Args:
        model: a causal LM with a gated FFN.
        share: probability of each element to be dropped; the others are scaled by 1 / (1 - share).

    Raises:
        ConfigError: a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ConfigError(f"dropout is a probability below 1. Received: {share}.")

    def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return functional.dropout(output, share) if module.training else output

    places = [model.get_input_embeddings()]  # type: ignore[operator]
    places += [projection for block in find_blocks(model) for projection in (block.o, block.down)]
    handles = [place.register_forward_hook(drop) for place in (places if share else [])]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
