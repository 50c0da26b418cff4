"""Any task of the lm-evaluation-harness as a task of the zoo: `zoo eval llm/... --task lm_eval:arc_easy`.

The argument is the name of one of lm-eval's tasks, or the path of a task's YAML file (`lm_eval:./mine.yaml`),
which may, as lm-eval's own tasks do, name Python functions beside it: run only files that you trust. Prompts,
scoring and metrics are lm-eval's; figures equal those of its own command line at the same precision.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from pathlib import Path
from typing import Any

from torch import nn

from zoo.errors import ConfigError, TaskError, UnknownNameError
from zoo.harness.tasks import Measure, Progress, Task, TaskResult
from zoo.llm.data.tokenization import tokenizer_of
from zoo.llm.scoring import context_of
from zoo.names import suggestion
from zoo.shared.measure.modes import float32
from zoo.shared.store.io import sha256_file


class LmEvalTask(Task):
    """One task of lm-eval, on all of its test documents.

    Args:
        argument: name of a task, or path of a YAML file.

    Raises:
        ConfigError: lm-eval is not installed.
        UnknownNameError: there is no such task or file.
        TaskError: a file that names no task.
    """

    domain = "llm"

    def __init__(self, argument: str) -> None:
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(
                f"{argument}: lm-eval is missing ({error}). Run: pip install lm-eval"
            ) from error
        self.name = f"lm_eval:{argument}"
        source = f"lm-eval {lm_eval.__version__}"
        file = Path(argument)
        if file.suffix == ".yaml":
            if not file.is_file():
                raise UnknownNameError(f"{argument} is not there. Name a task of lm-eval, or a YAML file.")
            self._manager: Any = TaskManager(include_path=str(file.parent), include_defaults=False)
            self._task = _task_in(file)
            source = f"{source}, file {sha256_file(file)[:12]}"
        else:
            self._manager, self._task = TaskManager(), argument
        if self._task not in self._manager.all_tasks:
            raise UnknownNameError(
                f"lm-eval has no task {self._task!r}. {suggestion(self._task, self._manager.all_tasks)}"
            )
        self.version = source

    @functools.cached_property
    def _directions(self) -> dict[str, bool]:
        """Whether higher is better, by metric, in the order of the definition; loads the task's data."""
        tasks = self._manager.load([self._task])["tasks"].values()
        return {name: bool(better) for task in tasks for name, better in task.higher_is_better().items()}

    @property
    def primary(self) -> str:  # type: ignore[override]
        """The first metric of the definition."""
        return next(iter(self._directions))

    def direction(self, metric: str) -> int:
        """As lm-eval states it."""
        return 1 if self._directions.get(metric.partition(",")[0], True) else -1

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Run lm-eval on the model."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with float32(model), _quiet():
            device = str(next(model.parameters()).device)
            wrapped = HFLM(
                pretrained=model,
                tokenizer=tokenizer_of(model),
                batch_size=8,
                max_length=context_of(model),
                device=device,
            )
            found = lm_eval.simple_evaluate(
                wrapped, tasks=[self._task], task_manager=self._manager, log_samples=True
            )
        if found is None:
            raise TaskError(f"{self.name} gave no result; only the first process of a launch measures.")
        return _result(self._task, found)


def _result(task: str, found: Any) -> TaskResult:
    """lm-eval's answer as the zoo's; a metric of the filter `none` goes by its bare name."""
    values = found["results"][task]
    metrics = {}
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = values.get(f"{name}_stderr,{chosen}")
        known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
        label = name if chosen == "none" else key
        metrics[label] = Measure(float(value), float(stderr) if known else None)
    logged = found.get("samples", {}).get(task, [])
    samples = {}
    for metric, measure in metrics.items():
        each = [float(one[metric]) for one in logged if isinstance(one.get(metric), (bool, int, float))]
        mean = sum(each) / len(each) if each else math.nan
        if len(each) == len(logged) and math.isclose(mean, measure.value, rel_tol=1e-9, abs_tol=1e-12):
            samples[metric] = each
    count = found.get("n-samples", {}).get(task, {}).get("effective", len(logged))
    digest = hashlib.sha256("".join(one["doc_hash"] for one in logged).encode()).hexdigest()[:16]
    return TaskResult(metrics, samples, int(count), digest)


def _task_in(file: Path) -> str:
    """The task's name in a YAML file, read line by line, since lm-eval's YAML has tags of its own."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("task:"):
            return line.partition(":")[2].strip().strip("'\"")
    raise TaskError(f"{file} has no line 'task: NAME'; see lm-eval's guide to tasks.")


class _quiet:
    """lm-eval's and datasets' messages and bars stay out of the zoo's output while the block runs."""

    def __enter__(self) -> None:
        import datasets

        self._bars = datasets.utils.logging.is_progress_bar_enabled()
        datasets.utils.logging.disable_progress_bar()
        self._levels = {name: logging.getLogger(name).level for name in ("lm_eval", "lm-eval")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        import datasets

        if self._bars:
            datasets.utils.logging.enable_progress_bar()
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
