"""Pictures of sprites for models of slots: batches, job, and the task that compares slots with objects."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from zoo.bundles.sources import Source
from zoo.errors import TaskError
from zoo.harness.network_task import NetworkTask
from zoo.harness.tasks import Progress, TaskResult
from zoo.shared.train import Job, Recipe
from zoo.vision.methods.slash import SlotModel
from zoo.vision.sprites import Sprites, sprites

SIDE = 12  # of the task's pictures
SOURCE = Source(
    "sprites (3,000 pictures of two or three shapes)", "drawn, zoo/vision/sprites.py", "Apache-2.0"
)
RECIPE: dict[str, Any] = {
    **{"lr": 3e-3, "optimizer": "adam", "weight_decay": 0.0},
    **{"clip": 2.0, "decay": "cosine"},
}


class Batch(NamedTuple):
    """Pictures, what slots start from, and centres, NaN where unknown."""

    images: Tensor
    noise: Tensor
    centres: Tensor


class Shepherded:
    """Batches of which a quarter has known centres; one epoch holds all steps.

    Args:
        steps, batch: how many, and pictures of each.
        pictures: to train on.
        labelled: of them have known centres.
        size: of pictures.
    """

    def __init__(
        self, steps: int, batch: int = 16, pictures: int = 3000, labelled: int = 300, size: int = SIDE
    ) -> None:
        self.steps, self.batch, self.labelled = steps, batch, labelled
        self.drawn = sprites(pictures, size, torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.steps

    def draw(self, generator: torch.Generator) -> Iterator[Batch]:
        count, known = self.batch, self.batch // 4
        for _ in range(len(self)):
            first = torch.randint(self.labelled, (known,), generator=generator)
            rest = len(self.drawn.images) - self.labelled
            more = self.labelled + torch.randint(rest, (count - known,), generator=generator)
            chosen = torch.cat([first, more])
            centres = self.drawn.centres[chosen]
            centres[known:] = torch.nan
            yield Batch(self.drawn.images[chosen], torch.randn(count, 4, 24, generator=generator), centres)

    def example(self) -> tuple[Tensor, ...]:
        return (self.drawn.images[:1], torch.zeros(1, 4, 24))


def slot_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error of the picture, and 0.01 times that of points."""
    drawn, _, error = model(*batch)
    loss: Tensor = (drawn - batch.images).square().mean() + 0.01 * error
    return loss


def slot_job(recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu") -> Job:
    """Training on sprites, the recipe's steps long."""
    recipe = recipe or Recipe(steps=800, batch=16, **RECIPE)
    return Job(Shepherded(recipe.steps or 800, recipe.batch), slot_loss, None, recipe, seed, device)


@cache
def judged(size: int) -> Sprites:
    """Pictures that no training sees."""
    return sprites(200, size, torch.Generator().manual_seed(1))


@torch.no_grad()
def seen(model: SlotModel, found: Sprites) -> tuple[Tensor, Tensor]:
    """Reconstructions, and the slot of each pixel."""
    noise = model.noise(len(found.images), torch.Generator().manual_seed(2))
    drawn, alpha, _ = model(found.images, noise)
    return drawn, alpha.argmax(1)


def indices(model: SlotModel, test: Sprites) -> dict[str, list[float]]:
    """Of each picture the adjusted Rand index of slots and objects over the pixels of objects, and over all;
    its squared error."""
    drawn, slots = seen(model, test)
    pairs = list(zip(test.owners.flatten(1).numpy(), slots.flatten(1).numpy(), strict=True))
    return {
        "foreground": [float(adjusted_rand_score(o[o > 0], s[o > 0])) for o, s in pairs],
        "all": [float(adjusted_rand_score(o, s)) for o, s in pairs],
        "error": (drawn - test.images).square().mean((1, 2, 3)).double().tolist(),
    }


class SpriteSlots(NetworkTask):
    """Slots and objects of 200 pictures of sprites: adjusted Rand indices, and the squared error."""

    name, domain, primary = "vision/sprites", "vision", "foreground"
    network = SlotModel

    def measured_on(self) -> Any:
        return list(judged(SIDE))

    def direction(self, metric: str) -> int:
        """Less error is better."""
        return -1 if metric == "error" else 1

    def example(self, model: SlotModel) -> tuple[Any, ...]:
        """A picture, and noise."""
        return judged(SIDE).images[:1], model.noise(1, torch.Generator().manual_seed(0))

    def fitting(self, model: nn.Module) -> Any:
        """The model itself.

        Raises:
            TaskError: it is of another kind, or takes pictures of another size.
        """
        found = super().fitting(model)
        if found.grid.shape[-1] != SIDE:
            size = found.grid.shape[-1]
            raise TaskError(f"{self.name} has pictures of {SIDE} pixels; this model takes those of {size}")
        return found

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure a model."""
        return TaskResult.from_samples(indices(self.fitting(model), judged(SIDE)))
