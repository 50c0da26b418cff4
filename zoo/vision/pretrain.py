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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from zoo.bundles.card import Card, mean_and_spread
from zoo.bundles.catalog import cache_folder, open_bundle
from zoo.bundles.store import save
from zoo.errors import ConfigError, TaskError
from zoo.harness.evidence import record_evidence
from zoo.harness.tasks import get_task
from zoo.names import suggestion
from zoo.progress import progress_bar
from zoo.shared.masks import Mask, MaskSet, masks_of, set_masks
from zoo.shared.masks.patterns import pattern_from_dict
from zoo.shared.store.io import atomic_write
from zoo.vision.bundle_recipes import ENTRIES, FAMILIES, Entry, Family, Made, slug

EVIDENCE = "benchmarks/results/vision-bundles.json"
NO_PAPER = "No paper: a plain network, trained for this zoo."


def kept(file: Path, family: Family, stated: dict[str, Any], train: Callable[[], Made]) -> Made:
    """A training's result from its file, after making it if need be.

    Args:
        file: where it is kept; what it was made with stands beside it.
        family: of the network.
        stated: `options` of the training and the recipe of its dense `start`: a file made with others is
            made again.
        train: makes it.
    """
    if not _made_with(file, stated):
        made = train()
        masks = masks_of(made.model) or MaskSet({})
        tensors = {f"weights/{k}": v for k, v in made.model.state_dict().items()}
        tensors |= {f"masks/{k}": m.keep for k, m in masks.items()}
        tensors |= {f"extras/{k}": v for k, v in made.extras.items()}
        facts = {
            "arguments": made.model.current_arguments(),
            "options": made.options,
            "seconds": made.seconds,
            "start": stated["start"],
            "patterns": {k: m.pattern.to_dict() for k, m in masks.items()},
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file.with_suffix(".json"), json.dumps(facts, default=str).encode())
        atomic_write(file, to_bytes({k: v.contiguous() for k, v in tensors.items()}))
    facts, tensors = json.loads(file.with_suffix(".json").read_text()), load_file(file)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model = family.build(**facts["arguments"])
    model.load_state_dict(part("weights/"))
    if found := part("masks/"):
        patterns = facts["patterns"]
        set_masks(model, MaskSet({k: Mask(v, pattern_from_dict(patterns[k])) for k, v in found.items()}))
    return Made(model.eval(), part("extras/"), facts["options"], facts["seconds"])


def _made_with(file: Path, stated: dict[str, Any]) -> bool:
    """Whether a file is there and was made with what is stated; results add figures to the options."""
    if not file.exists():
        return False
    facts = json.loads(file.with_suffix(".json").read_text())
    plain = json.loads(json.dumps(stated))
    return bool(plain["options"].items() <= facts["options"].items() and plain["start"] == facts.get("start"))


@dataclass(frozen=True)
class Pretrain:
    """Which bundles to make.

    Args:
        methods: see `zoo.vision.bundle_recipes`; by default all. Their dense twins are always made.
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

    def dense(self, family: Family, seed: int) -> Made:
        """The dense network of a seed."""
        file = self.folder / f"{family.twin}-{seed}.safetensors"
        return kept(file, family, {"options": family.recipe, "start": None}, partial(family.dense, seed))

    def sparse(self, name: str, level: str, seed: int) -> Made:
        """What a method makes of the dense network of a seed."""
        entry = ENTRIES[name]
        options = dataclasses.asdict(entry.at(level, seed))
        del options["device"]  # results do not depend on it
        return kept(
            self.folder / f"{slug(name, level)}-{seed}.safetensors",
            entry.family,
            {"options": options, "start": entry.family.recipe},
            lambda: entry.run(level, seed, self.dense(entry.family, seed).model),
        )

    @property
    def folder(self) -> Path:
        """Where finished trainings are kept."""
        return self.cells or cache_folder() / "cells" / "vision-pretrain"

    def write(self, name: str, made: list[Made], family: Family, entry: Entry | None) -> None:
        """Save the model of the first seed with the figures of all, and record the evidence."""
        first = made[0]
        twin = open_bundle(self.out / family.twin).card if entry is not None else None
        flops = get_task(family.tasks[0]).flops(first.model)
        if flops is None:
            raise TaskError(f"{family.tasks[0]} counts no operations of {type(first.model).__name__}")
        cost: dict[str, Any] = {"parameters": {}, "bytes": {}}
        cost["flops"] = {"dense": flops.dense, "sparse": flops.sparse}
        parameters = sum(p.numel() for p in first.model.parameters())
        if twin is not None and parameters < twin.cost.parameters.dense:
            # Channels were cut: the dense figures are the twin's.
            cost["parameters"]["dense"] = twin.cost.parameters.dense
            cost["bytes"]["dense"] = twin.cost.bytes.dense
            cost["flops"]["dense"] = twin.cost.flops.dense
        source = family.source
        methods = [own for own, other in ENTRIES.items() if entry in (None, other) and other.family == family]
        options = "" if entry is None and family is FAMILIES[0] else f" --methods {methods[0]}"
        card = {
            "name": f"vision/{name}",
            "version": "1.0.0",
            "domain": "vision",
            "summary": _summary(first, family, entry),
            "architecture": {"name": family.architecture, "args": first.model.current_arguments()},
            "method": {
                "name": entry.method if entry is not None else "dense",
                "hyperparameters": first.options,
                "seed": 0,
            },
            "cost": cost,
            "metrics": [self._metric(name, task, made, family, twin) for task in family.tasks],
            "dense_twin": twin.name if twin is not None else None,
            "sparsity": {"parts": {"channels": {"pattern": "channel"}} if first.extras else {}},
            "training": {
                "command": f"python -m zoo.vision.pretrain{options}",
                "seconds": round(sum(one.seconds for one in made), 1),
            },
            "data": {"name": source.title, "source": source.origin, "licence": source.licence},
            "license": "Apache-2.0",
            "citation": entry.citation if entry is not None else NO_PAPER,
            "evidence": EVIDENCE,
        }
        save(first.model, self.out / name, card=card, extras=first.extras, overwrite=True)

    def _metric(
        self, name: str, task_name: str, made: list[Made], family: Family, twin: Card | None
    ) -> dict[str, Any]:
        """The figure of one task, and the evidence of every seed."""
        task = get_task(task_name)
        measured = [task.evaluate(one.model).metrics[task.primary] for one in made]
        per_seed = {seed: one.value for seed, one in enumerate(measured)}
        mean, spread = mean_and_spread(per_seed)
        metric: dict[str, Any] = {
            "task": task_name,
            "metric": task.primary,
            "split": "test",
            "protocol": family.protocol,
            "value": measured[0].value,
            "stderr": measured[0].stderr or 0.0,
            "per_seed": per_seed,
            "mean": mean,
            "spread": spread,
        }
        if twin is not None:
            own = next(m for m in twin.metrics if m.task == task_name)
            figure = {key: getattr(own, key) for key in ("value", "per_seed", "mean", "spread")}
            metric["dense"] = {"name": twin.name, **figure}
        record_evidence(self.evidence, f"vision/{name}", task_name, task.primary, per_seed)
        return metric


def _summary(made: Made, family: Family, entry: Entry | None) -> str:
    if entry is None:
        return f"Dense {family.title}."
    title = family.title[0].upper() + family.title[1:]
    if made.extras:
        keep = made.extras["channels/keep"]
        return f"{title}, {int(keep.sum())} of {len(keep)} channels left by {entry.method}."
    masks = masks_of(made.model) or MaskSet({})
    return f"{title}, {masks.sparsity():.1%} of the masked weights zero, {entry.method}."


def main(config: Pretrain) -> None:
    """Train what is missing and write the bundles."""
    torch.set_num_threads(1)
    families = [f for f in FAMILIES if any(ENTRIES[name].family is f for name in config.methods)]
    work = [(name, level) for name in config.methods for level in ENTRIES[name].levels]
    done, total = 0, (len(families) + len(work)) * config.seeds
    with progress_bar() as progress:

        def trained(name: str, train: Callable[[int], Made]) -> list[Made]:
            nonlocal done
            made = []
            for seed in range(config.seeds):
                made.append(train(seed))
                done += 1
                progress(done, total, f"{name} seed {seed}")
            return made

        for family in families:
            dense = trained(family.twin, partial(config.dense, family))
            config.write(family.twin, dense, family, None)
        for name, level in work:
            entry = ENTRIES[name]
            sparse = trained(slug(name, level), partial(config.sparse, name, level))
            config.write(slug(name, level), sparse, entry.family, entry)


if __name__ == "__main__":
    main(tyro.cli(Pretrain, description=__doc__))
