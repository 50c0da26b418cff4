"""SparCL (Wang et al., NeurIPS 2022): continual learning of a network that is sparse throughout.

Three parts: masks that follow the task (TDM), sparse gradients (DGM), and data that are left out once they
are learned (DDR), around the replay of DER++ (Buzzega et al., 2020). Forms and constants are those of the
released code, neu-spiral/SparCL, with its epochs as shares of a task; without its extra room of one percent
in a task's first epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.methods.training import Pruned, TrainingMethod, cost_of_step
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.masks.topk import topk_mask
from zoo.shared.pruning.budgets import kept_count
from zoo.shared.pruning.choose import random_masks
from zoo.shared.pruning.inventory import inner_weights
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Job

SHARE, EVERY = 0.8, 30  # of the kept weights' gradients that is used; batches between looks for which
MOVED = 0.3  # share of the kept weights that SET moves
NEVER = 50  # forgetting events of an example that was never right: it is the last to be left out


def importance(
    weight: Float[Tensor, "*s"], of_task: Float[Tensor, "*s"], of_buffer: Float[Tensor, "*s"], gain: float
) -> Float[Tensor, "*s"]:
    """|w| + gain (|dL(task)/dw| + |dL(buffer)/dw|): large, or large in what old or new data still ask for."""
    return weight.abs() + gain * (of_task.abs() + of_buffer.abs())


def moved_mask(
    keep: Bool[Tensor, "*s"],
    score: Float[Tensor, "*s"],
    kept: int,
    grown: int,
    generator: torch.Generator,
) -> Bool[Tensor, "*s"]:
    """The mask with its `kept` best entries and random dropped ones up to `grown`.

    Raises:
        ConfigError: fewer are to grow than to stay.
    """
    if grown < kept:
        raise ConfigError(f"a mask that is cut to {kept} entries cannot grow to {grown}")
    stay = topk_mask(torch.where(keep, score, -1.0), kept)
    drawn = torch.rand(keep.shape, generator=generator).to(keep.device)
    return topk_mask(torch.where(stay, 2.0, drawn), grown)


def left_in(events: Int[Tensor, " n"], ever: Bool[Tensor, " n"], fewer: int) -> Int[Tensor, " left"]:
    """Positions of the examples that stay when the `fewer` with the fewest forgetting events go; those that
    were never right stay longest."""
    scored = torch.where(ever, events.clamp(max=NEVER - 1), NEVER)
    return scored.argsort(stable=True)[fewer:].sort().values


class Reservoir:
    """A buffer of so many examples, each ever seen in it with equal chance (Vitter 1985), with the logits of
    when it came in."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seen = size, 0
        self.stored: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, *batch: Tensor) -> None:
        """Offer inputs, labels and logits."""
        if not self.stored:
            self.stored = [value.new_zeros((self.size, *value.shape[1:])) for value in batch]
        for row in range(len(batch[0])):
            place = int(torch.randint(self.seen + 1, (), generator=self.generator))
            place = self.seen if self.seen < self.size else place
            self.seen += 1
            if place < self.size:
                for store, value in zip(self.stored, batch, strict=True):
                    store[place] = value[row]

    def draw(self, count: int) -> list[Tensor]:
        """Some of what is in it, with repetition."""
        rows = torch.randint(min(self.seen, self.size), (count,), generator=self.generator)
        return [value[rows.to(value.device)] for value in self.stored]


@dataclass(frozen=True)
class Examples:
    """Batches of (inputs, labels, numbers) of a part of a task; the last, short one is left out."""

    x: Tensor
    y: Tensor
    numbers: Int[Tensor, " n"]
    batch: int

    def __len__(self) -> int:
        return max(1, len(self.numbers) // self.batch)

    def draw(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = self.numbers[torch.randperm(len(self.numbers), generator=generator)]
        for rows in order[: len(self) * self.batch].split(self.batch):
            yield self.x[rows], self.y[rows], rows

    def example(self) -> tuple[Tensor, ...]:
        return (self.x[:1],)


@dataclass
class Replay:
    """DER++: cross-entropy over the task's classes, plus old logits and old labels from the buffer; counts on
    the way which examples were right and are wrong again."""

    buffer: Reservoir
    classes: Tensor
    count: int
    alpha: float
    beta: float
    right: Tensor = field(init=False)
    ever: Tensor = field(init=False)
    events: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.right, self.ever = torch.zeros(2, self.count, dtype=torch.bool)
        self.events = torch.zeros(self.count, dtype=torch.long)

    def task_loss(self, logits: Float[Tensor, "b c"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Cross-entropy with the logits of all other classes at minus infinity."""
        others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        others[self.classes.to(logits.device)] = False
        return functional.cross_entropy(logits.masked_fill(others, -math.inf), labels)

    def of_buffer(self, model: nn.Module, count: int) -> Tensor:
        """alpha MSE to the old logits + beta cross-entropy with the old labels, of two draws."""
        x, _, z = self.buffer.draw(count)
        x2, y2, _ = self.buffer.draw(count)
        both = model(torch.cat([x, x2]))
        old, own = both[:count], both[count:]
        return self.alpha * functional.mse_loss(old, z) + self.beta * functional.cross_entropy(own, y2)

    def __call__(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        x, y, numbers = batch
        logits = model(x)
        loss = self.task_loss(logits, y)
        if self.buffer.seen:
            loss = loss + self.of_buffer(model, len(x))
        self.note(numbers, self.classes[logits.detach()[:, self.classes].argmax(1)] == y)
        self.buffer.add(x, y, logits.detach())
        return loss

    def note(self, numbers: Int[Tensor, " b"], right: Bool[Tensor, " b"]) -> None:
        """Count the examples that were right when they were last seen and are wrong now."""
        self.events[numbers] += (self.right[numbers] & ~right).long()
        self.ever[numbers] |= right
        self.right[numbers] = right


class SparseGradients:
    """Gradients of which only the largest entries are used; which they are is looked up every so many
    batches."""

    def __init__(self, share: float, every: int) -> None:
        self.share, self.every = share, every
        self.calls: dict[str, int] = {}
        self.keep: dict[str, Tensor] = {}

    def filtered(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient with zeros outside its mask, looked up anew when it is time."""
        made = self.calls.get(name, 0)
        if made % self.every == 0:
            self.keep[name] = topk_mask(gradient.abs(), max(1, round(self.share * gradient.numel())))
        self.calls[name] = made + 1
        return gradient * self.keep[name]


@dataclass
class SparCL(TrainingMethod):
    """Learn classes task after task from fresh weights, with the same share of zeros from the first step on.

    The job's samples, taken once, are divided into tasks by their labels; the recipe's epochs are those of
    one task. The dense model that is given lends its shape only.
    """

    recipe: ClassVar[dict[str, Any]] = {
        **TrainingMethod.recipe,
        **{"epochs": 5, "batch": 32, "lr": 0.03, "momentum": 0.0, "weight_decay": 0.0},
        **{"warmup": 0.0, "decay": "constant"},
    }

    tasks: int = 2
    """Tasks that the classes are divided into, in their order."""

    masks: Literal["dense", "static", "set", "task"] = "task"
    """How masks move: by the task (TDM), by magnitude (SET), or not at all; dense trains without."""

    sparse_gradients: bool = True
    """Use the largest entries of each gradient only, a fifth fewer than kept weights (DGM)."""

    removal: float = 0.3
    """Share of a task's examples that is left out in its course (DDR); 0 keeps all."""

    buffer: int = 200
    """Examples that are kept for replay."""

    gain: float = 0.5
    """Weight of gradients beside magnitudes."""

    alpha: float = 0.1
    """Weight of old logits."""

    beta: float = 0.5
    """Weight of old labels."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        batches = list(job.batches.draw(torch.Generator().manual_seed(job.seed)))
        if not all(isinstance(b, (tuple, list)) and len(b) == 2 and b[1].dim() == 1 for b in batches):
            raise ConfigError("SparCL learns classes: the job must give batches (inputs, labels)")
        x, y = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
        return Pruned(self.learn(model, x, y, tasks_of(y, self.tasks), job))

    def learn(
        self,
        model: nn.Module,
        x: Tensor,
        y: Int[Tensor, " n"],
        tasks: Sequence[Int[Tensor, " classes"]],
        job: Job,
        after_task: Callable[[nn.Module], object] | None = None,
    ) -> nn.Module:
        """A fresh relative of the model that learned the tasks in their order.

        Args:
            model: whose shape is taken.
            x, y: all training samples and their labels.
            tasks: classes of each.
            job: recipe, seed and cost; its batches are not used.
            after_task: called with the model.

        Raises:
            ConfigError: tasks that share classes or have no sample, or options that contradict each other.
        """
        self._check(y, tasks, min(job.recipe.batch, len(x)))
        learner = reinitialised(model, job.seed).to(job.device)
        buffer, generator = Reservoir(self.buffer, job.seed), torch.Generator().manual_seed(job.seed)
        if self.masks != "dense":
            self._first(learner, job.seed).attach(learner).detach()
        epochs = job.recipe.epochs
        for number, classes in enumerate(tasks):
            numbers = torch.isin(y, classes).nonzero()[:, 0]
            size, replay = len(numbers), Replay(buffer, classes, len(y), self.alpha, self.beta)
            for epoch in range(epochs):
                if epoch and self.removal:
                    left = size - int(self.removal * size * epoch / (epochs - 1))
                    fewer = len(numbers) - left
                    numbers = numbers[left_in(replay.events[numbers], replay.ever[numbers], fewer)]
                    replay.events.zero_()
                part = Examples(x, y, numbers, min(job.recipe.batch, len(numbers)))
                if self.masks in ("set", "task") and (number or epoch):
                    self._move(learner, replay, part, epoch / epochs, generator)
                self._epoch(learner, job.replace(batches=part, loss=replay), number * epochs + epoch)
            if after_task is not None:
                after_task(learner)
        return learner

    def _epoch(self, model: nn.Module, job: Job, number: int) -> None:
        masks = masks_of(model)
        fit = job.fit(model, epochs=1, seed=job.seed * 7919 + number, macs=lambda: self._macs(model, job))
        # Made anew for each epoch: a mask of gradients older than that of the weights would starve new ones.
        gradients = SparseGradients(SHARE * (1 - self.sparsity), EVERY)
        names = list(masks) if masks is not None and self.sparse_gradients else []
        hooks = [model.get_parameter(n).register_hook(partial(gradients.filtered, n)) for n in names]
        with nullcontext() if masks is None else masks.attach(model, fit.optimizer):
            fit.run()
        for hook in hooks:
            hook.remove()

    def _macs(self, model: nn.Module, job: Job) -> float:
        """Of a step, per new sample: it and two of the buffer. Weight gradients count by the share that is
        used, and densely each time that share is looked up."""
        kept, dense = (cost_of_step(model, job, masks) / 3 for masks in (None, MaskSet({})))
        if self.masks == "dense" or not self.sparse_gradients:
            return 3 * 3 * kept
        inside = (dense - kept) / self.sparsity if self.sparsity else dense
        return 3 * (2 * kept + dense - inside + (SHARE * (1 - self.sparsity) + 1 / EVERY) * inside)

    def _first(self, model: nn.Module, seed: int) -> MaskSet:
        """The masks of the start: the largest of the fresh weights, or random ones where they stay."""
        weights = {name: model.get_parameter(name).detach() for name in inner_weights(model)}
        counts = {name: kept_count(weight.numel(), self.sparsity) for name, weight in weights.items()}
        if self.masks == "static":
            return random_masks(model, counts, seed)
        return MaskSet({name: topk_mask(weight.abs(), counts[name]) for name, weight in weights.items()})

    def _move(
        self, model: nn.Module, replay: Replay, part: Examples, time: float, generator: torch.Generator
    ) -> None:
        """Drop and grow; by the task a hundredth of all weights, and none at its end."""
        masks = masks_of(model.train())
        assert masks is not None
        weights = {name: model.get_parameter(name) for name in masks}
        scores = {name: weight.detach().abs() for name, weight in weights.items()}
        if self.masks == "task":
            x, y, _ = next(part.draw(generator))
            losses = [replay.task_loss(model(x), y)]
            losses += [replay.of_buffer(model, len(x))] if replay.buffer.seen else []
            found = [torch.autograd.grad(loss, list(weights.values())) for loss in losses]
            for place, (name, weight) in enumerate(weights.items()):
                of_task, of_buffer = found[0][place], found[-1][place] * (len(found) - 1)
                scores[name] = importance(weight.detach(), of_task, of_buffer, self.gain)
        moved = {}
        for name, mask in masks.items():
            goes = MOVED * mask.kept if self.masks == "set" else 0.01 * mask.numel * (time < 0.9)
            stays = max(1, mask.kept - int(goes))
            moved[name] = moved_mask(mask.keep, scores[name], stays, mask.kept, generator)
        MaskSet(moved).attach(model).detach()

    def _check(self, y: Tensor, tasks: Sequence[Tensor], batch: int) -> None:
        together = torch.cat(list(tasks))
        if len(together.unique()) != len(together) or not all(bool(torch.isin(y, t).any()) for t in tasks):
            raise ConfigError(f"tasks must not share classes, and each must have samples; received {tasks}")
        if self.buffer < batch:
            raise ConfigError(f"the buffer of {self.buffer} is smaller than a batch of {batch}")
        if not 0 <= self.removal < 1:
            raise ConfigError(f"removal leaves out a share from 0 up to 1; received {self.removal}")


def tasks_of(labels: Int[Tensor, " n"], tasks: int) -> list[Int[Tensor, " classes"]]:
    """The classes in their order, divided into so many tasks of nearly equal size.

    Raises:
        ConfigError: more tasks than classes, or none.
    """
    classes = labels.unique()
    if not 1 <= tasks <= len(classes):
        raise ConfigError(f"{len(classes)} classes cannot be divided into {tasks} tasks")
    return list(classes.tensor_split(tasks))
