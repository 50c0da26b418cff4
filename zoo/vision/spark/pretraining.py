"""SparK through the domain's one training loop: images without labels, other cells hidden each epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.shared.measure.modes import eval_mode
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Checkpoint, Fit, Recipe, resume
from zoo.vision.data import ImageBatches, Images, Split
from zoo.vision.models import ResNet
from zoo.vision.spark.encoder import Execution, SparKEncoder
from zoo.vision.spark.masking import Choice, draw_cells
from zoo.vision.spark.objective import SparK, hidden_loss


@dataclass(frozen=True)
class MaskedBatches:
    """Shuffled batches of training images, each with its visible cells; labels stay unused.

    Attributes:
        data: the images.
        batch: images per step.
        grid: cells of an image, down and across.
        ratio: share of the cells that are hidden.
    """

    data: Images
    batch: int
    grid: tuple[int, int]
    ratio: float

    def __len__(self) -> int:
        return len(ImageBatches(self.data, self.batch))

    def draw(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        shuffled = ImageBatches(self.data, self.batch).draw(generator)
        for images, _ in shuffled:
            cells = draw_cells(len(images), self.grid, self.ratio, generator)
            yield images, cells.to(images.device)

    def example(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        images = self.data.normalised(self.data.train.images[:1])
        return images, draw_cells(1, self.grid, self.ratio, generator).to(images.device)


def mixed_precision(images: Tensor) -> torch.autocast:
    """bfloat16 products where the images are on a GPU; on a processor all stays as it is."""
    return torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda)


def reconstruction_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
    """The loss of a SparK model on a batch of images and visible cells."""
    images, cells = batch
    with mixed_precision(images):
        predicted = model(images, cells)
    return hidden_loss(predicted, images, cells)


def fresh_spark(
    net: ResNet,
    size: tuple[int, int],
    cell: int,
    decoder: int,
    seed: int,
    scales: int = 0,
    execution: Execution = "auto",
) -> SparK:
    """Encoder and decoder with the fresh weights of a seed, whatever was drawn before.

    Args:
        net: the network to be pre-trained; not changed.
        size: height and width of the images.
        cell: side of a cell.
        decoder: channels of the decoder at the coarsest map.
        seed: of the weights.
        scales, execution: see `SparK`.
    """
    own: Any = reinitialised(net, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SparKEncoder(own, size, cell, own.conv1.in_channels)
        return SparK(encoder, decoder, scales, execution)


def pretraining(spark: SparK, data: Images, recipe: Recipe, ratio: float, seed: int) -> Fit:
    """A pre-training that is ready to run; an execution `auto` is settled first, once for the whole run.

    Args:
        spark: on the device of the images.
        data: the images.
        recipe: of the training.
        ratio: share of hidden cells.
        seed: of order, augmentation and masks.

    Raises:
        ConfigError: a mask ratio that hides nothing or everything.
    """
    batches = MaskedBatches(data, recipe.batch, spark.encoder.grid, ratio)
    if spark.execution == "auto":
        images, cells = next(batches.draw(torch.Generator().manual_seed(seed)))
        with mixed_precision(images):
            spark.execution = spark.encoder.train().fastest(images, cells)
    return Fit(spark, batches, recipe, loss=reconstruction_loss, seed=seed, macs=lambda: 0.0)


def held_out_loss(spark: SparK, data: Images, split: Split, ratio: float, batch: int = 500) -> float:
    """The loss on images that no training saw, with one fixed drawing of cells, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    with torch.no_grad(), eval_mode(spark):
        for start in range(0, len(split), batch):
            images = data.normalised(split.images[start : start + batch])
            cells = draw_cells(len(images), spark.encoder.grid, ratio, generator).to(images.device)
            total += float(reconstruction_loss(spark, (images, cells))) * len(images)
    return total / len(split)


def resumed(
    fit: Fit, checkpoint: Checkpoint, every_epochs: int = 1, note: Callable[[Fit], object] | None = None
) -> Fit:
    """Run a pre-training to its end from where an interrupted one stopped, with the execution chosen then."""
    spark: Any = fit.model
    if (stored := checkpoint.read()) is not None:
        spark.execution = Choice.parse(stored[1]["execution"])
    facts = {"execution": str(spark.execution)}
    return resume(fit, checkpoint, every_epochs=every_epochs, note=note, facts=facts)
