"""Makes the graph bundles of the zoo: dense twins and TEDDY tickets, with every seed's figure on the card.

    python -m zoo.graph.pretrain                                     # all of them
    python -m zoo.graph.pretrain --architectures gcn --datasets cora

Each training is kept in the cells folder as it finishes, so that an interrupted run goes on. The bundle holds
the model of seed 0, whatever its rank; weights are stored in half precision, and every figure, each seed's
included, is measured with weights rounded to it.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file, save
from torch import Tensor
from torch_geometric.data import Data

from zoo.bundles.card import mean_and_spread
from zoo.bundles.catalog import cache_folder, open_bundle
from zoo.bundles.store import save as save_bundle
from zoo.errors import TaskError
from zoo.graph.arms import ARCHITECTURES, edge_mask, new_model
from zoo.graph.data import SOURCES, load_graph
from zoo.graph.models import GraphModel
from zoo.graph.ticket import EdgeTicket
from zoo.graph.train import Best, Fit, L0Ball, TrainConfig, accuracy_of
from zoo.harness.evidence import record_evidence
from zoo.harness.tasks import get_task
from zoo.progress import progress_bar
from zoo.shared.masks import MaskSet, set_masks
from zoo.shared.store.io import atomic_write

CITATION = (
    "Hyunjin Seo, Jihun Yun, Eunho Yang. "
    "TEDDY: Trimming Edges with Degree-based Discrimination Strategy. ICLR 2024."
)
# The larger graphs, whose trainings take up to two minutes each.
_MOST_SEEDS = {"citeseer": 3, "cs": 3}
EVIDENCE = "benchmarks/results/graph-bundles.json"
_TITLES = {"gcn": "GCN", "gin": "GIN", "gat": "GAT"}


@dataclass(frozen=True)
class Recipe:
    """One training: everything that decides its outcome."""

    architecture: str
    dataset: str
    hidden: int
    seed: int
    edges: int = 0
    weights: int = 0
    epochs: int = 200
    distillation: float = 1.0

    @property
    def dense(self) -> bool:
        return self.edges == 0 and self.weights == 0

    def slug(self) -> str:
        """Name of the bundle without its domain."""
        if self.dense:
            return f"dense-{self.architecture}-{self.dataset}"
        return f"teddy-{self.architecture}-{self.dataset}-g{self.edges}-w{self.weights}"


@dataclass(frozen=True)
class Trained:
    """A finished training, its weights in half precision."""

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    logits: Tensor
    keep: Tensor
    facts: dict[str, Any]


def hidden_width(architecture: str, dataset: str) -> int:
    """128; 64 for GAT (8 heads of 8) and for Coauthor-CS, whose 6,805 features would make files of
    megabytes.
    """
    return 64 if architecture == "gat" or dataset == "cs" else 128


def train(recipe: Recipe, data: Data, folder: Path) -> Trained:
    """The training of a recipe, from the cells folder if it is there."""
    stem = "-".join(str(value) for value in asdict(recipe).values())
    file = folder / f"{stem}.safetensors"
    if not file.exists():
        best, keep, seconds = _fit(recipe, data, folder)
        tensors = {f"weights/{k}": v.half() for k, v in best.weights.items()}
        tensors |= {f"masks/{k}": v for k, v in best.masks.items()}
        tensors |= {"logits": best.logits, "keep": keep}
        facts = {"epoch": best.epoch, "val": best.val_accuracy, "seconds": seconds}
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / f"{stem}.json", json.dumps(facts).encode())
        atomic_write(file, save(tensors))
    tensors = load_file(file)
    return Trained(
        weights={k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")},
        masks={k.removeprefix("masks/"): v for k, v in tensors.items() if k.startswith("masks/")},
        logits=tensors["logits"],
        keep=tensors["keep"],
        facts=json.loads(file.with_suffix(".json").read_text()),
    )


def _fit(recipe: Recipe, data: Data, folder: Path) -> tuple[Best, Tensor, float]:
    teacher = None
    if not recipe.dense:
        dense = Recipe(recipe.architecture, recipe.dataset, recipe.hidden, recipe.seed, epochs=recipe.epochs)
        teacher = train(dense, data, folder).logits
    keep = edge_mask(recipe.architecture, data, recipe.edges / 100, "teddy", recipe.seed)
    model = new_model(recipe.architecture, data, recipe.hidden, recipe.seed)
    constraint = None if recipe.dense else L0Ball.for_sparsity(model, recipe.weights / 100)
    config = TrainConfig(recipe.epochs, distillation=0.0 if recipe.dense else recipe.distillation)
    start = time.process_time()
    best = Fit(model, data, config, keep=keep, teacher=teacher, constraint=constraint).run()
    return best, keep, time.process_time() - start


def restore(recipe: Recipe, data: Data, trained: Trained) -> GraphModel:
    """The trained model, weights in half precision, masks and ticket in place."""
    model = new_model(recipe.architecture, data, recipe.hidden, recipe.seed)
    model.half().load_state_dict(trained.weights)
    if not recipe.dense:
        masks = MaskSet(trained.masks)
        masks.apply_(model)
        set_masks(model, masks)
        model.ticket = EdgeTicket.draw(data.edge_index, int(data.num_nodes), trained.keep)
    return model.eval()


def test_accuracy(model: GraphModel, data: Data) -> float:
    """Accuracy on the test nodes."""
    with torch.no_grad():
        logits = model(*model.prepare(data.x, data.edge_index))
    return accuracy_of(logits, data.y, data.test_mask.nonzero().flatten())


def write_bundle(recipes: list[Recipe], config: Pretrain, data: Data, folder: Path) -> Path:
    """Save the model of the first recipe as a bundle whose card has the figures of all of them."""
    first = recipes[0]
    trained = [train(recipe, data, folder) for recipe in recipes]
    per_seed = {
        recipe.seed: test_accuracy(restore(recipe, data, one), data)
        for recipe, one in zip(recipes, trained, strict=True)
    }
    model = restore(first, data, trained[0])
    extras = model.ticket.to_extras() if model.ticket is not None else {}
    seconds = sum(one.facts["seconds"] for one in trained)
    fields = _card(first, config, model, data, per_seed, seconds)
    path = save_bundle(model, config.out / first.slug(), card=fields, extras=extras, overwrite=True)
    metric = fields["metrics"][0]
    record_evidence(config.evidence, fields["name"], metric["task"], metric["metric"], per_seed)
    return path


def _card(
    recipe: Recipe,
    config: Pretrain,
    model: GraphModel,
    data: Data,
    per_seed: dict[int, float],
    seconds: float,
) -> dict[str, Any]:
    task = get_task(f"graph/{recipe.dataset}")
    measured = task.evaluate(model).metrics["accuracy"]
    flops = task.flops(model)
    if flops is None:
        raise TaskError(f"{task.name} counts no operations of {type(model).__name__}.")
    mean, spread = mean_and_spread(per_seed)
    metric: dict[str, Any] = {
        "task": task.name,
        "metric": "accuracy",
        "split": "test",
        "protocol": "full batch, epoch of best validation accuracy, weights in half precision",
        "value": measured.value,
        "stderr": measured.stderr or 0.0,
        "per_seed": per_seed,
        "mean": mean,
        "spread": spread,
    }
    title, source = _TITLES[recipe.architecture], SOURCES[recipe.dataset]
    hyperparameters = {"epochs": recipe.epochs, "lr": 0.01, "weight_decay": 5e-4}
    if recipe.dense:
        method, summary, twin = "dense", f"Dense {title} on {source.title}.", None
    else:
        method = "teddy"
        summary = (
            f"{title} on {source.title}: {recipe.edges} % of the edges dropped by degree before training, "
            f"{recipe.weights} % of the weights zero."
        )
        hyperparameters |= {
            "edge_sparsity": recipe.edges / 100,
            "weight_sparsity": recipe.weights / 100,
            "distillation": recipe.distillation,
        }
        dense = Recipe(recipe.architecture, recipe.dataset, recipe.hidden, 0)
        twin = f"graph/{dense.slug()}"
        metric["dense"] = _dense_figure(config.out / dense.slug(), twin)
    command = (
        f"python -m zoo.graph.pretrain --architectures {recipe.architecture} --datasets {recipe.dataset}"
    )
    return {
        "name": f"graph/{recipe.slug()}",
        "version": "1.0.0",
        "domain": "graph",
        "summary": summary,
        "architecture": {"name": f"graph/{recipe.architecture}", "args": _arguments(recipe, data)},
        "method": {"name": method, "hyperparameters": hyperparameters, "seed": recipe.seed},
        "cost": {"parameters": {}, "flops": {"dense": flops.dense, "sparse": flops.sparse}, "bytes": {}},
        "metrics": [metric],
        "dense_twin": twin,
        "training": {"command": command, "seconds": round(seconds, 1)},
        "data": {"name": source.title, "source": source.origin, "licence": source.licence},
        "license": "Apache-2.0",
        "citation": CITATION,
        "evidence": EVIDENCE,
    }


def _dense_figure(folder: Path, name: str) -> dict[str, Any]:
    metric = open_bundle(folder).card.metrics[0]
    figure = {key: getattr(metric, key) for key in ("value", "per_seed", "mean", "spread")}
    return {"name": name, **figure}


def _arguments(recipe: Recipe, data: Data) -> dict[str, int]:
    """The architecture's arguments, as `new_model` gives them."""
    hidden = recipe.hidden // 8 if recipe.architecture == "gat" else recipe.hidden
    return {
        "in_channels": int(data.x.shape[1]),
        "hidden_channels": hidden,
        "out_channels": int(data.y.max()) + 1,
    }


@dataclass(frozen=True)
class Pretrain:
    """Which bundles to make.

    Args:
        architectures: of gcn, gin, gat.
        datasets: of cora, citeseer, cs, digits.
        sparsities: (edges, weights) of each ticket, in percent.
        seeds: how many seeds, from 0; CiteSeer and Coauthor-CS get at most 3.
        out: folder of the bundles.
        evidence: file that collects the values of every seed.
        cells: folder of finished trainings; by default in the cache.
        threads: processor threads; graphs this small are fastest on one.
    """

    architectures: tuple[str, ...] = ARCHITECTURES
    datasets: tuple[str, ...] = ("digits", "cora", "citeseer", "cs")
    sparsities: tuple[tuple[int, int], ...] = ((30, 80), (60, 95))
    seeds: int = 5
    out: Path = Path(__file__).parent / "cards"
    evidence: Path = Path(__file__).parents[2] / EVIDENCE
    cells: Path | None = None
    threads: int = 1

    def recipes(self) -> list[list[Recipe]]:
        """The recipes of each bundle, one for each seed; a dense twin comes before its tickets."""
        bundles = []
        for dataset, architecture in itertools.product(self.datasets, self.architectures):
            hidden, seeds = hidden_width(architecture, dataset), self.seeds
            seeds = min(seeds, _MOST_SEEDS.get(dataset, seeds))
            for edges, weights in ((0, 0), *self.sparsities):
                one = [Recipe(architecture, dataset, hidden, s, edges, weights) for s in range(seeds)]
                bundles.append(one)
        return bundles


def main(config: Pretrain) -> None:
    """Train what is missing and write the bundles."""
    torch.set_num_threads(config.threads)
    folder = config.cells or cache_folder() / "cells" / "graph-pretrain"
    bundles = config.recipes()
    done, total = 0, sum(map(len, bundles))
    with progress_bar() as progress:
        for recipes in bundles:
            data = load_graph(recipes[0].dataset)
            for recipe in recipes:
                train(recipe, data, folder)
                done += 1
                progress(done, total, f"{recipe.slug()} seed {recipe.seed}")
            write_bundle(recipes, config, data, folder)


if __name__ == "__main__":
    main(tyro.cli(Pretrain, description=__doc__))
