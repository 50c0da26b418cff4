"""What a task is: data, a protocol and metrics, under a name and a version.

A domain, or anybody's package, adds a task in one of two ways:

    @register_task                                     # in a module that is imported anyway
    class Digits(Task): ...

    [project.entry-points."zoo.tasks"]                 # in the pyproject.toml of a package of its own
    "mydomain/mytask" = "mypackage.tasks:MyTask"

A name of the form `provider:argument` (say `lm_eval:arc_easy`) is answered by the class registered as
`provider`, called with the argument.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from zoo.errors import TaskError
from zoo.registry import TASKS


@runtime_checkable
class Progress(Protocol):
    """How long work says where it stands: `done` of `total` steps, with a short note."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class Measure:
    """One metric's value with its standard error over the samples (None where it has none)."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one pass over the task's input; `sparse` counts only what the masks
    keep."""

    dense: int
    sparse: int


@dataclass(frozen=True)
class TaskResult:
    """What a task measured.

    Attributes:
        metrics: the value of each metric.
        samples: per-sample values of the metrics that are a mean over samples, in the fixed order of the
            protocol, so that two models can be compared sample by sample. May be empty.
        n: number of samples.
        sample_set: digest of which samples were measured (of their ids, say), if the task knows; results
            whose digests differ are not compared.
    """

    metrics: dict[str, Measure]
    samples: dict[str, list[float]] = field(default_factory=dict)
    n: int = 0
    sample_set: str = ""

    @classmethod
    def from_samples(cls, samples: dict[str, list[float]], sample_set: str = "") -> TaskResult:
        """Metrics that are plain means: value = mean, stderr = s / sqrt(n) with the n-1 estimate of s."""
        lengths = {len(values) for values in samples.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise TaskError(
                f"a task needs the same, positive number of samples for each metric; received "
                f"{ {name: len(values) for name, values in samples.items()} }"
            )
        n = lengths.pop()
        metrics = {}
        for name, values in samples.items():
            mean = math.fsum(values) / n
            variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
            metrics[name] = Measure(mean, math.sqrt(variance / n) if n > 1 else None)
        return cls(metrics, samples, n, sample_set)


class Task(ABC):
    """A data set, a protocol and metrics.

    Attributes:
        name: `domain/what-on-which-data`, e.g. `graph/node-classification-cora`.
        version: raise it when data change that `measured_on` does not give; old cached results then no longer
            count. The task's code counts by itself.
        domain: the domain whose models the task takes.
        primary: the metric that tables, plots and comparisons use unless told otherwise.
        unit: unit of the primary metric for the axes of plots, e.g. `%` or `nats`; empty for a plain share.
        higher_is_better: direction of the metrics; see `direction` where they differ.
        repeatable: whether a run gives again what an earlier one gave, whose record then stands for it; False
            for times.
    """

    name: str
    version: str = "1"
    domain: str
    primary: str
    unit: str = ""
    higher_is_better: bool = True
    repeatable: bool = True

    @abstractmethod
    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure `model`, which is in eval mode. Must give the same result on each call (seed what is
        random) if the task is `repeatable`.

        Raises:
            TaskError: the model does not fit the task.
            DataError: the data are not there.
        """

    def measured_on(self) -> Any:
        """The data that decide the result: tensors, arrays, plain values, or containers of them.

        Records are found again by their content. None, the default, says that the code and `version` alone
        decide what the data are.
        """
        return None

    def accepts(self, card: Any) -> bool:
        """Whether the task can be run on the model that this card describes. Default: the same domain."""
        return bool(card.domain == self.domain)

    def is_on(self, card: Any) -> bool:
        """Whether the card is of the same domain and states a figure of this task."""
        return card.domain == self.domain and any(m.task == self.name for m in card.metrics)

    def direction(self, metric: str) -> int:
        """+1 where a higher value of `metric` is better, -1 where a lower one is."""
        return 1 if self.higher_is_better else -1

    def flops(self, model: nn.Module) -> Flops | None:
        """Operations of one pass over the task's input, if the task can count them (see
        `zoo.shared.measure.account.count`)."""
        return None


T = TypeVar("T", bound="type[Task] | Task")


def register_task(task: T) -> T:
    """Class decorator (or call on an instance) that makes a task available under its `name`.

    Raises:
        TaskError: a required attribute is missing.
    """
    missing = [attribute for attribute in ("name", "domain", "primary") if not hasattr(task, attribute)]
    if missing:
        label = task.__name__ if isinstance(task, type) else type(task).__name__
        raise TaskError(f"task {label} lacks {', '.join(missing)}; set them as class attributes")
    TASKS.register(task.name, task)
    return task


def get_task(name: str) -> Task:
    """The task of that name, ready to use.

    An entry of the registry is a `Task` or a subclass of it, which is called without arguments, or with the
    argument of `provider:argument`.

    Raises:
        UnknownNameError: nobody registered it.
        TaskError: the entry is not a task.
    """
    provider, colon, argument = name.partition(":")
    entry: Any = TASKS.get(provider)
    if isinstance(entry, type) and issubclass(entry, Task):
        return entry(argument) if colon else entry()  # type: ignore[call-arg]
    if not isinstance(entry, Task):
        raise TaskError(f"{name!r} is registered as a task, but {entry!r} is not a zoo.harness.tasks.Task")
    if colon:
        raise TaskError(f"task {provider!r} takes no argument; received {argument!r} after the colon")
    return entry
