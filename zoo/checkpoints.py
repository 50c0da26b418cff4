"""The state of a run in one safetensors file: written whole or not at all, read without running anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from zoo.errors import ConfigError
from zoo.shared.store.io import atomic_write

FILE = "state.safetensors"


class CheckpointFile:
    """Where one run keeps its state.

    Args:
        folder: made at the first write.
        identity: what a run must agree with to go on from here, as plain values.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        text = json.dumps(dict(identity), sort_keys=True, default=str)
        self.identity = hashlib.sha256(text.encode()).hexdigest()

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Store tensors by name and short facts; the old state stays until the new one is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        atomic_write(self.folder / FILE, save(plain, metadata={**facts, "identity": self.identity}))

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The tensors and facts that were written; None if there are none yet.

        Raises:
            ConfigError: the checkpoint is of another run or damaged.
        """
        path = self.folder / FILE
        if not path.exists():
            return None
        remedy = f"Delete {self.folder} to start anew."
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}. {remedy}") from error
        if facts.get("identity") != self.identity:
            raise ConfigError(f"{path} belongs to a run with other options or another model. {remedy}")
        return tensors, facts


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as `index/key` tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{key}": torch.as_tensor(v) for index, s in state.items() for key, v in s.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; groups and hyperparameters stay the optimizer's own."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in stored.items():
        index, _, key = name.partition("/")
        states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
