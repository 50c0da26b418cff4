"""Comparison of models on the same samples, with what the test could have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from zoo.bundles.store import Execution
from zoo.errors import ConfigError, TaskError
from zoo.harness.records import Record
from zoo.harness.runner import evaluate
from zoo.harness.subjects import Models, resolve
from zoo.harness.tasks import Progress, Task, get_task
from zoo.report import numbers
from zoo.studies.stats import Difference, paired_difference
from zoo.studies.tables import Table

Outcome = Literal["better", "worse", "no difference seen"]


@dataclass(frozen=True)
class Comparison:
    """One model against the reference on one metric of one task.

    Attributes:
        difference: model minus reference, with its interval, test and the smallest difference it could have
            seen.
        direction: +1 where higher is better.
        margin: by how much the model may be worse; None when nothing was asked.
    """

    task: str
    metric: str
    model: str
    reference: str
    value: float
    reference_value: float
    difference: Difference
    direction: int
    margin: float | None = None

    @property
    def verdict(self) -> Outcome:
        """Better or worse only if interval and test both say so."""
        if not self.difference.seen:
            return "no difference seen"
        return "better" if self.difference.value * self.direction > 0 else "worse"

    @property
    def within_margin(self) -> bool | None:
        """Whether the whole interval lies above `-margin`: the model is shown to be at most that much
        worse."""
        if self.margin is None:
            return None
        worst = self.difference.low if self.direction > 0 else -self.difference.high
        return worst >= -self.margin


def compare(
    models: Models,
    task: str | Task | None = None,
    *,
    metric: str | None = None,
    execution: Execution = "masked",
    margin: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    use_cache: bool | None = None,
    progress: Progress | None = None,
) -> list[Comparison]:
    """Compare models sample by sample; the first is the reference. One model alone is compared with its
    dense twin.

    Args:
        models: two or more names, globs, folders or modules, or one that has a dense twin.
        task: on which; by default all tasks that the models' cards share.
        metric: which metric; by default the task's primary one.
        execution: `masked` or `packed`.
        margin: by how much a model may be worse (in the metric's unit); see `Comparison.within_margin`.
        confidence: of the intervals.
        seed: of the evaluation and of the bootstrap.
        use_cache: as for `evaluate`: None keeps the records of bundles, True those of modules, too, False
            measures again.
        progress: called as runs finish.

    Raises:
        ConfigError: nothing to compare with, or a negative margin.
        TaskError: no common task, or results that are not of the same samples.
    """
    if margin is not None and not margin >= 0:
        raise ConfigError(f"margin is {margin}; it says how much worse a model may be, so give 0 or more")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; give a share between 0 and 1, e.g. 0.95")
    items = [models] if isinstance(models, str | Path | nn.Module) else list(models)
    subjects = resolve(items)
    twins = len(subjects) == 1 and subjects[0].card is not None and subjects[0].card.dense_twin is not None
    if len(subjects) < 2 and not twins:
        raise ConfigError(
            f"{subjects[0].name} alone cannot be compared: name a second model (it has no dense twin)"
        )
    tasks: list[Task]
    if task is not None:
        tasks = [get_task(task) if isinstance(task, str) else task]
    else:
        tasks = _common_tasks(items, twins)
    executions = (execution,)
    records = evaluate(
        items, tasks, executions, twins=twins, seed=seed, use_cache=use_cache, progress=progress
    )
    comparisons: list[Comparison] = []
    for one in tasks:
        of_task = [record for record in records if record.task == one.name]
        chosen = metric or one.primary
        comparisons += compare_records(
            of_task, chosen, one.direction(chosen), margin=margin, confidence=confidence, seed=seed
        )
    return comparisons


def compare_records(
    records: Sequence[Record],
    metric: str,
    direction: int,
    *,
    margin: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """Compare the records of one task, the first being the reference.

    Raises:
        TaskError: fewer than two records, no per-sample values, or other samples than the reference's.
    """
    if len(records) < 2:
        raise TaskError(f"a comparison needs two records of one task; received {len(records)}")
    reference, *others = records
    base = _samples(reference, metric)
    comparisons = []
    for record in others:
        _require_same_samples(reference, record)
        difference = paired_difference(_samples(record, metric), base, confidence=confidence, seed=seed)
        comparisons.append(
            Comparison(
                task=record.task,
                metric=metric,
                model=_label(record, reference),
                reference=reference.model,
                value=record.metrics[metric].value,
                reference_value=reference.metrics[metric].value,
                difference=difference,
                direction=direction,
                margin=margin,
            )
        )
    return comparisons


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """The comparisons as a table."""
    margins = any(c.margin is not None for c in comparisons)
    confidence = f"{comparisons[0].difference.confidence:.0%}" if comparisons else "95%"
    columns = ["task", "model", "reference", "metric", "model's", "reference's", "difference"]
    columns += [f"{confidence} interval", "p", "detectable", "verdict"]
    columns += ["within margin"] if margins else []
    rows = [
        [
            c.task,
            c.model,
            c.reference,
            c.metric,
            numbers.value(c.value),
            numbers.value(c.reference_value),
            numbers.signed(c.difference.value),
            f"{numbers.signed(c.difference.low)} to {numbers.signed(c.difference.high)}",
            f"{c.difference.p_value:.3g}",
            numbers.value(c.difference.detectable),
            c.verdict,
            *([{True: "ok", False: "failed", None: ""}[c.within_margin]] if margins else []),
        ]
        for c in comparisons
    ]
    note = (
        "Paired by sample: bootstrap interval of the mean difference; p from the exact McNemar test for 0/1 "
        "samples, else from the paired t test. A difference smaller than `detectable` would have been missed "
        "more than one time in five."
    )
    optional = ("detectable", "metric", "reference's", "model's", "p", "reference", "task", "difference")
    return Table("Comparison", columns, rows, note, optional)


def _common_tasks(items: Sequence[str | Path | nn.Module], twins: bool) -> list[Task]:
    common: list[str] | None = None
    for subject in resolve(items, twins=twins):
        if subject.card is None:
            raise TaskError(f"{subject.name} has no card that says what to measure; name the task")
        own = list(dict.fromkeys(m.task for m in subject.card.metrics))
        common = own if common is None else [name for name in common if name in own]
    if not common:
        raise TaskError("the cards of these models have no task in common; name one that accepts them all")
    return [get_task(name) for name in common]


def _samples(record: Record, metric: str) -> list[float]:
    if metric not in record.samples:
        known = ", ".join(record.samples) or "none"
        raise TaskError(
            f"task {record.task} gives no per-sample {metric!r} to pair; metrics with samples: {known}"
        )
    return record.samples[metric].decode()


def _require_same_samples(reference: Record, record: Record) -> None:
    for what, left, right in (
        ("task", reference.task, record.task),
        ("version of the task", reference.task_version, record.task_version),
        ("sample set", reference.sample_set, record.sample_set),
        ("number of samples", reference.n, record.n),
    ):
        if left != right:
            raise TaskError(
                f"{record.model} and {reference.model} were measured on different samples "
                f"({what}: {right!r} and {left!r}); measure both again with the same task"
            )


def _label(record: Record, reference: Record) -> str:
    return record.model if record.execution == reference.execution else f"{record.model} ({record.execution})"
