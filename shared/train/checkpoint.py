"""The state of one run in one checked file: written whole or not at all, verified when read."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import FormatError, IdentityError
from ..store.checked import identity_of, read_checked, write_checked

if TYPE_CHECKING:
    from .fit import Fit

FILE = "state.safetensors"


class Checkpoint:
    """Where one run keeps its state.

    Args:
        folder: made at the first write.
        identity: what a run must agree with to go on from here, as plain values.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = Path(folder), identity_of(identity)

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Store tensors by name and short facts; the old state stays until the new one is complete.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        write_checked(self.folder / FILE, tensors, facts, identity=self.identity)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and facts that were written; None if there are none yet.

        Raises:
            IdentityError: the checkpoint is of another run.
            FormatError: it is damaged or cannot be read.
        """
        path, remedy = self.folder / FILE, f"Delete {self.folder} to start anew."
        if not path.exists():
            return None
        try:
            return read_checked(path, identity=self.identity)
        except IdentityError as error:
            raise IdentityError(
                f"{path} belongs to a run with other options or another model. {remedy}"
            ) from error
        except (OSError, FormatError) as error:
            raise FormatError(f"{path} cannot be read: {error}. {remedy}") from error

    def remove(self) -> None:
        """Forget the state, once the run's result is safe."""
        shutil.rmtree(self.folder, ignore_errors=True)


def resume(
    fit: Fit,
    checkpoint: Checkpoint,
    *,
    every_epochs: int = 0,
    every_steps: int = 0,
    seconds: float = 0.0,
    last: bool = False,
    until_step: int | None = None,
    note: Callable[[Fit], object] | None = None,
    after_step: Callable[[], object] | None = None,
    facts: Mapping[str, Any] | None = None,
    writes: bool = True,
) -> Fit:
    """Run a training to its end, going on where an interrupted one stopped.

    Args:
        fit: fresh.
        checkpoint: where its state is kept.
        every_epochs, every_steps: between two checkpoints; 0 for none.
        seconds: least time between two checkpoints.
        last: whether the last state is kept, too, so that a finished training is not repeated.
        until_step: as for `Fit.run`; the state is kept there.
        note: called after each step.
        after_step: as for `Fit.run`.
        facts: stored with the state.
        writes: False in the processes that leave the file to another.

    Raises:
        FormatError: the stored state is damaged or of another run (`IdentityError`).
        StorageError: the state cannot be written.
        TrainingError: the loss is no longer finite.
    """
    if (stored := checkpoint.read()) is not None:
        fit.load_state(stored[0])
    written = time.monotonic()
    every = every_steps or every_epochs * fit.steps_per_epoch

    def on_step(_: Fit) -> None:
        nonlocal written
        if note is not None:
            note(fit)
        due = every and fit.step % every == 0 and time.monotonic() - written >= seconds
        if writes and (last if fit.done else due or fit.step == until_step):
            checkpoint.write(fit.state(), facts)
            written = time.monotonic()

    return fit.run(after_step, until_step=until_step, on_step=on_step)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as `index/key` tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{key}": torch.as_tensor(value)
        for index, entries in state.items()
        for key, value in entries.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; groups and hyperparameters stay the optimiser's own."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in stored.items():
        index, _, key = name.partition("/")
        states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
