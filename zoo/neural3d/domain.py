"""Jobs on the views of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.neural3d.fields import HashField, field_job
from zoo.neural3d.refine import scene_job
from zoo.neural3d.views import load_views
from zoo.shared.train import Job, Recipe


def make_job(
    dataset: str | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    model: nn.Module | None = None,
    limit: int = 0,
) -> Job:
    """Fit a scene of Gaussians, or a field where the model is one, to posed views.

    Args:
        dataset: views as `load_views` knows them, "shapes" or "lego-100"; by default those of the first
            figure on the model's card.
        recipe: by default the `RECIPE` of `zoo.neural3d.refine`, or that of `fields`.
        seed: of the order of views or rays.
        device: the rasteriser's kernels run on the CPU.
        model: whose card names the views; what it is decides what is drawn. One that has a `make_job` of its
            own is asked for it.
        limit: use the first so many training views; 0 for all.

    Raises:
        ConfigError: no views are named, and the model has no card.
        DataError: an unknown name, or views that are not at hand.
    """
    if callable(own := getattr(model, "make_job", None)):
        job: Job = own(dataset, recipe=recipe, seed=seed, device=device)
        return job
    if dataset is None:
        known: Any = getattr(model, "zoo_info", None)
        if known is None:
            raise ConfigError("a scene without a card: name its views with --dataset, shapes or lego-100 say")
        dataset = known.card.metrics[0].task.partition("/")[2]
    views = load_views(dataset)
    make: Callable[..., Job] = field_job if isinstance(model, HashField) else scene_job
    return make(views.train[: limit or None], views.test, recipe=recipe, seed=seed).replace(device=device)
