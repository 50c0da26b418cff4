"""Networks that forgot a digit: their maker, and the four figures of unlearning as a task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.harness.tasks import Measure, Progress, TaskResult
from zoo.methods.contract import Sparsified
from zoo.methods.unlearning import Part, Unlearning, figures
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Job, Recipe
from zoo.vision.data import load_images
from zoo.vision.studies.small import whole
from zoo.vision.studies.unlearning import learned
from zoo.vision.tasks import Classification

DIGIT = 0  # that is forgotten


def parts_of() -> tuple[Part, Part, Part]:
    """Training images of the digit that goes and of the others, and test images of the others."""
    images = load_images("digits")
    (x, y), (x2, y2) = whole(images), whole(images, "test")
    gone, held = y == DIGIT, y2 != DIGIT
    return Part(x[gone], y[gone]), Part(x[~gone], y[~gone]), Part(x2[held], y2[held])


def unlearned(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """Maker: a classifier of all digits, pruned by one-shot magnitude if the row says a sparsity, that then
    forgets one digit.

    Options: `way` and `strength`, see `Unlearning`; `few`, its epochs; `rewind`, the epoch whose weights come
    back after pruning; `sparsity`.
    """
    gone, kept, _ = parts_of()
    x, y = (torch.cat(pair) for pair in zip(gone, kept, strict=True))
    recipe, options = Recipe(**row.recipe), row.options
    fresh: Any = reinitialised(ARCHITECTURES.get(str(row.architecture))(**row.arguments), seed)
    model, _ = learned(
        fresh, Part(x, y), recipe, seed, options.get("sparsity", 0.0), options.get("rewind", 1)
    )
    job = Job([(x[:1], y[:1])], recipe=replace(recipe, epochs=options["few"]), seed=seed)
    made: Any = Unlearning(options["way"], options["strength"]).forget(model, gone, kept, job)
    return Sparsified(made.cpu().eval(), masks_of(made) or MaskSet({}), arguments=made.current_arguments())


class Forgotten(Classification):
    """A digit that was to be forgotten: UA, the error on its training images; MIA, the share of them that
    an attack takes for never seen; RA and TA, accuracy on the training and test images of the others."""

    name, primary, images = "vision/digits-forgotten", "ta", "digits"

    def measured_on(self) -> Any:
        return [value for part in parts_of() for value in part]

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure a network."""
        self._fitting(model)
        gone, kept, test = parts_of()
        found = figures(model, gone, kept, test)
        return TaskResult({name: Measure(value) for name, value in found.items()}, n=len(test.y))
