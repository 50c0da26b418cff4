"""Click-through rate on tables, as harness tasks."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional

from zoo.errors import TaskError
from zoo.graph.clicks import DeepFM, area, logits_of, parts_of
from zoo.harness.tasks import Flops, Measure, Progress, Task, TaskResult, register_task
from zoo.shared.measure.account import count
from zoo.tables import adult

FIELDS = 14


@register_task
class Adult(Task):
    """UCI Adult, 16,281 test rows: income above 50,000 dollars; area under the curve, and log-loss."""

    name, domain, primary = "graph/adult", "graph", "auc"

    def accepts(self, card: Any) -> bool:
        """DeepFM models of so many fields."""
        return card.domain == self.domain and len(card.architecture.args.get("sizes", ())) == FIELDS

    def direction(self, metric: str) -> int:
        """Less log-loss is better."""
        return -1 if metric == "log_loss" else 1

    def measured_on(self) -> Any:
        """The test rows and their labels."""
        return list(parts_of(adult())[2])

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Area under the curve, which is no mean over samples; log-loss with that of every row."""
        fields, labels = parts_of(adult())[2]
        if not isinstance(model, DeepFM) or len(model.tables) != FIELDS:
            raise TaskError(f"{self.name} takes a DeepFM of {FIELDS} fields; received {type(model).__name__}")
        logits = logits_of(model, fields).float()
        losses = functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        found = TaskResult.from_samples({"log_loss": losses.double().tolist()}, f"adult:{len(labels)}")
        metrics = {"auc": Measure(area(logits, labels)), **found.metrics}
        return TaskResult(metrics, found.samples, found.n, found.sample_set)

    def flops(self, model: nn.Module) -> Flops:
        """Operations for one row."""
        total = count(model, (parts_of(adult())[2][0][:1],)).total
        return Flops(total.flops, total.flops_kept)
