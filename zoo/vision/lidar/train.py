"""Training of detectors: AdamW, clipped gradients, the sum of the head's losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from zoo.shared.train import Job, Recipe, device_named
from zoo.vision.lidar.data import Batch, Frame, FrameBatches
from zoo.vision.lidar.detector import Detector

CLIP = 10.0  # largest norm of a step's gradients (the reference's)


def detector_recipe(epochs: int = 30, batch: int = 8, lr: float = 3e-3, weight_decay: float = 0.01) -> Recipe:
    """AdamW with a linear warm-up and a linear decay; `batch` is in frames."""
    return Recipe(epochs, lr, batch, weight_decay, optimizer="adamw", clip=CLIP)


def detector_job(
    frames: Sequence[Frame],
    recipe: Recipe | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Job:
    """Training a detector on frames.

    Args:
        frames: to train on.
        recipe: by default `detector_recipe()`.
        seed: of shuffling and augmentation.
        device: where to train.
    """
    recipe = recipe or detector_recipe()
    batches = FrameBatches(frames, recipe.batch, device_named(device))
    return Job(batches, detection_loss, recipe=recipe, seed=seed, device=device)


def detection_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the head's losses."""
    terms = cast(Detector, model).losses(batch.points, len(batch.gt_boxes), batch.gt_boxes)
    return torch.stack(list(terms.values())).sum()
