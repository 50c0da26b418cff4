"""`zoo finetune llm`: train a sparse language model on, in full or by low-rank updates, keeping its zeros."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import tyro
from torch import nn

from zoo.bundles.catalog import Bundle
from zoo.errors import ConfigError
from zoo.llm.domain import make_job, measured, text_of
from zoo.llm.lora import attach_lora, detach_lora
from zoo.llm.train import llm_recipe
from zoo.training.finetune import FineTuner, Plan


@dataclass
class Finetune(FineTuner):
    """Fine-tune a language model; the zeros of a sparse one stay zero.

    In full, all weights are trained and the masks applied after each step. With a rank, low-rank updates of
    the blocks' projections are trained, masked like the weights, and merged at the end.
    """

    domain: ClassVar[str] = "llm"
    counts: ClassVar[str] = "steps"

    text: Annotated[str | None, tyro.conf.arg(aliases=["--dataset"])] = None
    """What to train on: embedded, shakespeare, tinystories, wikitext2, or a .txt file whose documents are
    separated by lines of <|endoftext|>; by default the training part of the text on the model's card."""

    steps: int = 200
    """Optimizer steps."""

    batch: int = 8
    """Windows per step, over all processes."""

    window: int | None = None
    """Tokens per window; by default the model's context, at most 256."""

    lr: float = 5e-4
    """AdamW's highest learning rate; ten times that suits low-rank updates."""

    weight_decay: float = 0.0
    """Decoupled decay of matrices."""

    lora_rank: int = 0
    """Rank of the updates; 0 trains all weights."""

    lora_alpha: float | None = None
    """Scale of the updates times the rank; by default twice the rank."""

    checkpoint_every: int = 25
    """Steps between checkpoints."""

    def plan(self, source: Bundle, loaded: nn.Module, twin: Bundle | None, device: torch.device) -> Plan:
        """Training on a text, in full or by low-rank updates."""
        if self.lora_rank < 0:
            raise ConfigError(f"lora_rank must not be negative. Received: {self.lora_rank}.")
        text = self.text or text_of(loaded)
        recipe = llm_recipe(self.steps, self.batch, self.lr, self.weight_decay)
        model = loaded.float()
        job = make_job(text, recipe=recipe, seed=self.seed, device=device, model=model, window=self.window)
        tokens = job.batches.tokens
        identity = {"tokens": [len(tokens), int(tokens.sum())]}
        origin = measured(text)[1]
        data = {"name": origin.title, "source": origin.origin, "licence": origin.licence}
        if not self.lora_rank:
            return Plan(model, job, text, data=data, identity=identity)
        attach_lora(model, self.lora_rank, self.lora_alpha, seed=self.seed)
        merge = functools.partial(_merge, model)
        return Plan(model, job, text, "by low-rank updates", data=data, identity=identity, finish=merge)


def _merge(model: nn.Module) -> None:
    detach_lora(model, merge=True)
    model.requires_grad_(True)
