"""Makers of recipe rows (`zoo make`) that are particular to language models.

A training that is interrupted goes on from its last checkpoint, and ends with the same bits on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.checkpoints import CheckpointFile, part
from zoo.errors import ConfigError
from zoo.llm.data import corpus
from zoo.llm.data.tokenization import packaged, token_stream
from zoo.llm.models.dropout import residual_dropout
from zoo.llm.train import Fit, TrainConfig, Windows, distillation, next_token_loss
from zoo.methods.contract import Sparsified
from zoo.progress import progress_bar
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet

_VALIDATIONS = 40  # times in a training
_EVERY = 25  # steps between checkpoints


def dense(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A language model trained from fresh weights; `start` is a teacher.

    Options: `dropout`, see `residual_dropout`; `best`, end with the weights of the lowest loss on the
    validation documents instead of the last ones; `distillation`, weight of the divergence from the teacher.
    On a GPU products are in bfloat16, weights and sums in single precision.

    Raises:
        ConfigError: a device that is not there.
    """
    if work.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"There is no device {work.device!r} here. Use --device cpu.")
    model = new_model(row, seed)
    last, best = _train(model.to(work.device), row, seed, start, work)
    if best.weights:
        model.load_state_dict(best.weights, strict=False)
    facts = {"optimizer": "AdamW", "validation_loss": best.loss if best.weights else last}
    return Sparsified(model.cpu().eval(), MaskSet({}), hyperparameters=facts)


def new_model(row: Row, seed: int) -> Any:
    """The model before training, drawn with the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES.get(str(row.architecture))(**row.arguments)


def _train(model: Any, row: Row, seed: int, teacher: nn.Module | None, work: Work) -> tuple[float, _Best]:
    """Train in place; the last loss on held-out text and the lowest one."""
    config = TrainConfig(**row.recipe, seed=seed)
    text, tokenizer = corpus(str(row.dataset)), packaged(row.arguments["tokenizer"])
    tokens = token_stream(text.train, tokenizer)
    held_out = token_stream(text.validation, tokenizer).to(work.device)
    weight = float(row.options.get("distillation", 1.0))
    fit = Fit(
        model,
        Windows(tokens, config.window, config.batch, config.seed),
        config,
        distil=None if teacher is None else distillation(teacher.to(work.device), weight),
        autocast=None if work.device == "cpu" else torch.bfloat16,
    )
    file = CheckpointFile(work.folder, {**row.identity(), "seed": seed, "tokens": len(tokens)})
    best = _Best(file.read() if fit.restore(file) else None)
    keep = bool(row.options.get("best", False))
    with progress_bar() as progress, residual_dropout(model, float(row.options.get("dropout", 0.0))):
        while not fit.done:
            fit.advance()
            if fit.step % max(1, config.steps // _VALIDATIONS) == 0 or fit.done:
                best.see(model, held_out_loss(model, held_out, config.window), keep)
            if fit.step % _EVERY == 0 or fit.done:
                facts = {"best": best.loss.hex(), "last": best.last.hex()}
                fit.write(file, facts, {f"best/{key}": value for key, value in best.weights.items()})
            note = f"{row.slug}: loss {fit.last_loss:.3f}, validation {best.last:.3f}, best {best.loss:.3f}"
            progress(fit.step, config.steps, note)
    return best.last, best


class _Best:
    """The lowest loss on held-out text so far, and the weights that had it."""

    def __init__(self, found: tuple[dict[str, Tensor], dict[str, str]] | None) -> None:
        self.loss = self.last = math.inf
        self.weights: dict[str, Tensor] = {}
        if found is not None:
            self.loss, self.last = float.fromhex(found[1]["best"]), float.fromhex(found[1]["last"])
            self.weights = part(found[0], "best/")

    def see(self, model: nn.Module, loss: float, keep: bool) -> None:
        """Take note of a loss; `keep` a copy of the weights if it is the lowest."""
        self.last = loss
        if loss < self.loss:
            self.loss = loss
            if keep:
                self.weights = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Int[Tensor, " n"], window: int, batch: int = 32) -> float:
    """Mean loss in nats per token over the whole windows of a text; the model is in eval mode afterwards."""
    model.eval()
    count = (len(tokens) - 1) // window
    starts = torch.arange(count, device=tokens.device)[:, None] * window
    inputs = tokens[starts + torch.arange(window + 1, device=tokens.device)]
    nats = 0.0
    for part_ in inputs.split(batch):
        logits = model(input_ids=part_[:, :-1], use_cache=False).logits
        nats += float(next_token_loss(logits, part_[:, 1:])) * len(part_)
    return nats / count
