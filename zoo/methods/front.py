"""`zoo.sparsify`: one door to every method and to pruning by pattern, score and budget."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from zoo.errors import ConfigError
from zoo.methods.contract import Method, Sparsified, needs_job
from zoo.registry import METHODS
from zoo.shared.masks import MaskSet
from zoo.shared.pruning.sparsifier import sparsify as prune
from zoo.shared.train import Job


def sparsify(
    model: nn.Module, *, method: str | Method | None = None, job: Job | None = None, **options: Any
) -> MaskSet | Sparsified:
    """Make a model sparse, by a method of the zoo or by pruning it at once.

    zoo.sparsify(model, sparsity=0.9) prunes `model` in place and returns its masks; the options are those of
    `zoo.shared.pruning.sparsifier.sparsify`: pattern, score, budget, names, batches.

    zoo.sparsify(model, method="bip", job=zoo.Job(loader), sparsity=0.9) runs a method and returns what it
    made: `.model`, which may be another object than the one given, and `.masks`.

    Args:
        model: any module. What its masks drop stays dropped.
        method: a registered name or a method object.
        job: data, loss, score and recipe, for methods that train or measure.
        options: of the method, or of the pruning.

    Raises:
        ConfigError: an unknown option, a method without the job that it needs, or a job without a method.
        UnknownNameError: nobody registered that method.
        SparseError: whatever the method refuses.
    """
    if method is None:
        if job is not None:
            raise ConfigError("a job is for a method: name one, such as method='magnitude'")
        return prune(model, **options)
    if isinstance(method, str):
        chosen = made_method(method, options)
    elif options:
        raise ConfigError(f"options belong to the method object; received {sorted(options)}")
    else:
        chosen = method
    if needs_job(chosen) and job is None:
        raise ConfigError(
            f"{method if isinstance(method, str) else type(method).__name__} learns from data: pass "
            "job=zoo.Job(loader, loss)"
        )
    return chosen.sparsify(model, job)


def made_method(name: str, options: dict[str, Any]) -> Method:
    """The registered method of that name with these options.

    Raises:
        ConfigError: an option that it does not have.
    """
    kind = METHODS.get(name)
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(set(options) - set(known)):
        recipe = " (the job's recipe says how to train)" if unknown[0] in ("epochs", "lr", "batch") else ""
        raise ConfigError(f"{name} has no option {unknown[0]!r}{recipe}; it has: {', '.join(known)}")
    made: Method = kind(**options)
    return made
