"""Trains the dense language models of the zoo from scratch and writes their bundles.

    python -m zoo.llm.pretrain --models shakespeare          # on the packaged text: needs no data
    python -m zoo.llm.pretrain --models stories              # on the TinyStories sample in ZOO_DATA
    python -m zoo.llm.pretrain --models stories-taught --device cuda

A training that is interrupted, or that was given a share of its steps with `--until`, goes on from its last
checkpoint, and ends with the same bits on a CPU. Bundles hold weights in half precision; every figure is
measured on these, in single precision arithmetic.
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
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaForCausalLM

from zoo.bundles.catalog import cache_folder
from zoo.checkpoints import CheckpointFile, part
from zoo.errors import ConfigError
from zoo.llm.bundling import save_dense
from zoo.llm.data import corpus
from zoo.llm.data.tokenization import folder, packaged, train_bpe
from zoo.llm.models import llama
from zoo.llm.models.dropout import residual_dropout
from zoo.llm.train import Fit, TrainConfig, Windows, distillation, next_token_loss, token_stream
from zoo.progress import progress_bar

#: Packaged tokenizer -> the text whose training documents it was made from, and its size.
TOKENIZERS = {
    "shakespeare": ("embedded", 1024),
    "stories": ("tinystories", 2048),
}

EVIDENCE = "benchmarks/results/llm-bundles.json"


@dataclass(frozen=True)
class Recipe:
    """One model, and how it is trained.

    Args:
        title: for the card.
        text: name of the text.
        shape: arguments of `llama`.
        training: steps, rates and windows.
        tasks: on the card; none for a model that is only a teacher.
        seed: of the first weights.
        dropout: see `residual_dropout`.
        best: end with the weights of the lowest loss on the validation documents, instead of the last ones.
        teacher: the model, trained first, whose predictions are learnt beside the text.
        distillation: weight of the divergence from them.
    """

    title: str
    text: str
    shape: dict[str, Any]
    training: TrainConfig
    tasks: tuple[str, ...] = ()
    seed: int = 0
    dropout: float = 0.0
    best: bool = False
    teacher: str | None = None
    distillation: float = 1.0

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        fields = dataclasses.asdict(self)
        del fields["tasks"]
        return {**fields, "version": 2}

    def hyperparameters(self) -> dict[str, Any]:
        """For the card."""
        found = {**dataclasses.asdict(self.training), "optimizer": "AdamW", "dropout": self.dropout}
        if self.teacher is not None:
            teacher = RECIPES[self.teacher]
            found |= {"distillation": self.distillation, "teacher": teacher.title}
            found |= {f"teacher_{key}": value for key, value in teacher.hyperparameters().items()}
        return found


_VALIDATIONS = 40  # times in a training
_STORIES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "layers": 4,
    "heads": 6,
    "kv_heads": 2,
    "context": 256,
    "tokenizer": "stories",
}
_STORIES_TASKS = ("llm/tinystories", "llm/cloze-tinystories")

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
        _STORIES,
        TrainConfig(steps=1000, batch=16, window=256),
        _STORIES_TASKS,
    ),
    # For a GPU: taught by a model five times its size, with dropout.
    "stories-taught": Recipe(
        "LLaMA decoder of 2.4 million parameters on TinyStories, taught by one of 11 million",
        "tinystories",
        {**_STORIES, "layers": 5},
        TrainConfig(steps=5000, batch=32, window=256, lr=2e-3),
        _STORIES_TASKS,
        dropout=0.05,
        best=True,
        teacher="stories-teacher",
        distillation=3.0,
    ),
    "stories-teacher": Recipe(
        "LLaMA decoder of 11 million parameters on TinyStories",
        "tinystories",
        {**_STORIES, "hidden_size": 384, "intermediate_size": 1024, "layers": 6, "kv_heads": 6},
        TrainConfig(steps=2000, batch=64, window=256, lr=1e-3, weight_decay=0.3),
        dropout=0.3,
        best=True,
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
    name: str, cells: Path, until: int | None = None, *, every: int = 25, device: str = "cpu"
) -> tuple[LlamaForCausalLM, float]:
    """Train, or go on with, the model of that name; its teacher first.

    On a GPU products are in bfloat16, weights and sums in single precision.

    Args:
        name: one of `RECIPES`.
        cells: folder of checkpoints; the last one stays there, so that a finished training is not repeated.
        until: stop after this step; None for all.
        every: steps between checkpoints.
        device: where to train.

    Returns:
        The model in single precision on the CPU and the seconds of processor time that its training took.
    """
    recipe = RECIPES[name]
    config, text = recipe.training, corpus(recipe.text)
    distil, before = None, 0.0
    if recipe.teacher is not None:
        teacher, before = train(recipe.teacher, cells, every=every, device=device)
        distil = distillation(teacher.to(device), recipe.distillation)  # type: ignore[arg-type]
    model, tokenizer = new_model(recipe).to(device), packaged(recipe.shape["tokenizer"])  # type: ignore[arg-type]
    tokens = token_stream(text.train, tokenizer)
    held_out = token_stream(text.validation, tokenizer).to(device)
    windows = Windows(tokens, config.window, config.batch, config.seed)
    autocast = None if device == "cpu" else torch.bfloat16
    fit = Fit(model, windows, config, distil=distil, autocast=autocast)
    file = CheckpointFile(cells / name, {**recipe.identity(), "tokens": len(tokens)})
    found = file.read() if fit.restore(file) else None
    clock = _Clock(before if found is None else float.fromhex(found[1]["seconds"]))
    best = _Best(found)
    stop = min(until or config.steps, config.steps)
    with progress_bar() as progress, residual_dropout(model, recipe.dropout):
        while fit.step < stop:
            fit.advance()
            if fit.step % max(1, config.steps // _VALIDATIONS) == 0 or fit.step == config.steps:
                best.see(model, held_out_loss(model, held_out, config.window), recipe.best)
            if fit.step % every == 0 or fit.step == stop:
                facts = {"seconds": clock.total().hex(), "best": best.loss.hex(), "last": best.last.hex()}
                fit.write(file, facts, {f"best/{key}": value for key, value in best.weights.items()})
            note = f"{name}: loss {fit.last_loss:.3f}, validation {best.last:.3f}, best {best.loss:.3f}"
            progress(fit.step, config.steps, note)
    if best.weights and fit.done:
        model.load_state_dict(best.weights, strict=False)
    return model.cpu().eval(), clock.total()


def write_bundle(name: str, model: LlamaForCausalLM, seconds: float, out: Path, device: str = "cpu") -> Path:
    """The bundle `dense-<name>` of a trained model, in half precision."""
    recipe = RECIPES[name]
    where = "" if device == "cpu" else f" --device {device}"
    return save_dense(
        model.half(),
        out / f"dense-{name}",
        name=f"llm/dense-{name}",
        summary=f"{recipe.title}.",
        text=recipe.text,
        tasks=recipe.tasks,
        command=f"python -m zoo.llm.pretrain --models {name}{where}",
        seconds=seconds,
        seed=recipe.seed,
        hyperparameters=recipe.hyperparameters(),
        evidence=EVIDENCE,
        overwrite=True,
    )


class _Clock:
    """Processor seconds, those before the last checkpoint included."""

    def __init__(self, before: float) -> None:
        self.before, self.start = before, time.process_time()

    def total(self) -> float:
        return self.before + time.process_time() - self.start


class _Best:
    """The lowest loss on held-out text so far, and the weights that had it."""

    def __init__(self, found: tuple[dict[str, Tensor], dict[str, str]] | None) -> None:
        self.loss = self.last = math.inf
        self.weights: dict[str, Tensor] = {}
        if found is not None:
            self.loss, self.last = float.fromhex(found[1]["best"]), float.fromhex(found[1]["last"])
            self.weights = part(found[0], "best/")

    def see(self, model: LlamaForCausalLM, loss: float, keep: bool) -> None:
        """Take note of a loss; `keep` a copy of the weights if it is the lowest."""
        self.last = loss
        if loss < self.loss:
            self.loss = loss
            if keep:
                self.weights = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: Int[Tensor, " n"], window: int, batch: int = 32) -> float:
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


@dataclass(frozen=True)
class Pretrain:
    """Which models to train.

    Args:
        models: of shakespeare, stories, stories-taught.
        tokenizers: make the packaged tokenizers of these models anew first.
        until: stop the training after this step, to go on later; no bundle is written.
        out: folder of the bundles.
        cells: folder of checkpoints; by default in the cache.
        every: steps between checkpoints.
        device: where to train: cpu or cuda.
        threads: processor threads.
    """

    models: tuple[str, ...] = ("shakespeare", "stories")
    tokenizers: bool = False
    until: int | None = None
    out: Path = Path(__file__).parent / "cards"
    cells: Path | None = None
    every: int = 25
    device: str = "cpu"
    threads: int = 1


def main(config: Pretrain) -> None:
    """Train what is missing and write the bundles."""
    if unknown := [name for name in config.models if name not in RECIPES]:
        raise ConfigError(f"Unknown model {unknown[0]!r}. There are: {', '.join(RECIPES)}.")
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"There is no device {config.device!r} here. Use --device cpu.")
    torch.set_num_threads(config.threads)
    cells = config.cells or cache_folder() / "cells" / "llm-pretrain"
    for name in config.models:
        if config.tokenizers:
            make_tokenizer(RECIPES[name].shape["tokenizer"])
        model, seconds = train(name, cells, config.until, every=config.every, device=config.device)
        if config.until is None and RECIPES[name].tasks:
            print(write_bundle(name, model, seconds, config.out, config.device))


if __name__ == "__main__":
    main(tyro.cli(Pretrain, description=__doc__))
