"""From a model in the zoo and a method to a new bundle, measured beside its dense twin."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from zoo.bundles.card import Card, Metric, mean_and_spread
from zoo.bundles.catalog import Bundle, base_of
from zoo.bundles.store import load_bundle, save
from zoo.errors import ConfigError
from zoo.harness.records import Record
from zoo.harness.runner import evaluate
from zoo.harness.subjects import twin_of
from zoo.harness.tasks import Progress, get_task
from zoo.harness.workers import workers
from zoo.methods.contract import Method, Sparsified


@dataclasses.dataclass(frozen=True)
class Origin:
    """What the new card says of where the model comes from."""

    name: str
    method: str
    command: str
    version: str = "1.0.0"


def make_bundle(
    source: Bundle,
    method: Method,
    origin: Origin,
    folder: str | Path,
    *,
    share: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Sparsify the model of `source`, measure it on the source's tasks beside the dense twin, and save it.

    In several processes all take part in the work, and the first one saves.

    Args:
        source: the bundle to start from; if it is sparse itself, its own dense twin stays the twin.
        method: see `zoo.methods.contract`.
        origin: name, method's name and command for the card.
        folder: where to write.
        share: whether to store only what differs from the source, or from the base that it has itself.
        overwrite: whether a bundle that is there may be replaced.
        progress: called as the steps finish.

    Raises:
        ConfigError: a name of another domain than the source's.
        SparseError: whatever the method, the tasks or saving refuse.
    """
    domain = source.card.domain
    if origin.name.partition("/")[0] != domain:
        raise ConfigError(f"the name {origin.name!r} must begin with {domain + '/'!r}, the source's domain")
    twin = source if source.card.dense_twin is None else twin_of(source)
    tasks = list(dict.fromkeys(metric.task for metric in source.card.metrics))
    steps = _Steps(progress, 3)
    steps.next(f"sparsifying {source.card.name}")
    start = time.perf_counter()
    made = method.sparsify(load_bundle(source))
    seconds = time.perf_counter() - start
    steps.next("measuring it")
    own = {record.task: record for record in evaluate(made.model, tasks)}
    steps.next(f"measuring the dense twin {twin.card.name}")
    dense = {record.task: record for record in evaluate(twin.folder, tasks)}
    fields = _card(source.card, twin.card, made, origin, own, dense, seconds)
    team = workers()
    if team.index == 0:
        save(
            made.model,
            folder,
            card=fields,
            masks=made.masks,
            extras=made.extras,
            base=(base_of(source) or source) if share else None,
            overwrite=overwrite,
        )
    team.gather([None])  # the others wait for the bundle
    steps.next("done")
    return Path(folder)


def _card(
    source: Card,
    twin: Card,
    made: Sparsified,
    origin: Origin,
    own: dict[str, Record],
    dense: dict[str, Record],
    seconds: float,
) -> dict[str, Any]:
    """The fields of the new card; `save` fills in what it can count itself."""
    seed = int(made.hyperparameters.get("seed", source.method.seed))
    flops = get_task(source.metrics[0].task).flops(made.model)
    fields = source.to_dict() | {
        "name": origin.name,
        "version": origin.version,
        "summary": f"{source.name} sparsified by {origin.method}.",
        "method": {"name": origin.method, "hyperparameters": made.hyperparameters, "seed": seed},
        "dense_twin": twin.name,
        "metrics": [
            _metric(metric, twin, own[metric.task], dense[metric.task], seed) for metric in source.metrics
        ],
        "training": {"command": origin.command, "seconds": round(seconds, 3)},
        "sparsity": {"parts": made.parts},
        "evidence": None,
    }
    if made.arguments is not None:
        fields["architecture"] = {**fields["architecture"], "args": made.arguments}
    # A task that counts no operations cannot say what was saved: the dense figure then stands for both. A
    # network that was cut states the dense figures of its twin, a wider one its own.
    known = twin.cost.flops.dense
    parameters = sum(parameter.numel() for parameter in made.model.parameters())
    was_cut = parameters < twin.cost.parameters.dense
    fields["cost"] = {
        "parameters": {"dense": max(parameters, twin.cost.parameters.dense)},
        "flops": {
            "dense": max(flops.dense, known) if flops else known,
            "sparse": flops.sparse if flops else known,
        },
        "bytes": {"dense": twin.cost.bytes.dense} if was_cut else {},
    }
    return fields


def _metric(metric: Metric, twin: Card, own: Record, dense: Record, seed: int) -> dict[str, Any]:
    """One figure of the new model and of its twin, whose seeds are taken from its card."""
    value = own.metrics[metric.metric]
    twin_metric = next((m for m in twin.metrics if (m.task, m.metric) == (metric.task, metric.metric)), None)
    twin_seeds = (
        dict(twin_metric.per_seed) if twin_metric else {twin.method.seed: dense.metrics[metric.metric].value}
    )
    mean, spread = mean_and_spread(twin_seeds)
    return {
        "task": metric.task,
        "metric": metric.metric,
        "split": metric.split,
        "protocol": metric.protocol,
        "value": value.value,
        "stderr": value.stderr or 0.0,
        "per_seed": {seed: value.value},
        "mean": value.value,
        "spread": 0.0,
        "dense": {
            "name": twin.name,
            "value": dense.metrics[metric.metric].value,
            "per_seed": twin_seeds,
            "mean": mean,
            "spread": spread,
        },
    }


class _Steps:
    """Progress over a few named steps."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def next(self, note: str) -> None:
        if self.progress:
            self.progress(min(self.done, self.total), self.total, note)
        self.done += 1
