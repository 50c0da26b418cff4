"""What methods that train have in common: checks, a copy to work on, and the answer that the zoo expects."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zoo.methods.contract import Sparsified, required, stated_options
from zoo.shared.errors import TrainingError
from zoo.shared.masks import MaskSet, masks_of, set_masks, tighten
from zoo.shared.pruning.budgets import check_sparsity
from zoo.shared.pruning.schedules import Cubic
from zoo.shared.pruning.sparsifier import Sparsifier
from zoo.shared.structure.relatives import check_finite, copied
from zoo.shared.train import Cost, Fit, Job, step_macs
from zoo.shared.train.batches import moved
from zoo.shared.train.device import brought_back, device_of

UPDATES = 20  # of a gradual schedule


class Pruned(NamedTuple):
    """What `TrainingMethod.prune` made: a model with its masks, and boolean extras for parts that have none
    (`channels/keep`: which of the channels are still there)."""

    model: nn.Module
    extras: dict[str, Tensor] = {}


@dataclass
class TrainingMethod(ABC):
    """Base of the methods that train. A subclass says in `prune` what becomes of a model; the rest is here.

    Masks that the model carries stay in force: what they drop is dropped in the result.
    """

    needs_job: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {"epochs": 10, "lr": 0.05, "batch": 64, "weight_decay": 5e-4}

    sparsity: float = 0.9
    """Share of zeros over the pruned weights, from 0 up to 1."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Train a sparse relative of `model`, which stays as it is.

        Args:
            model: any module; it is copied, in float32, to the job's device.
            job: data, loss and recipe.

        Raises:
            BudgetError: a sparsity outside [0, 1), or one that the method cannot reach.
            PatternError: a weight whose shape its pattern does not allow.
            MaskError, GroupError: what in this model the method cannot handle; weights that are not finite.
            ConfigError: options that contradict each other, or no job.
            TrainingError: data that cannot be trained on, or a loss that is no longer finite.
        """
        check_sparsity(self.sparsity)
        given = required(job, self) if self.needs_job else job
        check_finite(model)
        return self._answer(model, given)

    def _answer(self, model: nn.Module, given: Job | None) -> Sparsified:
        before = masks_of(model)
        if given is None:
            made, extras = self.prune_at_once(copied(model)), dict[str, Tensor]()
            job = None
        else:
            job = given.replace(cost=Cost())
            made, extras = self.prune(copied(model).to(job.device), job)
            given.cost.flops += job.cost.flops
            given.cost.seconds += job.cost.seconds
        made = brought_back(made, device_of(model))
        if before is not None and _fits(before, made):
            tighten(made, before)
        options = stated_options(self, job)
        if job is not None and math.isfinite(job.cost.flops):
            options["training_flops"] = job.cost.flops
        return Sparsified(
            made.eval(),
            masks_of(made) or MaskSet({}),
            extras,
            options,
            arguments=arguments()
            if callable(arguments := getattr(made, "current_arguments", None))
            else None,
            parts={"channels": {"pattern": "channel"}} if "channels/keep" in extras else {},
        )

    @abstractmethod
    def prune(self, model: nn.Module, job: Job) -> Pruned:
        """The sparse model, which carries its masks (`masks_of`).

        Args:
            model: a copy of the given one, in float32, that may be changed.
            job: by which everything is trained, so that it is counted.
        """

    def prune_at_once(self, model: nn.Module) -> nn.Module:
        """The same without training, for methods that do not need a job."""
        raise NotImplementedError


def _fits(masks: MaskSet, model: nn.Module) -> bool:
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    return all(shapes.get(name) == mask.shape for name, mask in masks.items())


def train_gradually(model: nn.Module, job: Job, sparsity: float, **axes: Any) -> Fit:
    """Train while weights are cut by a cubic schedule over the first 60 % of the steps, in 20 updates.

    Args:
        model, job: what is trained.
        sparsity: at the end of the schedule.
        axes: further arguments of `Sparsifier`: pattern, score, budget, names.
    """
    fit = job.fit(model)
    end = max(1, int(0.6 * fit.steps))
    every = max(1, end // UPDATES)
    with Sparsifier(
        model, fit.optimizer, schedule=Cubic(sparsity, end), every=every, seed=job.seed, **axes
    ) as cuts:
        return fit.run(cuts.step)


def train_held(fit: Fit, after_step: Callable[[], object] | None = None, until: int | None = None) -> Fit:
    """Run a training in which what the model's masks drop, if it carries any, stays zero; for trainings that
    change parameters too much for `MaskSet.attach`."""
    # The parameters themselves: gates move them to another name, not to another object.
    held = _held(fit.model)

    def after() -> None:
        with torch.no_grad():
            for parameter, dropped in held:
                parameter.masked_fill_(dropped, 0)
        if after_step is not None:
            after_step()

    return fit.run(after if held else after_step, until=until)


def _held(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    masks = masks_of(model)
    if masks is None:
        return []
    gated = {name.replace("parametrizations.", "").removesuffix(".original"): p for name, p in _named(model)}
    return [(gated[name], ~mask.keep.to(gated[name].device)) for name, mask in masks.items() if name in gated]


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from model.named_parameters(remove_duplicate=False)


def example_of(job: Job) -> tuple[Any, ...]:
    """One sample, as the model takes it, on the job's device.

    Raises:
        TrainingError: the batches do not say.
    """
    inputs: tuple[Any, ...] = moved(job.batches.example(), torch.device(job.device))
    return inputs


def cost_of_step(
    model: nn.Module, job: Job, masks: MaskSet | None = None, dense_gradients: bool = False
) -> float:
    """Multiply-accumulates of a training step on one sample, see `step_macs`; NaN where the data do not tell
    what the model takes.

    Args:
        model, job: what is trained.
        masks: to count with, instead of those that the model carries.
        dense_gradients: whether the gradients of dropped weights are computed, too.
    """
    try:
        example = example_of(job)
    except TrainingError:
        return math.nan
    before = masks_of(model)
    try:
        set_masks(model, masks if masks is not None else before)
        return step_macs(model, example, dense_gradients)
    finally:
        set_masks(model, before)


def second_stream(job: Job) -> Iterator[Any]:
    """Batches of a second, independently shuffled pass over the job's data, again and again."""
    generator = torch.Generator().manual_seed(job.seed + 500_009)
    while True:
        for batch in job.batches.draw(generator):
            yield moved(batch, torch.device(job.device))


@contextmanager
def drawn_by(job: Job, step: int) -> Iterator[None]:
    """Context manager within which dropout and what else is random depend on the job's seed and a step alone,
    for forward passes beside those of the training loop."""
    with torch.random.fork_rng(devices=[job.device] if torch.device(job.device).type == "cuda" else []):
        torch.manual_seed((job.seed * 1_000_003 + 500_009 + step) % 2**63)
        yield


def share_of_recipe(job: Job, parts: int) -> dict[str, Any]:
    """The fields of the recipe that make a training last one part of so many."""
    if job.recipe.steps:
        return {"steps": max(1, job.recipe.steps // parts)}
    return {"epochs": max(1, job.recipe.epochs // parts)}


def run_model(job: Job) -> Callable[[nn.Module, Any], Any]:
    """How to run a model on a batch of the job, whatever its batches look like: by the loss."""
    return lambda model, batch: job.loss(model, batch)
