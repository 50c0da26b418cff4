"""Training of detectors: the domain's one loop with AdamW and clipped gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from zoo.checkpoints import CheckpointFile
from zoo.errors import ConfigError
from zoo.vision.lidar.data import Batch, Frame, FrameBatches
from zoo.vision.lidar.detector import Detector
from zoo.vision.train import Fit, Recipe

CLIP = 10.0  # largest norm of a step's gradients (the reference's)
CHECKPOINT_SECONDS = 20.0  # least time between two checkpoints


@dataclass(frozen=True)
class DetectorRecipe:
    """How a detector is trained.

    Args:
        epochs: passes over the frames.
        batch: frames per step.
        lr: peak of AdamW's learning rate, after a linear warm-up and before a linear decay.
        weight_decay: decoupled.
        device: where, e.g. cpu or cuda.

    Raises:
        ConfigError: a number out of range, or a device that is not there.
    """

    epochs: int = 30
    batch: int = 8
    lr: float = 3e-3
    weight_decay: float = 0.01
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.plain()
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"no device {self.device!r} here; use --device cpu")

    def plain(self) -> Recipe:
        """As the domain's loop takes it."""
        return Recipe(self.epochs, self.lr, self.batch, self.weight_decay, optimizer="adam")


def detection_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the head's losses."""
    terms = cast(Detector, model).losses(batch.points, len(batch.gt_boxes), batch.gt_boxes)
    return torch.stack(list(terms.values())).sum()


class DetectorFit(Fit):
    """A training of a detector.

    Args:
        model: trained in place; moved to the recipe's device.
        frames: to train on.
        recipe: see `DetectorRecipe`.
        seed: of shuffling and augmentation.
    """

    def __init__(
        self, model: Detector, frames: Sequence[Frame], recipe: DetectorRecipe, seed: int = 0
    ) -> None:
        batches = FrameBatches(frames, recipe.batch, recipe.device)
        super().__init__(
            model.to(recipe.device), batches, recipe.plain(), loss=detection_loss, seed=seed, macs=lambda: 0.0
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.optimizer.register_step_pre_hook(self._clip)

    def _clip(self, *_: Any) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)


def run_with_checkpoints(
    fit: Fit,
    file: CheckpointFile,
    note: Callable[[Fit], object] | None = None,
    every: float = CHECKPOINT_SECONDS,
) -> Fit:
    """Run a training to its end, going on where an interrupted one stopped.

    Args:
        fit: fresh.
        file: where the state is kept.
        note: called after each epoch.
        every: seconds between checkpoints.
    """
    if (stored := file.read()) is not None:
        fit.load_state(stored[0])
    last = time.monotonic()

    def on_epoch(running: Fit) -> None:
        nonlocal last
        if note is not None:
            note(running)
        if running.epoch < running.recipe.epochs and time.monotonic() - last >= every:
            file.write(running.state(), {})
            last = time.monotonic()

    return fit.run(on_epoch=on_epoch)
