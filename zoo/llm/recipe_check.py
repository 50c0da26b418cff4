"""Recipes of transformers' language models, tried at reduced size (see `zoo.recipes.check`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import zoo
import zoo.llm.folders
from zoo.errors import ConfigError
from zoo.llm.data.tokenization import packaged
from zoo.llm.families import sizes
from zoo.recipes import Entry
from zoo.recipes.check import Library, new_zeros

VOCABULARY = 1024  # of the tokenizer in the package


class Transformers(Library):
    """A folder with a tokenizer; pruned block by block where the entry's own is."""

    def base(self, entry: Entry, work: Path) -> Path:
        """A random model at reduced size."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            entry.kind, **{**sizes(entry.kind), "vocab_size": VOCABULARY, **entry.config}
        )
        model: Any = AutoModelForCausalLM.from_config(config)
        model.to(torch.bfloat16).save_pretrained(work / "base")
        packaged("shakespeare").save_pretrained(work / "base")
        return work / "base"

    def parameters(self, entry: Entry) -> int:
        """Of the real model; tied ones once."""
        assert entry.shape is not None
        layers, width, vocabulary = entry.shape
        names = {"num_hidden_layers": layers, "hidden_size": width, "vocab_size": vocabulary}
        tied = {key: value for key, value in entry.config.items() if key == "tie_word_embeddings"}
        config = AutoConfig.for_model(entry.kind, **{**names, **tied, **entry.full})
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        return sum(parameter.numel() for parameter in model.parameters())

    def zeros(self, entry: Entry, work: Path) -> float:
        """Share of zeros in what was pruned."""
        if entry.method == "gqsa":  # codes, for which transformers has no form
            return zoo.info(zoo.load(work / "out")).card.sparsity.overall
        dense: Any = AutoModelForCausalLM.from_pretrained(work / "base", dtype="auto")
        made: Any = AutoModelForCausalLM.from_pretrained(work / "out", dtype="auto")
        ids = torch.randint(3, VOCABULARY, (1, 8))
        if not torch.isfinite(made(ids).logits).all():
            raise ConfigError("the result puts out what is not finite")
        return new_zeros(dense, made)

    def quick(self, work: Path) -> list[str]:
        """Two short windows of a text."""
        (work / "text.txt").write_text("\n\n".join(f"line {i} of a text " * 60 for i in range(4)))
        return ["--text", str(work / "text.txt"), "--windows", "2", "--length", "32"]

    @contextlib.contextmanager
    def as_at_full_size(self, entry: Entry) -> Iterator[None]:
        """Block by block, where the entry's own checkpoint is pruned so."""
        usual = zoo.llm.folders.WHOLE
        zoo.llm.folders.WHOLE = 0 if entry.streamed else usual
        try:
            yield
        finally:
            zoo.llm.folders.WHOLE = usual
