"""Recipes tried: each entry's own command, on its configuration with random weights at reduced size.

The folder that the command starts from is written by the library that wrote the base; a language model that
is pruned block by block at its real size is pruned so here, too. Afterwards the library loads the result, and
the share of zeros is counted.
"""

from __future__ import annotations

import contextlib
import io
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from zoo.cli import main
from zoo.errors import ConfigError
from zoo.recipes import Entry
from zoo.registry import RECIPE_CHECKS


@dataclass(frozen=True)
class Tried:
    """What came of an entry.

    Attributes:
        zeros: share of the pruned weights that are zero, or of the parameters that are gone.
        seconds: of its command.
        note: why it was not tried, or what failed; empty where it works.
    """

    zeros: float | None
    seconds: float
    note: str = ""


def tried(entry: Entry, work: Path) -> Tried:
    """Run an entry in an empty folder."""
    begun = time.perf_counter()
    try:
        library: Library = RECIPE_CHECKS.get(entry.library)()
        check_parameters(entry, library)
        base = library.base(entry, work)
        with library.as_at_full_size(entry):
            for words in entry.commands(str(work / "out"), str(base)):
                _run([*words, *library.quick(work)])
        zeros = library.zeros(entry, work)
    except ConfigError as error:
        return Tried(None, time.perf_counter() - begun, " ".join(str(error).split()))
    return Tried(zeros, time.perf_counter() - begun)


def check_parameters(entry: Entry, library: Library) -> None:
    """Compare the millions of parameters that an entry states with those of its real configuration.

    Raises:
        ConfigError: they differ by more than the last digit.
    """
    counted = library.parameters(entry)
    if counted is not None and abs(counted / 1e6 - entry.parameters) > 0.051:
        raise ConfigError(
            f"{entry.name} states {entry.parameters} million parameters; counted {counted / 1e6:.1f}"
        )


def _run(words: list[str]) -> None:
    """One command of the zoo, silent unless it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(words)
    if code:
        raise ConfigError(f"zoo {words[0]} ended with {code}: {said.getvalue()[-300:]}")


class Library(ABC):
    """How recipes of one library are tried; a domain registers its own in `zoo.registry.RECIPE_CHECKS`."""

    @abstractmethod
    def base(self, entry: Entry, work: Path) -> Path:
        """A random model of the entry's kind at reduced size, as the library writes it."""

    @abstractmethod
    def zeros(self, entry: Entry, work: Path) -> float:
        """Share of zeros in what was pruned of the result, loaded by the library."""

    def parameters(self, entry: Entry) -> int | None:
        """Of the real model, counted on the meta device; None where the data decide."""
        return None

    def quick(self, work: Path) -> list[str]:
        """Options that make a command quick: little text, few epochs."""
        return []

    def as_at_full_size(self, entry: Entry) -> contextlib.AbstractContextManager[None]:
        """In which the command takes the way that it takes at full size."""
        return contextlib.nullcontext()


def new_zeros(dense: nn.Module, made: nn.Module) -> float:
    """Share of zeros in the weights that have more of them than before."""
    before, zeros, total = dense.state_dict(), 0, 0
    for name, tensor in made.state_dict().items():
        own = int((tensor == 0).sum())
        if own > int((before[name] == 0).sum()):
            zeros, total = zeros + own, total + tensor.numel()
    return zeros / total if total else 0.0
