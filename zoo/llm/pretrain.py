"""Trains the dense language models of the zoo from scratch and writes their bundles.

    python -m zoo.llm.pretrain --models shakespeare          # on the packaged text: needs no data
    python -m zoo.llm.pretrain --models stories              # on the TinyStories sample in ZOO_DATA

A training that is interrupted, or that was given a share of its steps with `--until`, goes on from its last
checkpoint, and ends with the same bits. Bundles hold weights in half precision; every figure is measured on
these, in single precision arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import LlamaForCausalLM

from zoo.catalog import cache_folder
from zoo.checkpoints import CheckpointFile
from zoo.errors import ConfigError
from zoo.llm.bundling import save_dense
from zoo.llm.data import corpus
from zoo.llm.models import llama
from zoo.llm.tokenization import folder, packaged, train_bpe
from zoo.llm.train import Fit, TrainConfig, Windows, next_token_loss, token_stream
from zoo.progress import progress_bar

#: Packaged tokenizer -> the text whose training documents it was made from, and its size.
TOKENIZERS = {"shakespeare": ("embedded", 1024), "stories": ("tinystories", 2048)}


EVIDENCE = "benchmarks/results/llm-bundles.json"


@dataclass(frozen=True)
class Recipe:
    """One model: its text, its shape (arguments of `llama`), how it is trained, and the tasks on its card."""

    title: str
    text: str
    shape: dict[str, Any]
    training: TrainConfig
    tasks: tuple[str, ...]
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        fields = dataclasses.asdict(self)
        del fields["tasks"]
        return {**fields, "version": 1}


# Small enough for one core; every width is a multiple of 16, for groups, and of 4, for N:M.
RECIPES = {
    "shakespeare": Recipe(
        "LLaMA decoder of 0.9 million parameters on seven plays of Shakespeare",
        "embedded",
        {
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 352,
            "layers": 4,
            "heads": 4,
            "kv_heads": 2,
            "context": 256,
            "tokenizer": "shakespeare",
        },
        TrainConfig(steps=1000, batch=8, window=256),
        ("llm/embedded",),
    ),
    "stories": Recipe(
        "LLaMA decoder of 2 million parameters on TinyStories",
        "tinystories",
        {
            "vocab_size": 2048,
            "hidden_size": 192,
            "intermediate_size": 512,
            "layers": 4,
            "heads": 6,
            "kv_heads": 2,
            "context": 256,
            "tokenizer": "stories",
        },
        TrainConfig(steps=1000, batch=16, window=256),
        ("llm/tinystories", "llm/cloze-tinystories"),
    ),
}


def make_tokenizer(name: str) -> Path:
    """Make a packaged tokenizer from its training documents."""
    text, size = TOKENIZERS[name]
    path = folder() / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(train_bpe(corpus(text).train, size).to_str(), encoding="utf-8")
    packaged.cache_clear()
    return path


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """The model before training, drawn with the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return llama(**recipe.shape)


def train(
    name: str, cells: Path, until: int | None = None, every: int = 25
) -> tuple[LlamaForCausalLM, float]:
    """Train, or go on with, the model of that name.

    Args:
        name: one of `RECIPES`.
        cells: folder of checkpoints; the last one stays there, so that a finished training is not repeated.
        until: stop after this step; None for all.
        every: steps between checkpoints.

    Returns:
        The model in single precision and the seconds of processor time that its training took.
    """
    recipe = RECIPES[name]
    config, text = recipe.training, corpus(recipe.text)
    model, tokenizer = new_model(recipe), packaged(recipe.shape["tokenizer"])
    tokens = token_stream(text.train, tokenizer)
    held_out = Windows(token_stream(text.validation, tokenizer), config.window, config.batch, seed=0)
    fit = Fit(model, Windows(tokens, config.window, config.batch, config.seed), config)
    file = CheckpointFile(cells / name, {**recipe.identity(), "tokens": len(tokens)})
    clock = _Clock(fit.restore(file) and file.read())
    stop = min(until or config.steps, config.steps)
    validation = math.nan
    with progress_bar() as progress:
        while fit.step < stop:
            fit.advance()
            if fit.step % every == 0 or fit.step == stop:
                fit.write(file, {"seconds": clock.total().hex()})
            if fit.step % (4 * every) == 0 or fit.step == stop:
                validation = _loss(model, held_out)
            progress(fit.step, config.steps, f"{name}: loss {fit.last_loss:.3f}, validation {validation:.3f}")
    return model.eval(), clock.total()


def write_bundle(name: str, model: LlamaForCausalLM, seconds: float, out: Path) -> Path:
    """The bundle `dense-<name>` of a trained model, in half precision."""
    recipe = RECIPES[name]
    return save_dense(
        model.half(),
        out / f"dense-{name}",
        name=f"llm/dense-{name}",
        summary=f"{recipe.title}.",
        text=recipe.text,
        tasks=recipe.tasks,
        command=f"python -m zoo.llm.pretrain --models {name}",
        seconds=seconds,
        seed=recipe.seed,
        hyperparameters={**dataclasses.asdict(recipe.training), "optimizer": "AdamW"},
        evidence=EVIDENCE,
        overwrite=True,
    )


class _Clock:
    """Processor seconds, those before the last checkpoint included."""

    def __init__(self, found: Any) -> None:
        self.before = float.fromhex(found[1]["seconds"]) if found else 0.0
        self.start = time.process_time()

    def total(self) -> float:
        return self.before + time.process_time() - self.start


def _loss(model: LlamaForCausalLM, windows: Windows) -> float:
    """Mean loss over the first windows of a held-out text."""
    model.eval()
    with torch.no_grad():
        batch = windows(0)
        return float(next_token_loss(model(input_ids=batch[:, :-1], use_cache=False).logits, batch[:, 1:]))


@dataclass(frozen=True)
class Pretrain:
    """Which models to train.

    Args:
        models: of shakespeare, stories.
        tokenizers: make the packaged tokenizers of these models anew first.
        until: stop the training after this step, to go on later; no bundle is written.
        out: folder of the bundles.
        cells: folder of checkpoints; by default in the cache.
        threads: processor threads.
    """

    models: tuple[str, ...] = tuple(RECIPES)
    tokenizers: bool = False
    until: int | None = None
    out: Path = Path(__file__).parent / "cards"
    cells: Path | None = None
    threads: int = 1


def main(config: Pretrain) -> None:
    """Train what is missing and write the bundles."""
    if unknown := [name for name in config.models if name not in RECIPES]:
        raise ConfigError(f"Unknown model {unknown[0]!r}. There are: {', '.join(RECIPES)}.")
    torch.set_num_threads(config.threads)
    cells = config.cells or cache_folder() / "cells" / "llm-pretrain"
    for name in config.models:
        if config.tokenizers:
            make_tokenizer(RECIPES[name].shape["tokenizer"])
        model, seconds = train(name, cells, config.until)
        if config.until is None:
            print(write_bundle(name, model, seconds, config.out))


if __name__ == "__main__":
    main(tyro.cli(Pretrain, description=__doc__))
