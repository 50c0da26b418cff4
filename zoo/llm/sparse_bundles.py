"""Makes the sparse bundles of the zoo's own language models, with every seed's figure on the card.

    python -m zoo.llm.sparse_bundles                                   # all of them
    python -m zoo.llm.sparse_bundles --models shakespeare --bundles wanda-50 gqsa-w4s50

A bundle holds the model of calibration seed 0, whatever its rank, and stands on its dense twin: what is the
same is not stored again. Weights stay in the precision of the dense twin, and every figure is measured with
weights rounded to it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from zoo.bundles.card import mean_and_spread
from zoo.bundles.catalog import base_of, find, open_bundle
from zoo.bundles.store import load_bundle, save
from zoo.errors import ConfigError
from zoo.harness.evidence import record_evidence
from zoo.harness.making import Origin, make_bundle
from zoo.harness.runner import evaluate
from zoo.names import suggestion
from zoo.progress import progress_bar
from zoo.registry import METHODS

EVIDENCE = "benchmarks/results/llm-bundles.json"


@dataclass(frozen=True)
class Recipe:
    """One bundle of each model: method, options, what the card says of it, and whom to cite.

    `thresholds` says that activations are sparse, too: the card then states what they spare.
    """

    method: str
    options: dict[str, Any]
    summary: str
    citation: str
    thresholds: bool = False


_WANDA = (
    "Mingjie Sun, Zhuang Liu, Anna Bair, J. Zico Kolter. A Simple and Effective Pruning Approach for Large "
    "Language Models. ICLR 2024."
)
_SPARSEGPT = (
    "Elias Frantar, Dan Alistarh. SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot. "
    "ICML 2023."
)
_CFSP = (
    "Yuxin Wang et al. CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine "
    "Activation Information. COLING 2025."
)
_GQSA = (
    "Chao Zeng et al. GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference. "
    "arXiv 2412.17560."
)
_CHESS = (
    "Junhui He et al. CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective "
    "Sparsification. EMNLP 2024."
)
_CATS = (
    "Donghyun Lee et al. CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models. "
    "COLM 2024."
)
RECIPES = {
    **{
        f"chess-{percent}": Recipe(
            "chess",
            {"sparsity": percent / 100},
            f"{percent} % of the FFN gates closed by CHESS, and half that share of the inputs of q and o "
            "dropped; weights dense",
            _CHESS,
            thresholds=True,
        )
        for percent in (30, 50, 70)
    },
    "cats-50": Recipe(
        "cats",
        {"sparsity": 0.5},
        "half of the FFN gates closed by CATS; weights dense",
        _CATS,
        thresholds=True,
    ),
    "wanda-50": Recipe(
        "wanda", {"sparsity": 0.5}, "half of the blocks' weights zero by Wanda, without training", _WANDA
    ),
    "wanda-2to4": Recipe("wanda", {"pattern": "2:4"}, "2:4 sparse by Wanda, without training", _WANDA),
    "sparsegpt-50": Recipe(
        "sparsegpt",
        {"sparsity": 0.5},
        "half of the blocks' weights zero by SparseGPT, without training",
        _SPARSEGPT,
    ),
    "cfsp-20": Recipe("cfsp", {"ratio": 0.2}, "a fifth of the FFN channels cut by CFSP", _CFSP),
    "cfsp-40": Recipe("cfsp", {"ratio": 0.4}, "two fifths of the FFN channels cut by CFSP", _CFSP),
    "gqsa-w4s50": Recipe(
        "gqsa", {"sparsity": 0.5}, "half of the groups of 16 weights zero and the others in four bits", _GQSA
    ),
}


@dataclass(frozen=True)
class SparseBundles:
    """Which bundles to make.

    Args:
        models: dense twins, `llm/dense-MODEL`.
        bundles: see `RECIPES`; by default all.
        seeds: calibration seeds, from 0.
        out: folder of the bundles.
        evidence: file that collects the values of every seed.
        threads: processor threads.
    """

    models: tuple[str, ...] = ("shakespeare", "stories")
    bundles: tuple[str, ...] = tuple(RECIPES)
    seeds: int = 3
    out: Path = Path(__file__).parent / "cards"
    evidence: Path = Path(__file__).parents[2] / EVIDENCE
    threads: int = 1


def make(model: str, slug: str, config: SparseBundles) -> Path:
    """Make one bundle and record its figures.

    Raises:
        ConfigError: an unknown bundle.
        UnknownNameError: no such dense twin.
    """
    if slug not in RECIPES:
        raise ConfigError(f"Unknown bundle {slug!r}. {suggestion(slug, RECIPES)}")
    recipe = RECIPES[slug]
    source = find(f"llm/dense-{model}")
    method: Any = METHODS.get(recipe.method)(**recipe.options)
    name = f"llm/{slug}-{model}"
    command = f"python -m zoo.llm.sparse_bundles --models {model} --bundles {slug}"
    path = config.out / f"{slug}-{model}"
    make_bundle(source, method, Origin(name, recipe.method, command), path, share=True, overwrite=True)
    if recipe.thresholds:
        _add_spared(path, config)
    figures = {(m.task, m.metric): dict(m.per_seed) for m in open_bundle(path).card.metrics}
    for seed in range(1, config.seeds):
        made = dataclasses.replace(method, seed=seed).sparsify(load_bundle(source))
        for record in evaluate(made.model, list(dict.fromkeys(task for task, _ in figures))):
            for (task, metric), per_seed in figures.items():
                if task == record.task:
                    per_seed[seed] = record.metrics[metric].value
    _rewrite(path, source.card.summary.rstrip("."), recipe, figures, config)
    return path


def _add_spared(path: Path, config: SparseBundles) -> None:
    """Put what the thresholds spare on held-out text on the card; they spare nothing in the dense twin."""
    bundle = open_bundle(path)
    fields = bundle.card.to_dict()
    dense = fields["metrics"][0]["dense"]
    task = "llm/sparsity-" + fields["metrics"][0]["task"].partition("/")[2]
    nothing = dict.fromkeys(dense["per_seed"], 0.0)
    record = evaluate(load_bundle(bundle), [task])[0]
    for metric, measure in record.metrics.items():
        twin = {"name": dense["name"], "value": 0.0, "per_seed": nothing, "mean": 0.0, "spread": 0.0}
        fields["metrics"].append(
            {
                "task": task,
                "metric": metric,
                "split": "test",
                "protocol": "first window of each test document; float32 arithmetic on stored weights",
                "value": measure.value,
                "stderr": measure.stderr or 0.0,
                "per_seed": {0: measure.value},
                "mean": measure.value,
                "spread": 0.0,
                "dense": twin,
            }
        )
        record_evidence(config.evidence, dense["name"].partition("@")[0], task, metric, nothing)
    save(load_bundle(bundle), path, card=fields, base=base_of(bundle), overwrite=True)


def _rewrite(
    path: Path,
    dense: str,
    recipe: Recipe,
    figures: dict[tuple[str, str], dict[int, float]],
    config: SparseBundles,
) -> None:
    """Put all seeds' figures on the card, and into the evidence."""
    bundle = open_bundle(path)
    fields = bundle.card.to_dict()
    for entry in fields["metrics"]:
        per_seed = figures[entry["task"], entry["metric"]]
        mean, spread = mean_and_spread(per_seed)
        entry.update(per_seed=per_seed, mean=mean, spread=spread)
        record_evidence(config.evidence, fields["name"], entry["task"], entry["metric"], per_seed)
    fields |= {
        "summary": f"{dense}: {recipe.summary}.",
        "citation": recipe.citation,
        "evidence": EVIDENCE,
    }
    save(load_bundle(bundle), path, card=fields, base=base_of(bundle), overwrite=True)


def main(config: SparseBundles) -> None:
    """Make all that are asked for."""
    torch.set_num_threads(config.threads)
    work = [(model, slug) for model in config.models for slug in config.bundles]
    with progress_bar() as progress:
        for done, (model, slug) in enumerate(work):
            progress(done, len(work), f"{slug}-{model}")
            make(model, slug, config)


if __name__ == "__main__":
    main(tyro.cli(SparseBundles, description=__doc__))
