"""From records to tables and plots: quality beside its cost, one group for each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zoo.harness.records import Record
from zoo.report import numbers
from zoo.report.plots import pareto_front
from zoo.studies.tables import Plot, Series, Table


@dataclass(frozen=True)
class TaskSummary:
    """The table and the plots of one task."""

    task: str
    table: Table
    plots: list[Plot]


@dataclass(frozen=True)
class _Axis:
    """A cost to plot quality against."""

    name: str
    title: str
    label: str
    of: Callable[[Record], float | int | None]
    log: bool


AXES = (
    _Axis(
        "sparsity",
        "sparsity",
        "sparsity (% of masked entries that are zero)",
        lambda r: None if r.sparsity is None else 100 * r.sparsity,
        False,
    ),
    _Axis("bytes", "size on disk", "size on disk (bytes)", lambda r: r.cost.bytes_on_disk, True),
    _Axis(
        "flops",
        "FLOPs",
        "operations per pass that are not skipped (FLOPs)",
        lambda r: r.cost.flops.sparse if r.cost.flops else None,
        True,
    ),
    _Axis("seconds", "time", "wall time of the evaluation (s)", lambda r: r.seconds, True),
)


def summarise(records: Sequence[Record]) -> list[TaskSummary]:
    """One summary for each task, in the order of first appearance; rows keep the order of the records."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    return [TaskSummary(task, _table(task, group), _plots(task, group)) for task, group in by_task.items()]


def twin_of(record: Record, records: Sequence[Record]) -> Record | None:
    """The dense twin's record of the same task, preferably in the same execution."""
    if record.dense_twin is None:
        return None
    twins = [r for r in records if r.model == record.dense_twin and r.task == record.task]
    return next((r for r in twins if r.execution == record.execution), twins[0] if twins else None)


def _table(task: str, records: Sequence[Record]) -> Table:
    first = records[0]
    unit = f" ({first.unit})" if first.unit else ""
    executions = len({record.execution for record in records}) > 1
    columns = ["#", "model", *(["execution"] if executions else []), f"{first.primary}{unit}"]
    columns += ["against dense", "sparsity", "parameters", "FLOPs", "on disk", "time"]
    rows = []
    for number, record in enumerate(records, 1):
        metric = record.metrics[record.primary]
        twin = twin_of(record, records)
        difference = "" if twin is None else numbers.signed(metric.value - twin.metrics[record.primary].value)
        cost = record.cost
        rows.append(
            [
                number,
                record.model,
                *([record.execution] if executions else []),
                numbers.value(metric.value, metric.stderr),
                difference,
                "" if record.sparsity is None else numbers.percent(record.sparsity),
                "" if cost.parameters is None else numbers.count(cost.parameters.sparse),
                "" if cost.flops is None else numbers.count(cost.flops.sparse),
                "" if cost.bytes_on_disk is None else numbers.size(cost.bytes_on_disk),
                numbers.seconds(record.seconds),
            ]
        )
    arrow = "higher" if first.direction > 0 else "lower"
    samples = " to ".join(sorted({str(record.n) for record in records}))
    note = f"n = {samples} samples; {arrow} is better; ± is the standard error over samples."
    # On a narrow screen: which model, how good, how sparse.
    optional = ("time", "#", "FLOPs", "parameters", "on disk", "against dense")
    return Table(task, columns, rows, note, optional)


def _plots(task: str, records: Sequence[Record]) -> list[Plot]:
    return [plot for axis in AXES if (plot := _plot(task, records, axis)) is not None]


def _plot(task: str, records: Sequence[Record], axis: _Axis) -> Plot | None:
    """Quality against one cost; None unless two records know the cost."""
    known = [
        (number, record, float(x))
        for number, record in enumerate(records, 1)
        if (x := axis.of(record)) is not None
    ]
    if len(known) < 2 or len({x for _, _, x in known}) < 2:
        return None
    first = records[0]
    series: list[Series] = []
    families: dict[str, list[tuple[int, Record, float]]] = {}
    for item in known:
        families.setdefault(_family(item[1]), []).append(item)
    for family, members in families.items():
        series.append(_points(family, members))
        dense = [record for record in records if record.model == family]
        if dense:
            series.append(Series("dense twin", [], [_quality(dense[0])], kind="reference", group=family))
    # More sparsity is cheaper: on that axis the front is sought from the right.
    sign = -1.0 if axis.name == "sparsity" else 1.0
    front = pareto_front([(sign * x, _quality(record)) for _, record, x in known], first.direction)
    if len(front) > 1:
        points = sorted((sign * x, y) for x, y in front)
        series.append(Series("Pareto front", [x for x, _ in points], [y for _, y in points], kind="front"))
    unit = f" ({first.unit})" if first.unit else ""
    return Plot(
        name=f"{task}-{axis.name}",
        title=f"{first.primary} against {axis.title}",
        x_label=axis.label,
        y_label=f"{first.primary}{unit}",
        series=series,
        alt=_description([(record, sign * x) for _, record, x in known]),
        log_x=axis.log,
    )


def _points(family: str, members: Sequence[tuple[int, Record, float]]) -> Series:
    """The points of one family; runs on one point (masked and packed, say) share it and its mark."""
    points: dict[tuple[float, float], list[tuple[int, Record]]] = {}
    for number, record, x in sorted(members, key=lambda item: item[2]):
        points.setdefault((x, round(_quality(record), 6)), []).append((number, record))
    firsts = [runs[0][1] for runs in points.values()]
    stderrs = [record.metrics[record.primary].stderr for record in firsts]
    return Series(
        label=family,
        x=[x for x, _ in points],
        y=[_quality(record) for record in firsts],
        spread=None if None in stderrs else [stderr for stderr in stderrs if stderr is not None],
        kind="points",
        marks=[", ".join(str(number) for number, _ in runs) for runs in points.values()],
        group=family,
    )


def _description(runs: Sequence[tuple[Record, float]]) -> str:
    """What the plot shows, in words: the best run, and the cheapest that is as good within the best one's
    error."""
    best = max((record for record, _ in runs), key=lambda record: record.direction * _quality(record))
    text = f"{len(runs)} runs. Best: {best.model} ({numbers.value(_quality(best))})."
    error = best.metrics[best.primary].stderr
    if error is None:
        return text
    close = [(cost, record) for record, cost in runs if abs(_quality(record) - _quality(best)) <= error]
    cheapest = min(close, key=lambda item: item[0])[1]
    if cheapest is best:
        return f"{text} None within its standard error is cheaper."
    return (
        f"{text} Cheapest within its standard error: {cheapest.model} ({numbers.value(_quality(cheapest))})."
    )


def _family(record: Record) -> str:
    """Models that share a dense twin share a colour; a dense model belongs to its own family."""
    return record.dense_twin or record.model


def _quality(record: Record) -> float:
    return record.metrics[record.primary].value
