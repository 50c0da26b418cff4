"""Makers of recipe rows (`zoo make`) that are particular to language models.

A training that is interrupted goes on from its last checkpoint, and ends with the same bits on a CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.llm.data import corpus
from zoo.llm.data.tokenization import packaged, token_stream
from zoo.llm.models.dropout import residual_dropout
from zoo.llm.train import Windows, held_out_loss, llm_recipe, window_loss
from zoo.methods.contract import Sparsified
from zoo.progress import progress_bar
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet
from zoo.shared.train import Checkpoint, Distillation, Fit, Job, device_named, resume

_VALIDATIONS = 40  # times in a training
_EVERY = 25  # steps between checkpoints


def dense(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A language model trained from fresh weights; `start` is a teacher.

    Options: `dropout`, see `residual_dropout`; `best`, end with the weights of the lowest loss on the
    validation documents instead of the last ones; `distillation`, weight of the divergence from the teacher.
    On a GPU products are in bfloat16, weights and sums in single precision.

    Raises:
        TrainingError: a device that is not there.
    """
    settings = dict(row.recipe)
    window = settings.pop("window")
    recipe = dataclasses.replace(llm_recipe(settings["steps"]), **settings)
    if row.options.get("best", False):
        recipe = dataclasses.replace(recipe, select="best", score_every=max(1, recipe.steps // _VALIDATIONS))
    device = device_named(work.device)
    if device.type != "cpu":
        recipe = dataclasses.replace(recipe, autocast="bfloat16")
    text, tokenizer = corpus(str(row.dataset)), packaged(row.arguments["tokenizer"])
    tokens = token_stream(text.train, tokenizer)
    held_out = token_stream(text.validation, tokenizer).to(device)

    def score(trained: nn.Module) -> float:
        return -held_out_loss(trained, held_out, window)

    job = Job(Windows(tokens, window, recipe.batch), window_loss, score, recipe, seed, device)
    if start is not None:
        weight = float(row.options.get("distillation", 1.0))
        job = job.replace(distil=Distillation(start.to(device), output=weight))
    model = new_model(row, seed)
    fit = job.fit(model, macs=lambda: 0.0)
    file = Checkpoint(work.folder, {**row.identity(), "seed": seed, "tokens": len(tokens)})
    with progress_bar() as progress, residual_dropout(model, float(row.options.get("dropout", 0.0))):

        def note(fit: Fit) -> None:
            best = "" if fit.best is None else f", best validation {-fit.best.score:.3f}"
            progress(fit.step, fit.steps, f"{row.slug}: loss {fit.last_loss:.3f}{best}")

        resume(fit, file, every_steps=_EVERY, last=True, note=note)
    facts = {"optimizer": "AdamW", "validation_loss": -score(model.eval())}
    return Sparsified(model.cpu(), MaskSet({}), hyperparameters=facts)


def new_model(row: Row, seed: int) -> Any:
    """The model before training, drawn with the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES.get(str(row.architecture))(**row.arguments)
