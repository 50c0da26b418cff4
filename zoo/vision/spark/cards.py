"""The cards of networks that SparK pre-trained, and of their twins from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.bundles.card import Card, mean_and_spread
from zoo.errors import ConfigError, TaskError
from zoo.harness.tasks import get_task
from zoo.vision.data import SOURCES
from zoo.vision.models import ResNet

CITATION = (
    "Tian et al. Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling. ICLR "
    "2023."
)
PROBE = "linear probe: ridge regression of all training labels on the frozen features"


def card_fields(
    model: ResNet,
    dataset: str,
    *,
    name: str,
    summary: str,
    options: Mapping[str, Any],
    seed: int,
    per_seed: Mapping[int, float] | None = None,
    protocol: str,
    twin: Card | None,
    command: str,
    seconds: float,
    citation: str = CITATION,
    evidence: str | None = None,
) -> dict[str, Any]:
    """The fields of a card; `zoo.save` adds what it counts itself.

    Args:
        model: measured on the test images of `dataset`.
        options: what decided its weights.
        per_seed: accuracy by seed; by default that of the model alone.
        protocol: how it was trained and chosen.
        twin: card of the network that was not pre-trained, measured on the same images; None makes the method
            `dense`, since no weight is dropped.

    Raises:
        TaskError: the task counts no operations of this model.
        ConfigError: the twin was not measured on these images.
    """
    task = get_task(f"vision/{dataset}")
    value, flops = task.evaluate(model).metrics[task.primary], task.flops(model)
    if flops is None:
        raise TaskError(f"{task.name} counts no operations of {type(model).__name__}")
    values = dict(per_seed) if per_seed is not None else {seed: value.value}
    mean, spread = mean_and_spread(values)
    metric: dict[str, Any] = {
        "task": task.name,
        "metric": task.primary,
        "split": "test",
        "protocol": protocol,
        "value": value.value,
        "stderr": value.stderr or 0.0,
        "per_seed": values,
        "mean": mean,
        "spread": spread,
    }
    if twin is not None:
        own = next((m for m in twin.metrics if m.task == task.name), None)
        if own is None:
            raise ConfigError(f"{twin.name} was not measured on {task.name}; take another twin")
        figure = {key: getattr(own, key) for key in ("value", "per_seed", "mean", "spread")}
        metric["dense"] = {"name": twin.name, **figure}
    source = SOURCES[dataset]
    return {
        "name": name,
        "version": "1.0.0",
        "domain": "vision",
        "summary": summary,
        "architecture": {"name": "vision/resnet", "args": model.arguments},
        "method": {
            "name": "dense" if twin is None else "spark",
            "hyperparameters": dict(options),
            "seed": seed,
        },
        "sparsity": {},
        "cost": {
            "parameters": {},
            "flops": {"dense": flops.dense, "sparse": flops.sparse},
            "bytes": {},
        },
        "metrics": [metric],
        "dense_twin": None if twin is None else twin.name,
        "training": {"command": command, "seconds": round(seconds, 3)},
        "data": {"name": source.title, "source": source.origin, "licence": source.licence},
        "license": "Apache-2.0",
        "citation": citation,
        "evidence": evidence,
    }
