"""The state of a training in one safetensors file, written whole or not at all and read without running
anything.
"""

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

from shared.io import atomic_write
from zoo.errors import ConfigError
from zoo.graph.train import Best, Fit

FILE = "state.safetensors"


class Checkpoint:
    """Where one run keeps its state.

    Args:
        folder: made at the first write.
        identity: what a run must agree with to go on from here, as plain values.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        text = json.dumps(dict(identity), sort_keys=True, default=str)
        self.identity = hashlib.sha256(text.encode()).hexdigest()

    def write(self, fit: Fit) -> None:
        """Store weights, moments, the best epoch and torch's random state."""
        best = fit.result()
        tensors: dict[str, Tensor] = {"rng": torch.get_rng_state(), "best/logits": best.logits}
        tensors |= {f"model/{k}": v for k, v in fit.model.state_dict().items()}
        tensors |= {f"best/weights/{k}": v for k, v in best.weights.items()}
        tensors |= {f"best/masks/{k}": v for k, v in best.masks.items()}
        for index, state in fit.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{index}/{k}": torch.as_tensor(v) for k, v in state.items()}
        facts = {
            "identity": self.identity,
            "epoch": str(fit.epoch),
            "best_epoch": str(best.epoch),
            "best_val": best.val_accuracy.hex(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        content = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata=facts)
        atomic_write(self.folder / FILE, content)

    def restore(self, fit: Fit) -> bool:
        """Put a run back to where its checkpoint was written; False if there is none.

        Raises:
            ConfigError: the checkpoint is of another run or damaged.
        """
        path = self.folder / FILE
        if not path.exists():
            return False
        remedy = f"Delete {self.folder} to start anew."
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}. {remedy}") from error
        if facts.get("identity") != self.identity:
            raise ConfigError(f"{path} belongs to a run with other options or another model. {remedy}")
        fit.model.load_state_dict(_part(tensors, "model/"))
        _restore_optimizer(fit.optimizer, _part(tensors, "adam/"))
        fit.epoch = int(facts["epoch"])
        fit.best = Best(
            epoch=int(facts["best_epoch"]),
            val_accuracy=float.fromhex(facts["best_val"]),
            logits=tensors["best/logits"].to(fit.device),
            weights=_part(tensors, "best/weights/"),
            masks=_part(tensors, "best/masks/"),
        )
        torch.set_rng_state(tensors["rng"])
        return True


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _restore_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in stored.items():
        index, _, key = name.partition("/")
        states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
