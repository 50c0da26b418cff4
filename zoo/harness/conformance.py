"""Conformance of tasks and domains: what each must do, checked on any of them, plug-ins included.

from zoo.harness.conformance import check_domain, check_task

check_task("graph/digits", zoo.load("graph/dense-gcn-digits"))
check_domain("graph", zoo.load("graph/dense-gcn-digits"))
"""

from __future__ import annotations

import importlib
import inspect
import math
import statistics
from collections.abc import Callable
from typing import Any

from torch import nn

from zoo import registry
from zoo.errors import ZooError
from zoo.harness.tasks import Task, get_task
from zoo.names import DOMAINS
from zoo.shared.errors import SparseError
from zoo.shared.store.identity import data_digest

_REGISTRIES = (
    registry.ARCHITECTURES,
    registry.TASKS,
    registry.MAKERS,
    registry.FINETUNERS,
    registry.JOBS,
    registry.PRETRAINERS,
    registry.GENERATORS,
)
_JOB = ("dataset", "recipe", "seed", "device", "model")


class ConformanceError(ZooError, AssertionError):
    """A task or a domain does not do what every one must."""


def check_task(task: str | Task, model: nn.Module) -> None:
    """Check that a task keeps the contract of `zoo.harness.tasks.Task` on a model that it takes.

    It must give the same result twice, with its primary metric among finite ones, as many samples as it says,
    and samples whose mean is the metric; data that have a digest; operations of which the masks keep no more
    than there are. A network that it cannot measure it must refuse by an error of this project.

    Args:
        task: a registered name, or the task.
        model: in eval mode.

    Raises:
        ConformanceError: the task breaks the contract; the message says how.
    """
    task = get_task(task) if isinstance(task, str) else task
    first, second = task.evaluate(model), task.evaluate(model)
    _must(not task.repeatable or first == second, f"{task.name} gives two results for one model")
    _must(task.primary in first.metrics, f"{task.name} does not measure its primary metric {task.primary}")
    for name, measure in first.metrics.items():
        samples = first.samples.get(name)
        _must(math.isfinite(measure.value), f"{task.name}: {name} is {measure.value}")
        _must(task.direction(name) in (1, -1), f"{task.name}: {name} has no direction")
        if samples is not None:
            _must(len(samples) == first.n, f"{task.name}: {len(samples)} samples of {name}, n is {first.n}")
            near = math.isclose(statistics.fmean(samples), measure.value, rel_tol=1e-6, abs_tol=1e-9)
            _must(near, f"{task.name}: the mean of the samples of {name} is not its value")
    _must(data_digest(task.measured_on()) == data_digest(task.measured_on()), f"{task.name}: data change")
    flops = task.flops(model)
    _must(flops is None or 0 <= flops.sparse <= flops.dense, f"{task.name}: operations {flops}")
    foreign = nn.Sequential(nn.Linear(3, 3))
    _refuses(lambda: task.evaluate(foreign), f"{task.name} measures a network of three inputs")


def check_domain(name: str, model: nn.Module, dataset: str | None = None) -> None:
    """Check that all that a domain registers is there, and that its jobs train.

    Every entry must load; the public names of its package must exist and others be refused as Python does;
    its maker of jobs must take what `zoo sparsify` gives it, refuse data that nobody knows by an error of
    this
    project, and make for a model of the domain a job whose loss is finite and has gradients.

    Args:
        name: of the domain.
        model: one of its models; not changed.
        dataset: what its job is made on; by default what the domain takes for this model.

    Raises:
        ConformanceError: the domain breaks the contract; the message says how.
    """
    for entries in _REGISTRIES:
        for each in entries.names(f"{name}*"):
            if each == name or each.startswith(f"{name}/"):
                entries.get(each)
    if name in DOMAINS:
        package = importlib.import_module(f"zoo.{name}")
        for public in (one for one in dir(package) if not one.startswith("_")):
            getattr(package, public)
        _must(not hasattr(package, "no_such_name"), f"zoo.{name} has whatever it is asked for")
    make = registry.JOBS.get(name)
    missing = [one for one in _JOB if one not in inspect.signature(make).parameters]
    _must(not missing, f"the jobs of {name} take no {missing}")
    _refuses(lambda: make("no-such-data", model=model), f"{name} makes a job of data that nobody knows")
    job = make(dataset, model=model)
    loss = job.loss(model, next(iter(job.sample(1))))
    _must(
        math.isfinite(float(loss.detach())) and loss.requires_grad,
        f"the loss of a job of {name} cannot be trained",
    )


def _must(holds: bool, message: str) -> None:
    if not holds:
        raise ConformanceError(message)


def _refuses(run: Callable[[], Any], message: str) -> None:
    """Whether a call ends in an error of this project; other errors go through."""
    try:
        run()
    except SparseError:
        return
    raise ConformanceError(message)
