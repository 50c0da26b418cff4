"""Jobs on the texts of the zoo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.bundles.sources import Source
from zoo.errors import ConfigError, DataError, UnknownNameError
from zoo.harness.tasks import get_task
from zoo.llm.data import corpus
from zoo.llm.data.tokenization import END, token_stream, tokenizer_of
from zoo.llm.scoring import context_of
from zoo.llm.tasks import TextTask
from zoo.llm.train import Windows, held_out_loss, llm_recipe, window_loss
from zoo.registry import TASKS
from zoo.shared.train import Job, Recipe

LONGEST = 256  # tokens of a window, where the model's context is longer


def make_job(
    dataset: str | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    model: nn.Module | None = None,
    window: int | None = None,
) -> Job:
    """Next-token training on a text; the score is minus the loss on its validation documents.

    Args:
        dataset: embedded, shakespeare, tinystories, wikitext2, or a .txt file whose documents are separated
            by lines of <|endoftext|> and which has no validation part; by default the text on the model's
            card.
        recipe: by default 200 steps of `llm_recipe`.
        seed: of the windows' order and of dropout.
        device: where models are trained.
        model: whose tokenizer and context to use.
        window: tokens per window; by default the model's context, at most 256.

    Raises:
        ConfigError: no model is given, or one that was measured on no text of the zoo and no text.
        DataError: a text that is missing or shorter than two windows.
    """
    if model is None:
        raise ConfigError("a text is cut into the tokens of a model: give one")
    recipe = recipe or llm_recipe(200)
    size = window or min(context_of(model), LONGEST)
    tokenizer = tokenizer_of(model)
    train, validation = documents(dataset or text_of(model))
    windows = Windows(token_stream(train, tokenizer), size, recipe.batch)
    held_out = token_stream(validation, tokenizer)

    def score(trained: nn.Module) -> float:
        return -held_out_loss(trained, held_out.to(next(trained.parameters()).device), size)

    return Job(windows, window_loss, score if len(held_out) > size else None, recipe, seed, device)


def measured(text: str) -> tuple[str, Source]:
    """The task that is measured on a text by name or file, and what a card says of it."""
    found = corpus(text)
    source = Source(found.title, found.origin, found.licence)
    return (f"llm/{text}" if f"llm/{text}" in TASKS else f"llm/text:{text}"), source


def text_of(model: nn.Module) -> str:
    """The text of the first task on a model's card that has one; its training documents are other ones.

    Raises:
        ConfigError: there is none.
    """
    known: Any = getattr(model, "zoo_info", None)
    for metric in known.card.metrics if known is not None else ():
        if isinstance(task := get_task(metric.task), TextTask):
            return task.text
    raise ConfigError("This model was measured on no text of the zoo: name one.")


def documents(name: str) -> tuple[Sequence[str], Sequence[str]]:
    """Training and validation documents of a text; a file has no validation part.

    Raises:
        DataError: an unknown name, or a file that cannot be read as UTF-8.
    """
    if not name.endswith(".txt"):
        found = corpus(name)
        return found.train, found.validation
    try:
        content = Path(name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no such file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name} cannot be read as UTF-8 text: {error}.") from error
    return tuple(part.strip() for part in content.split(END) if part.strip()), ()


def content(text: str) -> list[str] | None:
    """What the digest of a text on a card is taken of: its training documents; None for an unknown name."""
    try:
        return list(documents(text)[0])
    except UnknownNameError:
        return None
