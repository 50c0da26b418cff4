"""Cards and bundles from trained models: every figure measured, beside those of the dense twin.

publish(
    Trained({0: model}, {"name": "graph/gcn", "args": {...}}, method="teddy", seconds=12.0),
    About("graph/mine", "A GCN.", "zoo make graph/mine", citation="...", data={...}),
    [Figure("graph/digits")],
    Path("out/mine"),
    twin=find("graph/dense-gcn-digits"),
)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zoo.bundles.card import Card, Metric, mean_and_spread
from zoo.bundles.catalog import Bundle, find, open_bundle, twin_of
from zoo.bundles.levels import level_model
from zoo.bundles.provenance import environment
from zoo.bundles.public import Base as Standing
from zoo.bundles.store import load_bundle, save
from zoo.errors import ConfigError, TaskError
from zoo.harness.evidence import record_evidence
from zoo.harness.records import Record
from zoo.harness.runner import evaluate
from zoo.harness.tasks import get_task
from zoo.harness.workers import workers
from zoo.methods.contract import Sparsified
from zoo.shared.masks import MaskSet, masks_of, nested


@dataclass(frozen=True)
class Trained:
    """A finished training, with as many seeds as it was run.

    Attributes:
        models: the model of each seed; the first one is stored, the others are measured.
        architecture: `name` and `args` of the stored model.
        method: registered name of the method; `dense` for none.
        hyperparameters: what decided the weights.
        seconds: that training took, all seeds together.
        masks: of the stored model; None for those that it carries.
        extras: further tensors that belong to it; None for those that it was loaded with.
        parts: of the sparsity that no mask among the above counts.
        levels: of a nested model, by seed: the extra tensors of its further levels.
    """

    models: Mapping[int, nn.Module]
    architecture: Mapping[str, Any]
    method: str = "dense"
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    masks: MaskSet | None = None
    extras: Mapping[str, Tensor] | None = None
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    levels: Mapping[int, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)

    @classmethod
    def by_method(
        cls, made: Mapping[int, Sparsified], method: str, architecture: Mapping[str, Any], seconds: float
    ) -> Trained:
        """What a method made with each seed; the first one's masks, extras and options go on the card."""
        first = next(iter(made.values()))
        arguments = architecture["args"] if first.arguments is None else first.arguments
        return cls(
            {seed: one.model for seed, one in made.items()},
            {"name": architecture["name"], "args": arguments},
            method,
            first.hyperparameters,
            seconds,
            first.masks,
            first.extras,
            first.parts,
            {seed: nested.level_extras(one.extras) for seed, one in made.items()},
        )

    def at(self, number: int) -> Mapping[int, nn.Module]:
        """The model of each seed at a level."""
        if number == 0:
            return self.models
        return {seed: level_model(model, self.levels[seed], number) for seed, model in self.models.items()}

    @property
    def seed(self) -> int:
        """Seed of the stored model."""
        return next(iter(self.models))

    @property
    def model(self) -> nn.Module:
        """The stored model."""
        return self.models[self.seed]


@dataclass(frozen=True)
class About:
    """What a card says that is not measured.

    Attributes:
        name: `domain/slug`.
        summary: one sentence.
        command: that makes the bundle.
        citation: of the method.
        data: name, source and licence of what it was trained on.
        license: of the weights.
        version: of the bundle.
        imported: the published file that they were read from (`zoo.bundles.card.Imported`), if any.
        formerly: names that the bundle had before.
    """

    name: str
    summary: str
    command: str
    citation: str
    data: Mapping[str, str]
    license: str = "Apache-2.0"
    version: str = "1.0.0"
    imported: Mapping[str, str] | None = None
    formerly: tuple[str, ...] = ()

    @classmethod
    def like(cls, card: Card, name: str, summary: str, command: str) -> About:
        """With the citation, data and licence of a card."""
        return cls(name, summary, command, card.citation, card.data.model_dump(), card.license)


@dataclass(frozen=True)
class Figure:
    """What is measured.

    Attributes:
        task: registered name of the task.
        metrics: which of its metrics go on the card; none means its primary one.
        protocol: how the model was trained and chosen, and what is measured on.
        split: of the data.
    """

    task: str
    metrics: tuple[str, ...] = ()
    protocol: str = "as the task defines it"
    split: str = "test"

    def names(self) -> tuple[str, ...]:
        """The metrics."""
        return self.metrics or (get_task(self.task).primary,)


@dataclass(frozen=True)
class Evidence:
    """The file in which the figures of every seed are recorded.

    Attributes:
        repository: folder of the source checkout.
        path: of the file in it, as the card states it.
    """

    repository: Path
    path: str

    def record(self, model: str, task: str, metric: str, per_seed: Mapping[int, float]) -> None:
        """Put in the values of a model."""
        record_evidence(self.repository / self.path, model, task, metric, per_seed)


def figures_of(card: Card) -> list[Figure]:
    """What a card has figures of."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for metric in card.metrics:
        found.setdefault((metric.task, metric.protocol, metric.split), []).append(metric.metric)
    return [Figure(task, tuple(names), protocol, split) for (task, protocol, split), names in found.items()]


def require_data(figures: Sequence[Figure]) -> None:
    """Refuse figures whose data are not at hand, before any work is done for them.

    Raises:
        MissingDataError, DataError: of the first task whose data cannot be had.
    """
    for task in dict.fromkeys(figure.task for figure in figures):
        get_task(task).measured_on()


def publish(
    trained: Trained,
    about: About,
    figures: Sequence[Figure],
    out: str | Path,
    *,
    twin: Bundle | None = None,
    base: Standing | None = None,
    evidence: Evidence | None = None,
    overwrite: bool = False,
) -> Path:
    """Measure a trained model with all its seeds and write its bundle.

    The dense twin's figures are those on its card; what that lacks is measured on the twin. Among several
    processes all take part in measuring, and the first one writes.

    Args:
        trained: the models.
        about: what cannot be measured.
        figures: what to measure; the operations are those of the first task.
        out: folder of the bundle; its parents are made.
        twin: the dense model that stands beside it; None for a dense one.
        base: a bundle or public model whose tensors are not stored again; see `zoo.save`.
        evidence: where the values of every seed are recorded, as the card will say; None for nowhere.
        overwrite: whether a bundle that is there may be replaced.

    Returns:
        The folder.

    Raises:
        TaskError: a task that gives no such metric, or counts no operations where the twin's are not known.
        SparseError: whatever measuring and saving refuse.
    """
    dense = _Twin(twin, evidence) if twin is not None else None
    levels = [
        _level(trained.at(number), figures, twin, dense)
        for number in range(1 + nested.count_levels(trained.levels.get(trained.seed, {})))
    ]
    fields = {
        "name": about.name,
        "version": about.version,
        "domain": about.name.partition("/")[0],
        "summary": about.summary,
        "architecture": dict(trained.architecture),
        "method": {
            "name": trained.method,
            "hyperparameters": dict(trained.hyperparameters),
            "seed": trained.seed,
        },
        "sparsity": {"parts": dict(trained.parts)},
        **levels[0],
        "levels": levels[1:],
        "dense_twin": twin.card.name if twin is not None else None,
        "training": {
            "command": about.command,
            "seconds": round(trained.seconds, 3),
            "environment": environment(),
        },
        "data": dict(about.data),
        "license": about.license,
        "citation": about.citation,
        "evidence": evidence.path if evidence is not None else None,
        "imported": dict(about.imported) if about.imported is not None else None,
        "formerly": list(about.formerly),
    }
    team = workers()
    if team.index == 0:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        save(
            trained.model,
            out,
            card=fields,
            masks=trained.masks,
            extras=trained.extras,
            base=base,
            overwrite=overwrite,
        )
        if evidence is not None:
            bundle = open_bundle(Path(out))
            for number, level in enumerate(levels):
                at = bundle if number == 0 else bundle.at_level(number)
                for metric in level["metrics"]:
                    evidence.record(at.label, metric["task"], metric["metric"], metric["per_seed"])
    team.gather([None])  # the others wait for the bundle
    return Path(out)


def _level(
    models: Mapping[int, nn.Module], figures: Sequence[Figure], twin: Bundle | None, dense: _Twin | None
) -> dict[str, Any]:
    """What the models of all seeds give at one level; the first one is stored."""
    stored, tasks = next(iter(models)), list(dict.fromkeys(figure.task for figure in figures))
    measured = {seed: _measure(model, tasks) for seed, model in models.items()}
    return {
        "cost": cost_beside(models[stored], tasks[0], twin.card if twin is not None else None),
        "metrics": [
            _metric(figure, name, measured, dense, stored) for figure in figures for name in figure.names()
        ],
    }


def publish_like(
    model: nn.Module,
    out: str | os.PathLike[str],
    like: Bundle | str | os.PathLike[str],
    *,
    masks: MaskSet | None = None,
    extras: Mapping[str, Tensor] | None = None,
    base: Standing | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a changed model as a bundle like another one: its figures measured on this model, one seed.

    What the command, the evidence and the other seeds of that bundle state is of its own model and left out.

    Args:
        model: of the bundle's architecture.
        out: folder of the new bundle, whose name goes on the card.
        like: the bundle.
        masks, extras, base, overwrite: as for `zoo.save`.
    """
    source = like if isinstance(like, Bundle) else find(like)
    card, folder = source.card, Path(out)
    if not card.metrics:
        raise ConfigError(f"{card.name} has no figures to measure again: save the model without like=")
    kept = masks if masks is not None else masks_of(model)
    twin = twin_of(source) if card.dense_twin is not None else source if kept else None
    trained = Trained(
        {card.seed: model},
        card.architecture.model_dump(),
        "own" if twin is not None and card.method.name == "dense" else card.method.name,
        card.method.hyperparameters,
        masks=masks,
        extras=extras,
        parts={name: part.model_dump() for name, part in card.sparsity.parts.items()},
    )
    command = f"zoo.save(model, {folder.name!r}, like={card.reference!r})"
    about = About.like(card, f"{card.domain}/{folder.name}", f"{card.name}, changed by its owner.", command)
    return publish(trained, about, figures_of(card), folder, twin=twin, base=base, overwrite=overwrite)


class _Twin:
    """Figures of a dense twin: from its card, else measured once."""

    def __init__(self, bundle: Bundle, evidence: Evidence | None) -> None:
        self.bundle, self.evidence = bundle, evidence
        self.measured: dict[str, Record] = {}

    def figure(self, task: str, metric: str) -> dict[str, Any]:
        """The fields of `DenseFigure`."""
        card = self.bundle.card
        known = next((m for m in card.metrics if (m.task, m.metric) == (task, metric)), None)
        if known is not None:
            return {"name": card.name, **_values(known)}
        if task not in self.measured:
            self.measured |= _measure(load_bundle(self.bundle), [task])
        value = _value(self.measured[task], metric)[0]
        per_seed = {card.seed: value}
        if self.evidence is not None:
            self.evidence.record(card.name, task, metric, per_seed)
        return {"name": card.name, "value": value, **summary_of(per_seed)}


def summary_of(per_seed: Mapping[int, float]) -> dict[str, Any]:
    """The fields of a figure that follow from its values per seed; one seed has no spread."""
    mean, spread = mean_and_spread(per_seed)
    return {"per_seed": dict(per_seed), "mean": mean, "spread": spread}


def _values(metric: Metric) -> dict[str, Any]:
    return {key: getattr(metric, key) for key in ("value", "per_seed", "mean", "spread")}


def _measure(model: nn.Module, tasks: Iterable[str]) -> dict[str, Record]:
    return {record.task: record for record in evaluate(model, list(tasks))}


def _value(record: Record, metric: str) -> tuple[float, float]:
    """Value and standard error (0 where the task gives none)."""
    if metric not in record.metrics:
        raise TaskError(f"task {record.task} gives no {metric!r}; it gives {', '.join(record.metrics)}")
    found = record.metrics[metric]
    return found.value, found.stderr or 0.0


def _metric(
    figure: Figure, name: str, measured: Mapping[int, Mapping[str, Record]], dense: _Twin | None, stored: int
) -> dict[str, Any]:
    """The fields of `Metric`."""
    values = {seed: _value(records[figure.task], name) for seed, records in measured.items()}
    fields: dict[str, Any] = {
        "task": figure.task,
        "metric": name,
        "split": figure.split,
        "protocol": figure.protocol,
        "value": values[stored][0],
        "stderr": values[stored][1],
        **summary_of({seed: value for seed, (value, _) in values.items()}),
    }
    if dense is not None:
        fields["dense"] = dense.figure(figure.task, name)
    return fields


def cost_beside(model: nn.Module, task: str, twin: Card | None) -> dict[str, Any]:
    """The fields of `Cost` that `save` does not count.

    Dense figures are the larger of the model's own and its twin's: a network that was cut states those of its
    twin, a wider one its own.

    Raises:
        TaskError: the task counts no operations of the model, and there is no twin that states them.
    """
    flops = get_task(task).flops(model)
    if flops is None and twin is None:
        raise TaskError(f"{task} counts no operations of {type(model).__name__}")
    known = twin.cost.flops.dense if twin is not None and twin.cost.flops is not None else 0
    cost: dict[str, Any] = {
        # A task that counts no operations cannot say what was saved: the dense figure stands for both.
        "flops": {
            "dense": max(flops.dense, known) if flops else known,
            "sparse": flops.sparse if flops else known,
        },
        "parameters": {},
        "bytes": {},
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if twin is not None:
        cost["bytes"]["dense"] = twin.cost.bytes.dense  # `save` states its own where they are more
        if parameters < twin.cost.parameters.dense:
            cost["parameters"]["dense"] = twin.cost.parameters.dense
    return cost
