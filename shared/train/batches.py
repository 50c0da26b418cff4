"""Training data: batches drawn anew for each epoch from a generator, and how a `DataLoader` becomes such."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sized
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import TrainingError


@runtime_checkable
class Batches(Protocol):
    """Training data: so many batches an epoch, drawn anew for each from a generator.

    Batches that can be made to another size also have `sized(batch) -> Batches`.
    """

    def __len__(self) -> int: ...

    def draw(self, generator: torch.Generator) -> Iterator[Any]:
        """The batches of one epoch; the generator alone decides what they are."""

    def example(self) -> tuple[Any, ...]:
        """One sample, as the model takes it."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Batches that a function draws.

    Args:
        make: (samples, generator) -> a batch.
        batch: samples per step.
        steps: per epoch.
        inputs: how many parts of a sample the model takes; 0 if it takes the sample as one.
    """

    make: Callable[[int, torch.Generator], Any]
    batch: int
    steps: int
    inputs: int = 0

    def __len__(self) -> int:
        return self.steps

    def sized(self, batch: int) -> Drawn:
        """The same data in batches of another size."""
        return dataclasses.replace(self, batch=batch)

    def draw(self, generator: torch.Generator) -> Iterator[Any]:
        """The batches of one epoch."""
        for _ in range(self.steps):
            yield self.make(self.batch, generator)

    def example(self) -> tuple[Any, ...]:
        """One sample, as the model takes it."""
        sample = self.make(1, torch.Generator().manual_seed(0))
        return tuple(sample[: self.inputs]) if self.inputs else (sample,)


class Loaded:
    """Batches of a `DataLoader`, or of any sized iterable of batches.

    Order and augmentation follow the generator as far as they draw from torch's random numbers.
    """

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def draw(self, generator: torch.Generator) -> Iterator[Any]:
        """The batches of one epoch. The random state outside stays as it was, also between batches."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            for part in (self.source, getattr(self.source, "sampler", None)):
                own = getattr(part, "generator", None)
                if isinstance(own, torch.Generator):
                    own.manual_seed(generator.initial_seed())
            iterator, state = iter(self.source), torch.get_rng_state()
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                state = torch.get_rng_state()
            yield batch

    def example(self) -> tuple[Any, ...]:
        """The inputs of the first sample of a batch `(inputs, targets)`.

        Raises:
            TrainingError: the batches are of another form, so that nobody knows what the model takes.
        """
        batch = next(self.draw(torch.Generator().manual_seed(0)), None)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TrainingError(
                f"the batches are {type(batch).__name__}, not (inputs, targets): what the model takes of "
                "them is unknown; give the job Batches with an example()"
            )
        inputs = batch[0] if isinstance(batch[0], (tuple, list)) else (batch[0],)
        return tuple(value[:1] for value in inputs)


def as_batches(source: Any) -> Batches:
    """`Batches` of a `DataLoader` or of any sized iterable of batches; `Batches` stay what they are.

    Raises:
        TrainingError: no length is known, or there is no batch.
    """
    if not isinstance(source, Sized) or not hasattr(source, "__iter__") and not hasattr(source, "draw"):
        raise TrainingError(
            f"batches are a DataLoader, a list of batches or Batches; received {type(source).__name__}"
        )
    try:
        length = len(source)
    except TypeError as error:
        raise TrainingError(f"the data have no length: {error}; wrap them in a map-style dataset") from error
    if length < 1:
        raise TrainingError("the data have no batch; give more samples, or a smaller batch")
    return source if isinstance(source, Batches) else Loaded(source)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch whose tensors are on a device."""
    return tree_map(lambda v: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v, batch)


def samples_in(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor; a graph, say, that is no tensor is one."""
    return next((len(v) for v in tree_leaves(batch) if isinstance(v, Tensor) and v.dim()), 1)


def share_of(batch: Any, rank: int, processes: int) -> Any:
    """Every `processes`-th sample of a batch, from sample `rank` on.

    Raises:
        TrainingError: its tensors do not all have one entry per sample, or the processes do not divide them.
    """
    lengths = {len(v) if v.dim() else 0 for v in tree_leaves(batch) if isinstance(v, Tensor)}
    if len(lengths) != 1 or (length := lengths.pop()) % processes or not length:
        raise TrainingError(
            f"a batch must be a multiple of the {processes} processes, with one entry per sample in each of "
            "its tensors; choose another batch, or train in one process"
        )
    return tree_map(lambda v: v[rank::processes] if isinstance(v, Tensor) else v, batch)
