"""The one training loop of the domain, and what a training costs.

`Fit` runs epochs over batches with warm-up and linear decay; every method drives it through `after_step`,
`penalty` and the choice of parameters. What an epoch draws depends on seed and epoch alone, so that a run
resumed from weights, moments and epoch equals one that was never interrupted. `Trainer` holds what all
trainings of one method share - data, recipe, seed - and sums up what they cost.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.checkpoints import optimizer_tensors, part, restore_optimizer
from zoo.errors import ConfigError
from zoo.shared.errors import MaskError
from zoo.shared.masks import masks_of
from zoo.shared.measure.account import count
from zoo.shared.measure.modes import eval_mode
from zoo.shared.pruning.schedules import Linear, Ramp
from zoo.vision.data import Images, Split, drawn_moves, shifted_and_mirrored

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]
LOOK = 50  # steps between looks at the loss on a GPU


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        epochs: passes over the training images.
        lr: peak of the learning rate: linear warm-up over a tenth of the steps, then linear to 0.
        batch: images per step.
        weight_decay: L2 penalty on all trained parameters.
        momentum: of SGD.
        optimizer: SGD with Nesterov momentum, or Adam.

    Raises:
        ConfigError: a number out of range.
    """

    epochs: int = 10
    lr: float = 0.1
    batch: int = 64
    weight_decay: float = 5e-4
    momentum: float = 0.9
    optimizer: Literal["sgd", "adam"] = "sgd"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise ConfigError(f"epochs and batch must be at least 1; received {self.epochs}, {self.batch}")
        for name in ("lr", "weight_decay", "momentum"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be finite and not negative; received {value}")
        if self.optimizer not in ("sgd", "adam"):
            raise ConfigError(f"optimizer is 'sgd' or 'adam'; received {self.optimizer!r}")


@runtime_checkable
class Batches(Protocol):
    """Training data: so many batches an epoch, drawn anew for each from a generator."""

    def __len__(self) -> int: ...

    def draw(self, generator: torch.Generator) -> Iterator[Any]:
        """The batches of one epoch."""

    def example(self) -> tuple[Tensor, ...]:
        """One sample, as the model takes it."""


@dataclass(frozen=True)
class ImageBatches:
    """Shuffled batches of training images, made where the images are; the last, short one of an epoch is left
    out unless it is the only one. What is drawn does not depend on the device."""

    data: Images
    batch: int

    def __len__(self) -> int:
        return max(1, len(self.data.train) // self.batch)

    def draw(self, generator: torch.Generator) -> Iterator[Batch]:
        device, count = self.data.device, len(self.data.train)
        order = torch.randperm(count, generator=generator).to(device)
        moves = drawn_moves(count, generator).to(device) if self.data.augment else None
        for start in range(0, len(self) * self.batch, self.batch):
            chosen = slice(start, start + self.batch)
            part = self.data.train.take(order[chosen])
            images = part.images if moves is None else shifted_and_mirrored(part.images, moves[:, chosen])
            yield self.data.normalised(images), part.labels

    def example(self) -> tuple[Tensor, ...]:
        return (self.data.normalised(self.data.train.images[:1]),)


def cross_entropy(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """The loss of a classifier on a batch of images and labels."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@dataclass
class Cost:
    """What trainings have cost: operations as counted, and seconds (see `clock`)."""

    flops: float = 0.0
    seconds: float = 0.0


def clock(device: torch.device) -> float:
    """Processor seconds of this process, or on a GPU the seconds of the wall with its work done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def step_macs(model: nn.Module, example: tuple[Tensor, ...], dense_gradients: bool = False) -> float:
    """Multiply-accumulates of one training step on one sample: the forward product, and in the backward pass
    the products with the weights and for the weights.

    Products with masked weights are counted for the kept entries only, and so are weight gradients unless
    `dense_gradients` says that the method needs all of them. Weights that gates compute count as dense.
    """
    total = count(model, example).total
    return float(2 * total.macs_kept + (total.macs if dense_gradients else total.macs_kept))


class Fit:
    """One training, on the device of the model, where the batches must be, too.

    Args:
        model: trained in place.
        batches: the data.
        recipe: see `Recipe`.
        loss: of model and batch.
        seed: of shuffling and augmentation.
        parameters: what is trained; by default all parameters of the model.
        penalty: added to the loss of every step.
        macs: multiply-accumulates of a step on one sample, asked for at each epoch; by default `step_macs`.
        cost: where flops and seconds are added.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        recipe: Recipe,
        *,
        loss: Loss = cross_entropy,
        seed: int = 0,
        parameters: Iterable[nn.Parameter] | None = None,
        penalty: Callable[[], Tensor] | None = None,
        macs: Callable[[], float] | None = None,
        cost: Cost | None = None,
    ) -> None:
        self.model, self.batches, self.recipe, self.seed = model, batches, recipe, seed
        self.loss, self.penalty = loss, penalty
        self.cost = cost if cost is not None else Cost()
        self.macs = macs or (lambda: step_macs(model, batches.example()))
        self.epoch = self.step = 0
        self.last_loss = math.nan
        self.device = next(model.parameters()).device
        if self.device.type != "cpu":
            # The layout of a GPU's fast convolutions.
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trained = list(model.parameters() if parameters is None else parameters)
        self.optimizer: torch.optim.Optimizer
        if recipe.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                trained,
                lr=recipe.lr,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                nesterov=recipe.momentum > 0,
            )
        else:
            self.optimizer = torch.optim.Adam(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.recipe.epochs * len(self.batches)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over a tenth of the steps, then linear to zero."""
        warm = max(1, self.steps // 10)
        if step < warm:
            return self.recipe.lr * (step + 1) / warm
        fall: Ramp = Linear(0.0, end=max(self.steps, warm + 1), start=warm, initial=self.recipe.lr)
        return fall(step)

    def run(
        self,
        after_step: Callable[[], object] | None = None,
        *,
        until: int | None = None,
        on_epoch: Callable[[Fit], object] | None = None,
    ) -> Fit:
        """Train to the end of the recipe, or until so many epochs are done.

        Args:
            after_step: called after each optimiser step.
            until: epoch at which to stop; the learning rate keeps to the whole recipe.
            on_epoch: called after each epoch.

        Raises:
            ConfigError: the loss is no longer finite.
        """
        last = self.recipe.epochs if until is None else min(until, self.recipe.epochs)
        while self.epoch < last:
            start = clock(self.device)
            self._run_epoch(after_step)
            self.cost.seconds += clock(self.device) - start
            if on_epoch is not None:
                on_epoch(self)
        return self

    def _run_epoch(self, after_step: Callable[[], object] | None) -> None:
        macs, samples = self.macs(), 0
        self.model.train()
        # Seed and epoch alone decide what is drawn, so that a resumed run needs no stored random state.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        self.step = self.epoch * len(self.batches)
        for batch in self.batches.draw(generator):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step)
            self.optimizer.zero_grad()
            loss = self.loss(self.model, batch)
            # Reading a loss waits for the GPU, which is then without work: there only now and then.
            if self.device.type == "cpu" or self.step % LOOK == 0 or self.step == self.steps - 1:
                self._read(loss)
            total = loss if self.penalty is None else loss + self.penalty()
            total.backward()
            self.optimizer.step()
            self.step += 1
            samples += len(batch[0])
            if after_step is not None:
                after_step()
        self.epoch += 1
        self.cost.flops += 2 * macs * samples

    def _read(self, loss: Tensor) -> None:
        self.last_loss = float(loss.detach())
        if not math.isfinite(self.last_loss):
            raise ConfigError(f"the loss became {self.last_loss} at step {self.step}; lower the lr")

    def state(self) -> dict[str, Tensor]:
        """Everything that decides how the run goes on, as tensors; masks stay with the model."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"optimizer/{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        return {**tensors, "epoch": torch.tensor(self.epoch)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self.model.load_state_dict(part(tensors, "model/"))
        restore_optimizer(self.optimizer, part(tensors, "optimizer/"))
        self.epoch = int(tensors["epoch"])


@dataclass
class Trainer:
    """What all trainings of one method have in common.

    Attributes:
        data: the images; models are trained on their device.
        recipe: from which single trainings may differ.
        seed: of shuffling, augmentation and fresh weights.
        cost: of all trainings so far.
    """

    data: Images
    recipe: Recipe
    seed: int = 0
    cost: Cost = field(default_factory=Cost)

    def fit(
        self,
        model: nn.Module,
        *,
        seed: int | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        penalty: Callable[[], Tensor] | None = None,
        macs: Callable[[], float] | None = None,
        **changes: Any,
    ) -> Fit:
        """A training that is ready to run.

        Args:
            model, parameters, penalty, macs: as for `Fit`.
            seed: instead of the trainer's.
            changes: fields of the recipe to replace, e.g. `epochs=3`.
        """
        recipe = dataclasses.replace(self.recipe, **changes)
        return Fit(
            model,
            ImageBatches(self.data, recipe.batch),
            recipe,
            seed=self.seed if seed is None else seed,
            parameters=parameters,
            penalty=penalty,
            macs=macs,
            cost=self.cost,
        )

    def fit_masked(self, model: nn.Module, **options: Any) -> Fit:
        """Train a model to the end with the masks that it carries held in place; options as for `fit`.

        Raises:
            MaskError: it carries none.
        """
        masks = masks_of(model)
        if masks is None:
            raise MaskError("the model carries no masks to hold; sparsify it first, or use fit")
        fit = self.fit(model, **options)
        with masks.attach(model, fit.optimizer):
            return fit.run()

    def batches(self, limit: int, seed_offset: int = 0) -> list[Batch]:
        """The first `limit` batches of an epoch drawn with the trainer's seed plus an offset: for scores and
        statistics."""
        generator = torch.Generator().manual_seed(self.seed + seed_offset)
        drawn = ImageBatches(self.data, self.recipe.batch).draw(generator)
        return [batch for _, batch in zip(range(limit), drawn, strict=False)]


def correct(model: nn.Module, data: Images, split: Split, batch: int = 500) -> Bool[Tensor, " n"]:
    """Which images of a split the model, put in eval mode for it, classifies rightly."""
    found = []
    with torch.no_grad(), eval_mode(model):
        for start in range(0, len(split), batch):
            logits = model(data.normalised(split.images[start : start + batch]))
            found.append(logits.argmax(1) == split.labels[start : start + batch])
    return torch.cat(found).cpu()


def accuracy(model: nn.Module, data: Images, split: Split) -> float:
    """Share of a split that the model classifies rightly."""
    return float(correct(model, data, split).double().mean())
