"""Which method takes which transformers family: the conformance suite over 26 tiny models, as a page.

python -m zoo.llm.matrix > docs/matrix.md
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from zoo.llm.families import FAMILIES, family, token_ids
from zoo.llm.loss import language_loss
from zoo.methods.table import QUICK, answer, notes, table
from zoo.registry import METHODS
from zoo.shared.train import Job, Recipe

HEAD = """# Which method takes which language model

Made by `python -m zoo.llm.matrix`: the conformance suite (`zoo.methods.conformance.check_method`) over every
method and a tiny random model of each transformers family, of two layers, with a job of random tokens. "yes":
the exact sparsity, the same bits for the same seed, zeros that survive a training step and a save. Otherwise
the line with which the method refuses. Mixtures have four experts; T5 is an encoder with a decoder.
"""

#: Options under which a method of this domain runs on a tiny model in a second.
TINY: dict[str, dict[str, Any]] = {
    "cats": {"chunk": 1, "windows": 2},
    "chess": {"chunk": 1, "windows": 2},
    "teal": {"budget": "uniform", "windows": 2},
    "cfsp": {"coarse": "uniform", "windows": 2},
    "gqsa": {"block_epochs": 0, "model_epochs": 0, "windows": 2},
}


def tokens_job(method: object) -> Job:
    """Two epochs of two batches of random tokens."""
    return Job(token_ids(2), loss=language_loss, recipe=Recipe(epochs=2, lr=0.01, batch=2))


def said(kind: str, name: str) -> str:
    """ "yes", or how the method of that name refuses a model of the family."""
    options = TINY.get(name) or QUICK.get(name, {})
    line = answer(name, lambda: family(kind), tokens_job, options)
    line = line.replace(type(family(kind)).__name__, "this model")  # so that families share a line
    return line if line == "yes" else line[:1].upper() + line[1:]


def page(kinds: Sequence[str]) -> str:
    """The page over these families: the methods of language models, then those of no domain."""
    modules = {name: METHODS.get(name).__module__ for name in METHODS.names()}
    refusals: list[str] = []
    parts = []
    for title, package in (
        ("Methods of language models", "zoo.llm."),
        ("Methods of any network", "zoo.methods."),
    ):
        names = [name for name, module in modules.items() if module.startswith(package)]
        parts.append(f"\n## {title}\n\n{table('family', kinds, names, said, refusals)}")
    return HEAD + "".join(parts) + notes(refusals)


if __name__ == "__main__":
    logging.getLogger("zoo").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # transformers' and torch's advice about random models
    torch.set_num_threads(1)
    print(page(sys.argv[1:] or list(FAMILIES)), end="")
