"""Makes the vision bundles of the zoo: dense twins and what each method makes of them, with every seed's
figure on the card.

    python -m zoo.vision.pretrain                       # all of them
    python -m zoo.vision.pretrain --methods bip lamp    # those and their dense twin

A bundle holds the model of seed 0, whatever its rank. Each training is kept in the cells folder as it
finishes, so that an interrupted run goes on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from shared.io import atomic_write
from shared.masks import Mask, MaskSet, masks_of, set_masks
from shared.patterns import pattern_from_dict
from zoo.bundles import save
from zoo.cards import mean_and_spread
from zoo.catalog import cache_folder, open_bundle
from zoo.errors import ConfigError, TaskError
from zoo.harness.evidence import record_evidence
from zoo.harness.tasks import get_task
from zoo.names import suggestion
from zoo.progress import progress_bar
from zoo.vision.base import VisionMethod, clone
from zoo.vision.bip import BiP
from zoo.vision.channels import WGSEF, MaskSparsity
from zoo.vision.data import SOURCES, load_images
from zoo.vision.jackpots import LotteryJackpot
from zoo.vision.magnitude import MagnitudePruning
from zoo.vision.models import Classifier, ConvNet, reinitialised
from zoo.vision.nm_training import BDWP, ProgressiveFlow
from zoo.vision.random_pruning import DynamicSparse, RandomPruning
from zoo.vision.soups import SparseSoup
from zoo.vision.sparse_ift import SparseIFT
from zoo.vision.tickets import LotteryTicket
from zoo.vision.train import Recipe, Trainer

EVIDENCE = "benchmarks/results/vision-bundles.json"
DENSE = Recipe(20, 0.1)
TWIN = "vision/dense-convnet-digits"
TASK = "vision/digits"
NO_PAPER = "No paper: a plain network, trained for this zoo."


@dataclass(frozen=True)
class Entry:
    """A method of the zoo at two levels: its registered name, its citation, and what makes it at a level and
    a seed."""

    method: str
    citation: str
    levels: tuple[str, str]
    make: Callable[[str, int], VisionMethod]


def _share(level: str) -> float:
    return int(level) / 100


ENTRIES: dict[str, Entry] = {
    "global-magnitude": Entry(
        "magnitude", "Gupta et al. Is Complexity Required for Neural Network Pruning? arXiv 2209.14624.",
        ("90", "98"), lambda level, seed: MagnitudePruning(_share(level), floor=0.0005, seed=seed),
    ),
    "lamp": Entry(
        "magnitude", "Lee et al. Layer-adaptive Sparsity for the Magnitude-based Pruning. ICLR 2021.",
        ("90", "98"), lambda level, seed: MagnitudePruning(_share(level), allocation="lamp", seed=seed),
    ),
    "random-erk": Entry(
        "random-pruning", "Liu et al. The Unreasonable Effectiveness of Random Pruning. ICLR 2022.",
        ("90", "98"), lambda level, seed: RandomPruning(_share(level), epochs=30, lr=0.1, seed=seed),
    ),
    "rigl": Entry(
        "dynamic-sparse", "Evci et al. Rigging the Lottery: Making All Tickets Winners. ICML 2020.",
        ("90", "98"), lambda level, seed: DynamicSparse(_share(level), epochs=30, lr=0.1, seed=seed),
    ),
    "lottery-ticket": Entry(
        "lottery-ticket", "Frankle et al. Linear Mode Connectivity and the Lottery Ticket Hypothesis. ICML "
        "2020.", ("90", "98"), lambda level, seed: LotteryTicket(_share(level), epochs=20, lr=0.1, seed=seed),
    ),
    "lottery-jackpot": Entry(
        "lottery-jackpot", "Zhang et al. Lottery Jackpots Exist in Pre-trained Models. arXiv 2104.08700.",
        ("90", "98"), lambda level, seed: LotteryJackpot(_share(level), seed=seed),
    ),
    "bip": Entry(
        "bip", "Zhang et al. Advancing Model Pruning via Bi-level Optimization. NeurIPS 2022.",
        ("90", "98"), lambda level, seed: BiP(_share(level), seed=seed),
    ),
    "sparse-soup": Entry(
        "sparse-soup", "Zimmer et al. Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging. "
        "ICLR 2024.", ("90", "98"), lambda level, seed: SparseSoup(_share(level), seed=seed),
    ),
    "pgf": Entry(
        "pgf", "Bambhaniya et al. Progressive Gradient Flow for Robust N:M Sparsity Training in "
        "Transformers. 2024.", ("2of8", "1of16"),
        lambda level, seed: ProgressiveFlow(pattern=level.replace("of", ":"), epochs=20, seed=seed),
    ),
    "bdwp": Entry(
        "bdwp", "Zhang et al. Bidirectional weight pruning for N:M sparse training. 2023.",
        ("2of8", "1of8"),
        lambda level, seed: BDWP(pattern=level.replace("of", ":"), epochs=20, seed=seed),
    ),
    "sparse-ift": Entry(
        "sparse-ift", "Thangarasa et al. Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training "
        "Efficiency. ICML 2024.", ("50", "75"),
        lambda level, seed: SparseIFT(_share(level), epochs=20, seed=seed),
    ),
    "mask-sparsity": Entry(
        "mask-sparsity", "Jiang et al. Pruning-aware Sparse Regularization for Network Pruning. 2023.",
        ("25", "50"),
        lambda level, seed: MaskSparsity(_share(level), epochs=15, sparse_epochs=8, seed=seed),
    ),
    "wgsef": Entry(
        "wgsef", "Sparse optimisation with the weighted group sparse envelope function.",
        ("50", "75"),
        lambda level, seed: WGSEF(_share(level), penalty=1.0, epochs=15, sparse_epochs=8, seed=seed),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A finished training."""

    model: Classifier
    extras: dict[str, Tensor]
    options: dict[str, Any]
    seconds: float


def slug(name: str, level: str) -> str:
    """Name of a bundle without its domain."""
    return f"{name}-convnet-digits-{level if 'of' in level else 's' + level}"


def dense(seed: int, folder: Path) -> Made:
    """The dense network of a seed."""

    def train() -> Made:
        model = reinitialised(ConvNet(), seed)
        start = time.process_time()
        Trainer(load_images("digits"), DENSE, seed).fit(model).run()
        options = {k: v for k, v in dataclasses.asdict(DENSE).items() if k not in ("momentum", "optimizer")}
        return Made(model.eval(), {}, options, time.process_time() - start)

    return _kept(folder / f"dense-{seed}.safetensors", train)


def sparse(name: str, level: str, seed: int, folder: Path) -> Made:
    """What a method makes of the dense network of a seed."""

    def train() -> Made:
        method = ENTRIES[name].make(level, seed)
        trainer = Trainer(load_images("digits"), method.recipe(), seed)
        start = time.process_time()
        made, extras = method.prune(clone(dense(seed, folder).model), trainer)
        options = method.options() | {"dataset": "digits", "training_flops": trainer.cost.flops}
        return Made(made.eval(), extras, options, time.process_time() - start)

    return _kept(folder / f"{slug(name, level)}-{seed}.safetensors", train)


def _kept(file: Path, train: Callable[[], Made]) -> Made:
    """A training's result from its file, after making it if need be."""
    if not file.exists():
        made = train()
        masks = masks_of(made.model) or MaskSet({})
        tensors = {f"weights/{k}": v for k, v in made.model.state_dict().items()}
        tensors |= {f"masks/{k}": m.keep for k, m in masks.items()}
        tensors |= {f"extras/{k}": v for k, v in made.extras.items()}
        facts = {
            "arguments": made.model.current_arguments(), "options": made.options, "seconds": made.seconds,
            "patterns": {k: m.pattern.to_dict() for k, m in masks.items()},
        }  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file.with_suffix(".json"), json.dumps(facts, default=str).encode())
        atomic_write(file, to_bytes({k: v.contiguous() for k, v in tensors.items()}))
    facts, tensors = json.loads(file.with_suffix(".json").read_text()), load_file(file)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model = ConvNet(**facts["arguments"])
    model.load_state_dict(part("weights/"))
    if found := part("masks/"):
        patterns = facts["patterns"]
        set_masks(model, MaskSet({k: Mask(v, pattern_from_dict(patterns[k])) for k, v in found.items()}))
    return Made(model.eval(), part("extras/"), facts["options"], facts["seconds"])


@dataclass(frozen=True)
class Pretrain:
    """Which bundles to make.

    Args:
        methods: see `ENTRIES`; by default all. The dense twin is always made.
        seeds: how many, from 0.
        out: folder of the bundles.
        evidence: file that collects the values of every seed.
        cells: folder of finished trainings; by default in the cache.
    """

    methods: tuple[str, ...] = tuple(ENTRIES)
    seeds: int = 3
    out: Path = Path(__file__).parent / "cards"
    evidence: Path = Path(__file__).parents[2] / EVIDENCE
    cells: Path | None = None

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in ENTRIES:
                raise ConfigError(f"Unknown method {name!r}. {suggestion(name, ENTRIES)}")

    def write(self, name: str, made: list[Made], entry: Entry | None) -> None:
        """Save the model of the first seed with the figures of all, and record the evidence."""
        task = get_task(TASK)
        per_seed = {s: task.evaluate(one.model).metrics["accuracy"].value for s, one in enumerate(made)}
        first = made[0]
        measured, flops = task.evaluate(first.model).metrics["accuracy"], task.flops(first.model)
        if flops is None:
            raise TaskError(f"{TASK} counts no operations of {type(first.model).__name__}")
        mean, spread = mean_and_spread(per_seed)
        metric: dict[str, Any] = {
            "task": TASK, "metric": "accuracy", "split": "test",
            "protocol": "500 test images, last epoch", "value": measured.value,
            "stderr": measured.stderr or 0.0, "per_seed": per_seed, "mean": mean, "spread": spread,
        }  # fmt: skip
        cost: dict[str, Any] = {"parameters": {}, "bytes": {}}
        cost["flops"] = {"dense": flops.dense, "sparse": flops.sparse}
        if entry is not None:
            twin = open_bundle(self.out / TWIN.partition("/")[2]).card
            own = twin.metrics[0]
            figure = {key: getattr(own, key) for key in ("value", "per_seed", "mean", "spread")}
            metric["dense"] = {"name": TWIN, **figure}
            parameters = sum(p.numel() for p in first.model.parameters())
            if parameters < twin.cost.parameters.dense:  # channels were cut: the dense figures are the twin's
                cost["parameters"]["dense"] = twin.cost.parameters.dense
                cost["bytes"]["dense"] = twin.cost.bytes.dense
                cost["flops"]["dense"] = twin.cost.flops.dense
        source = SOURCES["digits"]
        options = f" --methods {name.partition('-convnet')[0]}" if entry is not None else ""
        card = {
            "name": f"vision/{name}", "version": "1.0.0", "domain": "vision",
            "summary": _summary(first, entry),
            "architecture": {"name": "vision/convnet", "args": first.model.current_arguments()},
            "method": {
                "name": entry.method if entry is not None else "dense",
                "hyperparameters": first.options, "seed": 0,
            },
            "cost": cost, "metrics": [metric], "dense_twin": TWIN if entry is not None else None,
            "sparsity": {"parts": {"channels": {"pattern": "channel"}} if first.extras else {}},
            "training": {
                "command": f"python -m zoo.vision.pretrain{options}",
                "seconds": round(sum(one.seconds for one in made), 1),
            },
            "data": {"name": source.title, "source": source.origin, "licence": source.licence},
            "license": "Apache-2.0", "citation": entry.citation if entry is not None else NO_PAPER,
            "evidence": EVIDENCE,
        }  # fmt: skip
        save(first.model, self.out / name, card=card, extras=first.extras, overwrite=True)
        record_evidence(self.evidence, f"vision/{name}", TASK, "accuracy", per_seed)


def _summary(made: Made, entry: Entry | None) -> str:
    if entry is None:
        return "Dense net of four convolutions on scikit-learn's digits."
    if made.extras:
        keep = made.extras["channels/keep"]
        left = f"{int(keep.sum())} of {len(keep)} channels left"
        return f"Four convolutions on digits, {left} by {entry.method}."
    masks = masks_of(made.model) or MaskSet({})
    return f"Four convolutions on digits, {masks.sparsity():.1%} of the masked weights zero, {entry.method}."


def main(config: Pretrain) -> None:
    """Train what is missing and write the bundles."""
    torch.set_num_threads(1)
    folder = config.cells or cache_folder() / "cells" / "vision-pretrain"
    work = [(None, "")] + [(name, level) for name in config.methods for level in ENTRIES[name].levels]
    done, total = 0, len(work) * config.seeds
    with progress_bar() as progress:
        for name, level in work:
            made = []
            for seed in range(config.seeds):
                made.append(dense(seed, folder) if name is None else sparse(name, level, seed, folder))
                done += 1
                progress(done, total, f"{name or 'dense'} {level} seed {seed}")
            entry = None if name is None else ENTRIES[name]
            config.write(TWIN.partition("/")[2] if name is None else slug(name, level), made, entry)


if __name__ == "__main__":
    main(tyro.cli(Pretrain, description=__doc__))
