"""What the experiments share: the models they are run on, cells of perplexity, tables, plots and verdicts."""

from __future__ import annotations

import copy
import functools
import math
import os
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zoo.errors import ConfigError, DataError
from zoo.harness.experiments import CellCache
from zoo.harness.judging import deviation, judge, mean_cell
from zoo.harness.stats import seed_difference
from zoo.harness.tables import Plot, Series, Table, Verdict
from zoo.llm.data import corpus
from zoo.llm.data.calibration import default_text, random_windows
from zoo.llm.data.tokenization import token_stream, tokenizer_of
from zoo.llm.scoring import document_nats
from zoo.llm.tasks import perplexity_result

Rows = Sequence[dict[str, Any]]
#: Changes a model in place, given calibration batches and a seed.
Apply = Callable[[PreTrainedModel, list[Tensor], int], Any]

#: A real model that others trained; `$ZOO_DATA/stories260k` holds it in llama2.c's layout.
STORIES = "stories260k"
SUBJECTS = (STORIES, "llm/dense-shakespeare")
_BATCH = 8
# Raise it when a change to the methods changes what a cell means.
CELL_VERSION = 1


@dataclass(frozen=True)
class Protocol:
    """What all arms of a comparison share.

    Args:
        subjects: `stories260k`, or names of dense bundles.
        seeds: calibration seeds, from 0: each draws its own windows.
        windows: calibration windows.
        length: tokens per window.
        documents: test documents, the first so many; 0 for all.
    """

    subjects: tuple[str, ...] = SUBJECTS
    seeds: int = 3
    windows: int = 32
    length: int = 256
    documents: int = 40

    def __post_init__(self) -> None:
        if not self.subjects or self.seeds < 1 or self.documents < 0:
            raise ConfigError("give at least one subject and one seed; documents must not be negative")


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


def calibration(subject: str, protocol: Protocol, seed: int) -> list[Tensor]:
    """The calibration batches of a seed."""
    tokens = token_stream(corpus(text_of(subject)).train, tokenizer_of(dense_model(subject)))
    return list(random_windows(tokens, protocol.windows, protocol.length, seed).split(_BATCH))


def perplexity(model: PreTrainedModel, subject: str, protocol: Protocol) -> float:
    """Word perplexity on the test documents of the subject's text."""
    documents = corpus(text_of(subject)).test
    documents = documents[: protocol.documents] if protocol.documents else documents
    nats, _ = document_nats(model, tokenizer_of(model), documents)
    return perplexity_result(nats, documents).metrics["word_perplexity"].value


class Bench:
    """Runs arms as cells and collects their rows.

    Args:
        experiment: name, part of every key.
        protocol: shared by all arms.
        cells: finished work.
        progress: called with a note as cells finish.
        total: number of cells that are not in a `grid`, for the progress.
    """

    def __init__(
        self,
        experiment: str,
        protocol: Protocol,
        cells: CellCache,
        progress: Callable[..., None] | None,
        total: int = 0,
    ) -> None:
        self.experiment, self.protocol, self.cells = experiment, protocol, cells
        self.progress, self.total, self.done = progress, total, 0
        self.rows: list[dict[str, Any]] = []

    def grid(
        self,
        arms: Mapping[str, Callable[[Any], Apply]],
        levels: Sequence[float | str],
        unseeded: Collection[str] = (),
    ) -> None:
        """Each subject dense, and under every arm at every level for every seed; those that are `unseeded`,
        in which nothing is drawn, once."""
        cases = [
            (name, level, seed)
            for level in levels
            for name in arms
            for seed in range(1 if name in unseeded else self.protocol.seeds)
        ]
        self.total += len(self.protocol.subjects) * (1 + len(cases))
        for subject in self.protocol.subjects:
            self.dense(subject)
            for name, level, seed in cases:
                self.arm(subject, name, level, seed, arms[name](level))

    def dense(self, subject: str) -> None:
        """The dense model's row."""
        self.arm(subject, "dense", 0.0, 0, lambda model, batches, seed: None)

    def arm(self, subject: str, arm: str, level: float | str, seed: int, apply: Apply) -> dict[str, Any]:
        """Perplexity after `apply`, and what it returns if that is a dictionary; it may return another model
        with it."""
        shared = {k: v for k, v in vars(self.protocol).items() if k in ("windows", "length", "documents")}
        key = {
            "experiment": self.experiment,
            "version": CELL_VERSION,
            "subject": subject,
            "arm": arm,
            "level": level,
            "seed": seed,
            **shared,
        }

        def compute() -> dict[str, Any]:
            model = fresh(subject)
            torch.manual_seed(seed)
            found = apply(model, calibration(subject, self.protocol, seed), seed)
            if isinstance(found, tuple):
                model, found = found
            facts = found if isinstance(found, dict) else {}
            return {"perplexity": perplexity(model, subject, self.protocol), **facts}

        row = {"subject": subject, "arm": arm, "level": level, "seed": seed, **self.cells.cell(key, compute)}
        self.rows.append(row)
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, f"{subject} {arm} {level} seed {seed}")
        return row


def values(rows: Rows, subject: str, arm: str, level: float | str | None = None) -> dict[int, float]:
    """Perplexity by seed of an arm at a level (any level, where it has but one)."""
    return {
        row["seed"]: row["perplexity"]
        for row in rows
        if row["subject"] == subject and row["arm"] == arm and (level is None or row["level"] == level)
    }


def lower(
    rows: Rows,
    subject: str,
    level: float | str | None,
    better: str,
    worse: str,
    claim: str,
    published: str,
    at_least: float | None = None,
) -> Verdict:
    """The verdict on "the perplexity of `better` is lower than that of `worse`": the difference of their
    logarithms, paired by calibration seed; an arm without randomness stands for every seed."""
    one, other = values(rows, subject, better, level), values(rows, subject, worse, level)
    if not one or not other:
        return judge(claim, published, None)
    seeds = sorted(set(one) | set(other))
    if len(one) == 1:
        one = dict.fromkeys(seeds, next(iter(one.values())))
    if len(other) == 1:
        other = dict.fromkeys(seeds, next(iter(other.values())))
    seeds = [seed for seed in seeds if seed in one and seed in other]
    difference = seed_difference(
        [math.log(other[seed]) for seed in seeds], [math.log(one[seed]) for seed in seeds]
    )
    return judge(claim, published, difference, at_least=at_least, unit="nats per word", digits=3)


def perplexity_table(
    rows: Rows, subject: str, title: str, arms: Sequence[str], levels: Sequence[float | str], note: str
) -> Table:
    """Arms by levels; the dense perplexity is in the note."""
    dense = next(iter(values(rows, subject, "dense").values()))
    body = [
        [arm, *(mean_cell(list(values(rows, subject, arm, level).values()), 2) for level in levels)]
        for arm in arms
    ]
    columns = ["arm", *(level if isinstance(level, str) else f"{100 * level:.0f} %" for level in levels)]
    return Table(f"{subject}: {title}", columns, body, f"Dense: {dense:.2f}. {note}")


def perplexity_plot(
    rows: Rows, subject: str, name: str, x_label: str, arms: Sequence[str], levels: Sequence[float]
) -> Plot:
    """log10 of perplexity against a share, since arms differ by orders of magnitude."""
    series = []
    for arm in arms:
        known = [level for level in levels if values(rows, subject, arm, level)]
        found = [[math.log10(v) for v in values(rows, subject, arm, level).values()] for level in known]
        if known:
            mean, spread = [statistics.fmean(v) for v in found], [deviation(v) for v in found]
            series.append(Series(arm, [100 * level for level in known], mean, spread))
    dense = next(iter(values(rows, subject, "dense").values()))
    series.append(Series("dense", [], [math.log10(dense)], kind="reference"))
    slug = subject.rpartition("/")[2]
    alt = f"Word perplexity of each arm on {subject} against sparsity; the table has the numbers."
    return Plot(
        f"{name}-{slug}",
        f"{subject}: perplexity against sparsity",
        x_label,
        "log10 of word perplexity",
        series,
        alt,
    )
