"""What the one loop, `zoo.shared.train.Fit`, is given for language models: packed windows, recipe, loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import DataError
from zoo.shared.train import Recipe


def llm_recipe(steps: int, batch: int = 8, lr: float = 3e-3, weight_decay: float = 0.1) -> Recipe:
    """AdamW (beta 0.9, 0.95) whose decay is for matrices, a warm-up over 5 % of the steps, then a cosine to
    zero, gradients clipped at norm 1.

    Args:
        steps: optimiser steps.
        batch: windows per step, over all processes.
        lr: highest learning rate.
        weight_decay: decoupled.
    """
    return Recipe(
        lr=lr,
        batch=batch,
        weight_decay=weight_decay,
        decayed="matrices",
        optimizer="adamw",
        options={"betas": (0.9, 0.95), "fused": True},
        steps=steps,
        warmup=0.05,
        decay="cosine",
        clip=1.0,
    )


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a text in an order drawn anew for each pass.

    Each pass begins at another offset, so that the cuts between windows move. The last, short batch of a pass
    is left out unless it is the only one.

    Args:
        tokens: the text.
        window: tokens to predict per window.
        batch: windows per step.

    Raises:
        DataError: the text is shorter than two windows.
    """

    tokens: Int[Tensor, " n"]
    window: int
    batch: int

    def __post_init__(self) -> None:
        if self.per_pass < 1:
            raise DataError(
                f"The text has {len(self.tokens)} tokens, fewer than two windows of {self.window}. Give more "
                "text or a smaller window."
            )

    @property
    def per_pass(self) -> int:
        """Windows of a pass."""
        return (len(self.tokens) - 1) // self.window - 1

    def __len__(self) -> int:
        return max(1, self.per_pass // self.batch)

    def draw(self, generator: torch.Generator) -> Iterator[Int[Tensor, "batch window_1"]]:
        """The windows of a pass, each with the token before it."""
        offset = int(torch.randint(self.window, (), generator=generator))
        starts = offset + torch.randperm(self.per_pass, generator=generator) * self.window
        for chosen in starts.split(self.batch)[: len(self)]:
            yield self.tokens[chosen[:, None] + torch.arange(self.window + 1)]

    def sized(self, batch: int) -> Windows:
        """The same text in batches of another size."""
        return replace(self, batch=batch)

    def example(self) -> tuple[Int[Tensor, "1 window"]]:
        """The first window."""
        return (self.tokens[None, : self.window],)


def window_loss(model: nn.Module, batch: Int[Tensor, "batch window_1"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood in nats of each window's tokens after the first."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return next_token_loss(logits, batch[:, 1:])


def next_token_loss(
    logits: Float[Tensor, "batch tokens vocab"], targets: Int[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood in nats per token."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Int[Tensor, " n"], window: int, batch: int = 32) -> float:
    """Mean loss in nats per token over the whole windows of a text; the model is in eval mode afterwards."""
    model.eval()
    count = (len(tokens) - 1) // window
    starts = torch.arange(count, device=tokens.device)[:, None] * window
    inputs = tokens[starts + torch.arange(window + 1, device=tokens.device)]
    nats = sum(float(window_loss(model, part)) * len(part) for part in inputs.split(batch))
    return nats / count
