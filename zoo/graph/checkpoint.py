"""What a training on a graph keeps: weights, moments, the best epoch, torch's random state."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.checkpoints import CheckpointFile, optimizer_tensors, part, restore_optimizer
from zoo.graph.train import Best, Fit


class Checkpoint(CheckpointFile):
    """The checkpoint file of one `Fit`."""

    def save(self, fit: Fit) -> None:
        """Store a run's state; the old one stays until this one is complete."""
        best = fit.result()
        tensors: dict[str, Tensor] = {"rng": torch.get_rng_state(), "best/logits": best.logits}
        tensors |= {f"model/{k}": v for k, v in fit.model.state_dict().items()}
        tensors |= {f"best/weights/{k}": v for k, v in best.weights.items()}
        tensors |= {f"best/masks/{k}": v for k, v in best.masks.items()}
        tensors |= {f"adam/{k}": v for k, v in optimizer_tensors(fit.optimizer).items()}
        facts = {
            "epoch": str(fit.epoch),
            "best_epoch": str(best.epoch),
            "best_val": best.val_accuracy.hex(),
        }
        self.write(tensors, facts)

    def restore(self, fit: Fit) -> bool:
        """Put a run back to where its checkpoint was written; False if there is none.

        Raises:
            ConfigError: the checkpoint is of another run or damaged.
        """
        stored = self.read()
        if stored is None:
            return False
        tensors, facts = stored
        fit.model.load_state_dict(part(tensors, "model/"))
        restore_optimizer(fit.optimizer, part(tensors, "adam/"))
        fit.epoch = int(facts["epoch"])
        fit.best = Best(
            epoch=int(facts["best_epoch"]),
            val_accuracy=float.fromhex(facts["best_val"]),
            logits=tensors["best/logits"].to(fit.device),
            weights=part(tensors, "best/weights/"),
            masks=part(tensors, "best/masks/"),
        )
        torch.set_rng_state(tensors["rng"])
        return True
