"""What every method is: a dataclass whose fields are its options, with `sparsify(model, job)`.

A method takes any `nn.Module` and, if it trains or measures, the job: data, loss, score, recipe, seed and
device (`zoo.Job`). How to train - epochs, learning rate - comes with the job and is no option of a method. A
domain or another package registers one in `zoo.registry.METHODS` (entry points: `zoo.methods`):

    @dataclass
    class MyMethod:
        sparsity: float = 0.9

        def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified: ...

`zoo.methods.training.TrainingMethod` is a base for methods that train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.shared.masks import MaskSet
from zoo.shared.train import Job, Recipe


@dataclasses.dataclass(frozen=True)
class Sparsified:
    """What a method made of a model.

    Attributes:
        model: with zeros where the masks drop; may be another object than the one given.
        masks: of its parameters.
        extras: further tensors that belong to it; a boolean `edges/keep` is the mask of the part `edges`.
        hyperparameters: for the card.
        parts: for the card, parts of the sparsity that have no mask among the above: name -> kept, total,
            pattern.
        arguments: of the architecture, where the model is no longer of the shapes of the one given; None
            leaves those on the card.
    """

    model: nn.Module
    masks: MaskSet
    extras: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    hyperparameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    arguments: dict[str, Any] | None = None


@runtime_checkable
class Method(Protocol):
    """A dataclass with this method.

    Beside it a class may state `needs_job` (default False): whether it can do nothing without data; and
    `recipe`, the fields of `zoo.Recipe` that it trains well with, for jobs that the command line makes.
    """

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified: ...


def needs_job(method: object) -> bool:
    """Whether a method, or the class of one, can do nothing without a job."""
    return bool(getattr(method, "needs_job", False))


def default_recipe(method: object) -> Mapping[str, Any]:
    """The fields of the recipe that a method, or the class of one, states."""
    stated: Mapping[str, Any] = getattr(method, "recipe", {})
    return stated


def required(job: Job | None, method: object) -> Job:
    """The job.

    Raises:
        ConfigError: there is none.
    """
    if job is None:
        raise ConfigError(
            f"{type(method).__name__} learns from data, and none were given: pass job=zoo.Job(loader, loss), "
            "or --dataset NAME on the command line"
        )
    return job


def stated_options(method: Any, job: Job | None = None) -> dict[str, Any]:
    """What decides the result, for a card: the method's options, and recipe and seed of the job."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(method).items()}
    if job is None:
        return options
    usual = Recipe()
    changed = {
        field.name: getattr(job.recipe, field.name)
        for field in dataclasses.fields(Recipe)
        if field.name in ("epochs", "lr", "batch", "weight_decay")
        or getattr(job.recipe, field.name) != getattr(usual, field.name)
    }
    return (
        options
        | {k: dict(v) if isinstance(v, Mapping) else v for k, v in changed.items()}
        | {"seed": job.seed}
    )
