"""The training loop.

What an epoch draws depends on seed and epoch alone, and dropout on seed and step alone, so that a run resumed
from `Fit.state` equals one that was never interrupted, bit for bit, and needs no stored random state.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..errors import SparseError, TrainingError
from ..masks import masks_of
from ..masks.hold import unwrap_optimizer
from ..measure.modes import eval_mode
from .batches import Batches, as_batches, moved, samples_in, share_of
from .checkpoint import optimizer_tensors, part, restore_optimizer
from .cost import Cost, clock, step_macs
from .losses import Distillation, Loss, cross_entropy
from .recipe import Parameters, Recipe

LOOK = 50  # steps between looks at the loss on a GPU


@dataclass(frozen=True)
class Best:
    """The best score so far: the steps that were made until it, its value and the model's state."""

    step: int
    score: float
    state: dict[str, Tensor]


class Fit:
    """One training, on the device of the model.

    Args:
        model: trained in place.
        batches: see `as_batches`; moved to the model's device.
        recipe: see `Recipe`.
        loss: of model and batch.
        score: of the model, in eval mode, on validation data; larger is better. Asked for only if the recipe
            selects by it.
        seed: of order, augmentation and dropout.
        parameters: what is trained, also as groups with learning rates of their own; by default everything.
        penalty: added to the loss of every batch.
        macs: multiply-accumulates of a step on one sample, asked for at each epoch; by default `step_macs`,
            or NaN where it cannot be counted.
        cost: where flops and seconds are added.
        distil: adds distillation to the loss.
        accelerator: an `accelerate.Accelerator`; every process takes its share of each batch.

    Raises:
        TrainingError: nothing to train, data without a batch, or a recipe that selects by a score where there
            is none.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        recipe: Recipe,
        *,
        loss: Loss = cross_entropy,
        score: Callable[[nn.Module], float] | None = None,
        seed: int = 0,
        parameters: Parameters | None = None,
        penalty: Callable[[], Tensor] | None = None,
        macs: Callable[[], float] | None = None,
        cost: Cost | None = None,
        distil: Distillation | None = None,
        accelerator: Any = None,
    ) -> None:
        self.model, self.recipe, self.seed = model, recipe, seed
        self.batches: Batches = as_batches(batches)
        self.loss, self.penalty, self.distil = loss, penalty, distil
        self.cost = cost if cost is not None else Cost()
        self.macs = macs or self._step_macs
        self.score = score if recipe.select == "best" else None
        if recipe.select == "best" and score is None:
            raise TrainingError("select='best' needs a score on validation data; give one, or select='last'")
        self.step = 0
        self.last_loss = math.nan
        self.best: Best | None = None
        self._accelerator = accelerator
        self._own = Cost()  # of this training, to be resumed with it
        self._ticked = math.nan
        trained: Any = list(model.parameters() if parameters is None else parameters)
        self.device = next((p.device for p in _plain(trained)), torch.device("cpu"))
        if self.device.type != "cpu" and all(p.dim() != 5 for p in model.parameters()):
            # The layout of a GPU's fast convolutions; does nothing to other layers.
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = recipe.make_optimizer(trained)
        self._scales = [
            group["lr"] / recipe.lr if recipe.lr else 1.0 for group in self.optimizer.param_groups
        ]
        self._called, self._stepped = model, self.optimizer
        if accelerator is not None:
            self._called, self._stepped = accelerator.prepare(model, self.optimizer)
            self.optimizer = unwrap_optimizer(self._stepped)
        self._average = [p.detach().clone() for p in self.parameters] if recipe.ema else []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained; asked of the optimiser, since rows may come and go (`RowResizer`)."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the data."""
        return -(-len(self.batches) // self.recipe.accumulate)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.recipe.steps or self.recipe.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Passes that are done; set it to begin later in the recipe, as a rewound ticket does."""
        return self.step // self.steps_per_epoch

    @epoch.setter
    def epoch(self, passes: int) -> None:
        self.step = passes * self.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether all steps were made."""
        return self.step >= self.steps

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, see `Recipe.learning_rate`."""
        return self.recipe.learning_rate(step, self.steps)

    def run(
        self,
        after_step: Callable[[], object] | None = None,
        *,
        until: int | None = None,
        until_step: int | None = None,
        on_step: Callable[[Fit], object] | None = None,
        on_epoch: Callable[[Fit], object] | None = None,
    ) -> Fit:
        """Train to the end of the recipe, or until so many epochs or steps are done.

        At the end the model has its averaged weights, if the recipe wants them, or those of the best score.

        Args:
            after_step: called after each optimiser step, before its score.
            until, until_step: epoch or step at which to stop; the learning rate keeps to the whole recipe.
            on_step: called after each step, when its state is complete.
            on_epoch: called after each epoch.

        Raises:
            TrainingError: the loss is no longer finite, or data whose length is not what they say.
        """
        stop = self.steps if until is None else min(self.steps, until * self.steps_per_epoch)
        stop = stop if until_step is None else min(stop, until_step)
        while self.step < stop:
            self._ticked = clock(self.device)
            self._run_epoch(stop, after_step, on_step)
            self._tick()
            if on_epoch is not None:
                on_epoch(self)
        if self.done:
            self._finish()
        return self

    def _run_epoch(
        self,
        stop: int,
        after_step: Callable[[], object] | None,
        on_step: Callable[[Fit], object] | None,
    ) -> None:
        macs, epoch = self.macs(), self.epoch
        # Seed and epoch alone decide what is drawn, so that a resumed run needs no stored random state.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        drawn, size = iter(self.batches.draw(generator)), self.recipe.accumulate
        first, last = epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch
        for _ in itertools.islice(drawn, (self.step - first) * size):
            pass  # a run that was stopped within an epoch goes on where it was
        while self.step < min(stop, last):
            if not (group := [*itertools.islice(drawn, size)]):
                raise TrainingError(
                    f"the data gave {self.step - first} steps in epoch {epoch + 1} where their length "
                    f"promises {self.steps_per_epoch}; let __len__ and the number of batches agree"
                )
            self._make_step(group)
            self._count(2 * macs * sum(map(samples_in, group)))
            if after_step is not None:
                after_step()
            if self.score is not None and self._is_scored():
                self._judge(self.score)
            if on_step is not None:
                on_step(self)

    def _is_scored(self) -> bool:
        every = self.recipe.score_every or self.steps_per_epoch
        return self.done or self.step % every == 0

    def _make_step(self, group: list[Any]) -> None:
        for settings, scale in zip(self.optimizer.param_groups, self._scales, strict=True):
            settings["lr"] = self.learning_rate(self.step) * scale
        self._stepped.zero_grad()
        self._called.train()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((self.seed * 1_000_003 + self.step) % 2**63)
            for number, batch in enumerate(group, 1):
                with self._without_exchange(number < len(group)):
                    self._descend(batch, len(group))
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self._stepped.step()
        self.step += 1
        if self._average:
            get_ema_multi_avg_fn(self.recipe.ema)(self._average, self.parameters, self.step)

    def _descend(self, batch: Any, of: int) -> None:
        batch = moved(batch, self.device)
        if self._accelerator is not None and self._accelerator.num_processes > 1:
            batch = share_of(batch, self._accelerator.process_index, self._accelerator.num_processes)
        cast = torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.recipe.autocast))
        with cast:
            model = self._called
            loss = self.loss(model, batch) if self.distil is None else self.distil(self.loss, model, batch)
            # Reading a loss waits for the GPU, which is then without work: there only now and then.
            if self.device.type == "cpu" or self.step % LOOK == 0 or self.step == self.steps - 1:
                self._read(loss)
            total = loss if self.penalty is None else loss + self.penalty()
        total = total / of if of > 1 else total
        if self._accelerator is not None:
            self._accelerator.backward(total)
        else:
            total.backward()

    def _without_exchange(self, more: bool) -> Any:
        """Gradients are exchanged among processes with the last batch of a step only."""
        if self._accelerator is not None and more:
            return self._accelerator.no_sync(self._called)
        return contextlib.nullcontext()

    def _read(self, loss: Tensor) -> None:
        self.last_loss = float(loss.detach())
        if not math.isfinite(self.last_loss):
            raise TrainingError(
                f"the loss became {self.last_loss} at step {self.step}; lower the lr, or check weights and "
                "data"
            )

    def _step_macs(self) -> float:
        try:
            return step_macs(self.model, moved(self.batches.example(), self.device))
        except SparseError:  # batches of another form, or masked weights that are computed on the fly
            return math.nan

    def _count(self, flops: float) -> None:
        self.cost.flops += flops
        self._own.flops += flops

    def _tick(self) -> None:
        """Add the seconds since the last tick."""
        now = clock(self.device)
        if not math.isnan(self._ticked):
            self.cost.seconds += now - self._ticked
            self._own.seconds += now - self._ticked
        self._ticked = math.nan

    @property
    def spent(self) -> Cost:
        """What this training has cost, also before it was resumed."""
        return self._own

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place, for a score."""
        weights = [p.detach().clone() for p in self.parameters] if self._average else []
        self._put(self._average)
        try:
            yield
        finally:
            self._put(weights)

    @torch.no_grad()
    def _put(self, weights: list[Tensor]) -> None:
        for parameter, weight in zip(self.parameters, weights, strict=False):
            parameter.copy_(weight)

    def _judge(self, score: Callable[[nn.Module], float]) -> None:
        self._tick()
        with self._averaged(), torch.no_grad(), eval_mode(self.model):
            value = score(self.model)
            if self.best is None or value >= self.best.score:
                state = {k: v.detach().clone() for k, v in self._state_of_model().items()}
                self.best = Best(self.step, value, state)
        self._ticked = clock(self.device)

    def _finish(self) -> None:
        if self.best is not None:
            self._load_model(self.best.state)
        elif self._average:
            self._put(self._average)
            if (masks := masks_of(self.model)) is not None:
                masks.apply_(self.model)  # an average over changing masks has more weights than the last one

    def _state_of_model(self) -> dict[str, Tensor]:
        """Parameters that are trained, and buffers; frozen weights are the run's given."""
        frozen = {
            name for name, p in self.model.named_parameters(remove_duplicate=False) if not p.requires_grad
        }
        state = self.model.state_dict()
        return {k: v for k, v in state.items() if k not in frozen and isinstance(v, Tensor)}

    def _load_model(self, state: Mapping[str, Tensor]) -> None:
        if missing := sorted(set(self._state_of_model()) - set(state)):
            raise TrainingError(f"the stored state lacks {missing[0]!r}: it is of another model")
        found = self.model.load_state_dict(dict(state), strict=False)
        if found.unexpected_keys:
            raise TrainingError(f"the stored state has {found.unexpected_keys[0]!r}: it is of another model")

    def state(self) -> dict[str, Tensor]:
        """Everything that decides how the run goes on, as tensors; masks stay with the model."""
        if not math.isnan(self._ticked):
            self._tick()
            self._ticked = clock(self.device)
        tensors = {f"model/{name}": value for name, value in self._state_of_model().items()}
        tensors |= {f"optimizer/{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        tensors |= {f"average/{i}": value for i, value in enumerate(self._average)}
        if self.best is not None:
            tensors |= {f"best/{name}": value for name, value in self.best.state.items()}
            tensors["best_score"] = torch.tensor([self.best.step, self.best.score], dtype=torch.float64)
        spent = torch.tensor([self._own.flops, self._own.seconds], dtype=torch.float64)
        return {**tensors, "step": torch.tensor(self.step), "spent": spent}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken.

        Raises:
            TrainingError: the state is of another model or recipe.
        """
        self._load_model(part(tensors, "model/"))
        restore_optimizer(self.optimizer, part(tensors, "optimizer/"))
        average = part(tensors, "average/")
        if len(average) != len(self._average):
            raise TrainingError("the stored state is of a recipe with another ema")
        for index, value in enumerate(self._average):
            value.copy_(average[str(index)])
        if "best_score" in tensors:
            step, score = tensors["best_score"].tolist()
            self.best = Best(int(step), score, part(tensors, "best/"))
        self.step = int(tensors["step"])
        flops, seconds = tensors["spent"].tolist()
        for cost in (self.cost, self._own):
            cost.flops += flops
            cost.seconds += seconds


def _plain(trained: list[Any]) -> Iterator[nn.Parameter]:
    for item in trained:
        yield from item["params"] if isinstance(item, dict) else [item]
