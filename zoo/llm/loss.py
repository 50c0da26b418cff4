"""How a language model is run on a batch: token ids [batch, length], or the model's keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


def language_forward(model: nn.Module, batch: Any) -> Any:
    """The output of a transformers model, without a cache; the batch is moved to the model's device.

    An encoder-decoder reads the same ids on both sides.
    """
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    moved = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in inputs.items()}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        moved.setdefault("decoder_input_ids", moved["input_ids"])
    return model(**moved, use_cache=False)


def language_loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy of a batch, whose labels are its token ids unless it names others."""
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    loss: Tensor = language_forward(model, {"labels": inputs["input_ids"], **inputs}).loss
    return loss
