"""A package as somebody else would write it: architecture, tasks, method, recipes, study, fine-tuner."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.bundles.card import mean_and_spread
from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.bundles.store import load, save
from zoo.harness.tasks import Flops, Progress, Task, TaskResult, register_task
from zoo.methods.contract import Sparsified
from zoo.methods.prune import Prune
from zoo.shared.masks import MaskSet, masks_of
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves, Grid
from zoo.studies.study import Arm, Claim, Study, grid

IN, OUT = 12, 4

ENTRY_POINTS = """
[zoo.tasks]
toy/accuracy = zoo_toy:Accuracy
toy/loss = zoo_toy:Loss
toy/slow = zoo_toy:Slow
toy_param = zoo_toy:Parametrised

[zoo.architectures]
toy/mlp = zoo_toy:MLP

[zoo.methods]
toy-half = zoo_toy:Half

[zoo.makers]
toy/dense = zoo_toy:make_dense

[zoo.recipes]
toy = zoo_toy:recipes

[zoo.studies]
toy = zoo_toy:STUDY

[zoo.finetuners]
toy = zoo_toy:Finetune
"""


class MLP(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(IN, width)
        self.second = nn.Linear(width, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def data(n: int = 400) -> tuple[Tensor, Tensor]:
    """Points whose class a fixed linear map decides, with noise."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, IN, generator=generator)
    teacher = torch.randn(IN, OUT, generator=generator)
    return x, (x @ teacher + 0.5 * torch.randn(n, OUT, generator=generator)).argmax(1)


def train(seed: int, width: int = 32, steps: int = 60) -> MLP:
    """A trained network."""
    torch.manual_seed(seed)
    model = MLP(width)
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def make_dense(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """Maker of the dense toys."""
    _log(f"train {row.slug} {seed}")
    return Sparsified(train(seed, **row.arguments, **row.recipe), MaskSet({}))


def recipes() -> Path:
    """The file of the toy's recipe rows."""
    return Path(__file__).with_name("recipes.yaml")


@register_task
class Accuracy(Task):
    """Share of points classified as the teacher does."""

    name = "toy/accuracy"
    domain = "toy"
    primary = "accuracy"

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        x, y = data()
        _log(self.name)
        return TaskResult.from_samples({"accuracy": (model(x).argmax(1) == y).double().tolist()}, "toy-400")

    def flops(self, model: nn.Module) -> Flops:
        masks = masks_of(model) or {}
        weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
        kept = {name: masks[name].kept if name in masks else p.numel() for name, p in weights.items()}
        return Flops(2 * 400 * sum(p.numel() for p in weights.values()), 2 * 400 * sum(kept.values()))


@register_task
class Loss(Task):
    """Cross entropy."""

    name = "toy/loss"
    domain = "toy"
    primary = "loss"
    unit = "nats"
    higher_is_better = False

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        x, y = data()
        _log(self.name)
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        return TaskResult.from_samples({"loss": losses.double().tolist()}, "toy-400")


@register_task
class Slow(Accuracy):
    """Takes its time, in steps."""

    name = "toy/slow"

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        for step in range(5):
            if progress:
                progress(step, 5)
            time.sleep(float(os.environ.get("TOY_SLEEP", "0")) / 5)
        return super().evaluate(model, progress=progress)


class Parametrised(Accuracy):
    """`toy_param:N` measures the first N points."""

    name = "toy_param"

    def __init__(self, count: str) -> None:
        self.name = f"toy_param:{count}"
        self.count = int(count)

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        x, y = data(self.count)
        return TaskResult.from_samples({"accuracy": (model(x).argmax(1) == y).double().tolist()})


class Held(Accuracy):
    """Holds its labels itself, shifted by some classes."""

    name = "toy/held"

    def __init__(self, shift: int) -> None:
        self.labels = (data()[1] + shift) % OUT

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        right = model(data()[0]).argmax(1) == self.labels
        return TaskResult.from_samples({"accuracy": right.double().tolist()})


def negate(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook."""
    return -output


def _log(line: str) -> None:
    if path := os.environ.get("TOY_LOG"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


@dataclass
class Half:
    """Drops half of the weights."""

    score: str = "magnitude"
    """Which weights matter."""

    def sparsify(self, model: nn.Module) -> Sparsified:
        return Prune(sparsity=0.5, score="random" if self.score == "random" else "magnitude").sparsify(model)


@dataclass(frozen=True)
class ToyConfig:
    """Options of the study."""

    seeds: int = 2
    """How many seeds."""

    levels: tuple[float, ...] = (0.5, 0.9)
    """Sparsities."""


def measured(make: Any, options: ToyConfig, case: dict[str, Any], cells: CellCache) -> dict[str, float]:
    """Accuracy of a trained network after pruning."""
    time.sleep(float(os.environ.get("TOY_SLEEP", "0")))
    _log(f"cell {case['arm']} {case['level']} {case['seed']}")
    model = train(case["seed"], steps=20)
    make(sparsity=case["level"]).sparsify(model)
    return {"accuracy": Accuracy().evaluate(model).metrics["accuracy"].value}


ARMS = {"magnitude": Arm(Prune), "random": Arm(functools.partial(Prune, score="random"))}
STUDY = Study(
    "toy",
    "Toy: pruned networks",
    "Nobody, Journal of Toys 1 (2026)",
    ToyConfig,
    ARMS,
    lambda options: grid(ARMS, options.levels, options.seeds),
    measured,
    claims=[Claim("magnitude beats chance at {level}", "yes", "magnitude", "random")],
    tables=[Grid("Accuracy")],
    plots=[Curves("accuracy", "Accuracy against sparsity", "sparsity (%)", "accuracy (%)")],
    notes=lambda options: ["A note."],
)


@dataclass
class Finetune:
    """Trains a toy a little more; its zeros stay."""

    model: str
    """The model to start from."""

    out: Path
    """Folder of the new bundle."""

    steps: int = 10
    """Training steps."""

    def run(self) -> Path:
        model = load(self.model)
        card = model.zoo_info.card
        x, y = data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with masks_of(model).attach(model, optimizer):
            for _ in range(self.steps):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        metrics = [metric_fields(model, 0, card.to_dict())]
        fields = card.to_dict() | {"name": f"toy/{self.out.name}", "metrics": metrics}
        return save(model, self.out, card=fields)


def metric_fields(model: nn.Module, seed: int, dense: dict[str, Any] | None = None) -> dict[str, Any]:
    """The figure of a card on toy/accuracy."""
    measure = Accuracy().evaluate(model).metrics["accuracy"]
    per_seed = {seed: measure.value}
    mean, spread = mean_and_spread(per_seed)
    fields: dict[str, Any] = {
        "task": "toy/accuracy",
        "metric": "accuracy",
        "split": "all",
        "protocol": "once",
        "value": measure.value,
        "stderr": measure.stderr,
        "per_seed": per_seed,
        "mean": mean,
        "spread": spread,
    }
    if dense is not None:
        metric = dense["metrics"][0]
        if metric.get("dense"):
            fields["dense"] = metric["dense"]
        else:
            figures = {key: metric[key] for key in ("value", "per_seed", "mean", "spread")}
            fields["dense"] = {"name": dense["name"], **figures}
    return fields


def make_bundles(folder: Path) -> dict[str, Path]:
    """A dense toy and two sparse ones with honest cards: `dense`, `half`, `tenth`."""
    model = train(0)
    flops = Accuracy().flops(model)
    common: dict[str, Any] = {
        "name": "toy/dense-mlp",
        "version": "1.0.0",
        "domain": "toy",
        "summary": "A toy.",
        "architecture": {"name": "toy/mlp", "args": {"width": 32}},
        "method": {"name": "dense", "hyperparameters": {}, "seed": 0},
        "cost": {"flops": {"dense": flops.dense, "sparse": flops.sparse}},
        "metrics": [metric_fields(model, 0)],
        "training": {"command": "python -m zoo_toy", "seconds": 1.0},
        "data": {"name": "toy", "source": "generated", "licence": "CC0-1.0"},
        "license": "Apache-2.0",
        "citation": "Nobody, 2026",
    }
    paths = {"dense": save(model, folder / "dense-mlp", card=common)}
    for name, sparsity in (("half", 0.5), ("tenth", 0.9)):
        model = train(0)
        masks = Prune(sparsity=sparsity).sparsify(model).masks
        flops = Accuracy().flops(model)
        fields = common | {
            "name": f"toy/{name}-mlp",
            "method": {"name": "prune", "hyperparameters": {"sparsity": sparsity}, "seed": 0},
            "cost": {"flops": {"dense": flops.dense, "sparse": flops.sparse}},
            "metrics": [metric_fields(model, 0, common)],
            "dense_twin": "toy/dense-mlp",
        }
        paths[name] = save(model, folder / f"{name}-mlp", card=fields, masks=masks)
    return paths
