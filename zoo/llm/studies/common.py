"""What the studies share: the models they are run on, perplexity of an arm, its table and its plot."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zoo.errors import DataError
from zoo.llm.data import corpus
from zoo.llm.data.calibration import default_text, random_windows
from zoo.llm.data.tokenization import token_stream, tokenizer_of
from zoo.llm.scoring import document_nats
from zoo.llm.tasks import perplexity_result
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves, Grid, Some, Text
from zoo.studies.options import StudyOptions
from zoo.studies.study import Arm, grid
from zoo.studies.view import Row, Value, View

#: A real model that others trained; `$ZOO_DATA/stories260k` holds it in llama2.c's layout.
STORIES = "stories260k"
SUBJECTS = (STORIES, "llm/dense-shakespeare")
DENSE = "dense"
PERPLEXITY = Value("perplexity", 1.0, 2, "nats per word", 3, lower=True, log=True)
_BATCH = 8


@dataclass(frozen=True)
class Protocol(StudyOptions):
    """What all arms of a comparison share; a seed is one of calibration: each draws its own windows.

    Args:
        subjects: `stories260k`, or names of dense bundles.
        windows: calibration windows.
        length: tokens per window.
        documents: test documents, the first so many; 0 for all.
    """

    may_be_none: ClassVar[tuple[str, ...]] = ("documents",)
    subjects: tuple[str, ...] = SUBJECTS
    windows: int = 32
    length: int = 256
    documents: int = 40


#: Names of options that decide no cell.
VARIES = ("subjects", "seeds")


@functools.cache
def dense_model(subject: str) -> PreTrainedModel:
    """The dense model of that name in float32; do not change it, see `fresh`.

    Raises:
        DataError: stories260k is not in ZOO_DATA.
        UnknownNameError: no such bundle.
    """
    if subject != STORIES:
        from zoo.bundles.store import load

        model: Any = load(subject)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        return model
    from zoo.llm.models.llama2c import read_llama2c

    root = os.environ.get("ZOO_DATA")
    folder = Path(root or "ZOO_DATA") / "stories260k"
    if not root or not folder.is_dir():
        raise DataError(
            f"{folder} is not there. Set ZOO_DATA to the folder of the data, or leave {STORIES} out."
        )
    return read_llama2c(folder / "stories260K.bin", folder / "tok512.bin")


def fresh(subject: str) -> PreTrainedModel:
    """A copy of the dense model, with its tokenizer."""
    model = dense_model(subject)
    made = copy.deepcopy(model)
    made.__dict__["zoo_tokenizer"] = tokenizer_of(model)
    return made


def text_of(subject: str) -> str:
    """The text that a subject was trained on."""
    return "tinystories" if subject == STORIES else default_text(dense_model(subject))


def windows(subject: str, count: int, length: int, seed: int, batch: int = _BATCH) -> list[Tensor]:
    """Calibration windows of a seed, in batches."""
    return list(random_windows(tokens(subject), count, length, seed).split(batch))


def tokens(subject: str) -> Tensor:
    """The training documents of a subject's text."""
    return token_stream(corpus(text_of(subject)).train, tokenizer_of(dense_model(subject)))


def perplexity(model: PreTrainedModel, subject: str, count: int) -> float:
    """Word perplexity on the first so many test documents of the subject's text; 0 for all."""
    documents = corpus(text_of(subject)).test
    documents = documents[:count] if count else documents
    nats, _ = document_nats(model, tokenizer_of(model), documents)
    return perplexity_result(nats, documents).metrics["word_perplexity"].value


def data(options: Protocol, where: Row) -> list[Any]:
    """What the digest of a subject's data is taken of: weights and texts."""
    texts = corpus(text_of(where["subject"]))
    weights = dense_model(where["subject"]).state_dict()
    return [weights, list(texts.train), list(texts.test)]


def measure(make: Callable[..., Any] | None, options: Any, case: Row, cells: CellCache) -> Row:
    """Perplexity after `make(model, batches, case, options)`, and the facts it returns; it may return another
    model with them."""
    subject, seed = case["subject"], case["seed"]
    model, facts = fresh(subject), None
    torch.manual_seed(seed)
    if make is not None:
        facts = make(model, windows(subject, options.windows, options.length, seed), case, options)
    if isinstance(facts, tuple):
        model, facts = facts
    return {"perplexity": perplexity(model, subject, options.documents), **(facts or {})}


def cases(arms: Mapping[str, Arm], options: Protocol, levels: Sequence[Any]) -> Iterator[Row]:
    """Each subject dense, and under every arm at every level for every seed."""
    named = [arm for arm in arms if arm != DENSE]
    for subject in options.subjects:
        yield {"subject": subject, "arm": DENSE, "level": 0.0, "seed": 0}
        yield from grid(arms, levels, options.seeds, named, subject=subject)


def others(view: View) -> list[str]:
    """The study's arms that were run, but for the dense model."""
    return [arm for arm in view.arms(tuple(view.study.arms)) if arm != DENSE]


def with_dense(note: Text) -> Callable[[View], str]:
    """A note that begins with the dense perplexity and ends with what a seed is."""

    def text(view: View) -> str:
        options, rest = view.options, note(view) if callable(note) else note
        return (
            f"Dense: {view.mean(DENSE):.2f}. {rest} Mean ± sample standard deviation over "
            f"{options.seeds} calibration seeds of {options.windows} windows of {options.length} tokens."
        )

    return text


def table(title: str, note: Text, levels: Some) -> Grid:
    """Perplexity of arms by levels; the dense perplexity is in the note."""
    return Grid(f"{{where}}: {title}", with_dense(note), arms=others, levels=levels)


def plot(x_label: str, levels: Some) -> Curves:
    """log10 of perplexity against a share, since arms differ by orders of magnitude."""
    return Curves(
        "perplexity-{slug}",
        "{where}: perplexity against sparsity",
        x_label,
        "log10 of word perplexity",
        levels=levels,
        references=(DENSE,),
        log10=True,
        alt="Word perplexity of each arm on {where} against sparsity; the table has the numbers.",
    )
