"""Checks of values per seed: against the card's own statements, the twin's card, the committed results, and
models that the recipe makes again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from zoo.bundles.card import Card, mean_and_spread
from zoo.bundles.catalog import Bundle, cache_folder
from zoo.bundles.levels import level_model
from zoo.bundles.make import Target, train_seeds
from zoo.bundles.recipes import find_row
from zoo.harness.checks import Check, close, listed, same_values, stated
from zoo.harness.runner import evaluate
from zoo.methods.contract import Sparsified
from zoo.shared.store.io import read_json

REPOSITORY = Path(__file__).parents[2]


def seed_checks(card: Card, twin: Card | None, tolerance: float) -> Iterator[Check]:
    """Means and spreads against the values per seed, and the twin's values against its own card."""
    for metric in card.metrics:
        label = f"{metric.task}: {metric.metric}"
        for name, figure in (("", metric), (", dense twin", metric.dense)):
            if figure is None or len(figure.per_seed) == 1:
                continue
            mean, spread = mean_and_spread(figure.per_seed)
            yield stated(f"{label}{name}, mean of {len(figure.per_seed)} seeds", figure.mean, mean)
            yield stated(f"{label}{name}, spread", figure.spread or 0.0, spread or 0.0)
        if metric.dense is not None and twin is not None:
            known = next(
                (m for m in twin.metrics if (m.task, m.metric) == (metric.task, metric.metric)),
                None,
            )
            if known is not None:
                name = f"{label} per seed, card of {twin.name}"
                yield same_values(
                    name, metric.dense.per_seed, known.per_seed, tolerance, "by the twin's card"
                )


def evidence_checks(bundle: Bundle, tolerance: float) -> Iterator[Check]:
    """The values per seed against the committed results; see `zoo.harness.evidence`."""
    card = bundle.card
    several = [metric for metric in card.metrics if len(metric.per_seed) > 1]
    stored, why = _recorded(card)
    if stored is None:
        for metric in several:
            seeds = [seed for seed in metric.per_seed if seed != card.seed]
            label = f"{metric.task}: {metric.metric}, seeds {', '.join(map(str, seeds))}"
            yield Check(label, listed({seed: metric.per_seed[seed] for seed in seeds}), "", None, why)
        return
    for metric in card.metrics:
        figures: list[tuple[str, Any]] = [(bundle.label, metric)]
        if metric.dense is not None:
            figures.append((metric.dense.name.partition("@")[0], metric.dense))
        for name, figure in figures:
            values = stored.get(name, {}).get(metric.task, {}).get(metric.metric, {})
            label = f"{metric.task}: {metric.metric} per seed, evidence of {name}"
            known = {int(seed): value for seed, value in values.items()}
            yield same_values(label, figure.per_seed, known, tolerance, f"by {card.evidence}")


def remade_checks(bundle: Bundle, tolerance: float) -> Iterator[Check]:
    """The values per seed against those of models that the bundle's recipe makes again."""
    card = bundle.card
    kept = train_seeds(find_row(card.name), Target(cache_folder() / "verify"))
    names = list(dict.fromkeys(metric.task for metric in card.metrics))
    measured = {
        seed: {record.task: record for record in evaluate(_at(bundle, one.made), names, use_cache=False)}
        for seed, one in kept.items()
    }
    for metric in card.metrics:
        for seed in sorted({*metric.per_seed, *measured}):
            label = f"{metric.task}: {metric.metric}, seed {seed} made again"
            if seed not in measured or seed not in metric.per_seed:
                lacks = "the card" if seed in measured else "the recipe"
                yield Check(label, "", "", False, f"{lacks} has no seed {seed}")
                continue
            value = measured[seed][metric.task].metrics[metric.metric].value
            yield close(label, metric.per_seed[seed], value, tolerance)


def _at(bundle: Bundle, made: Sparsified) -> nn.Module:
    return level_model(made.model, made.extras, bundle.level) if bundle.level else made.model


def _recorded(card: Card) -> tuple[dict[str, Any] | None, str]:
    """The values per seed in the file that the card names, or None and why there are none."""
    if card.evidence is None:
        return None, "the card names no evidence, and the bundle holds the model of one seed"
    path = REPOSITORY / card.evidence
    if not path.is_file():
        return None, f"{card.evidence} is not at hand: only a source checkout has the committed results"
    recorded = read_json(path)
    if not isinstance(recorded, dict) or "per_seed" not in recorded:
        return None, f"{card.evidence} has no values under 'per_seed'"
    return recorded["per_seed"], ""
