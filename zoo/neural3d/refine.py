"""Training a scene of Gaussians on views: learning rates by parameter, loss, job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.neural3d.metrics import psnr, ssim_map_mean
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import from_points
from zoo.neural3d.views import View, ViewBatches, Views, middle_of_views
from zoo.shared.train import Fit, Job, Recipe

# Learning rates of 3DGS (Kerbl et al. 2023); that of the means is for a scene of extent 1.
RATES = {"means": 1.6e-4, "quats": 1e-3, "scales": 5e-3, "opacities": 5e-2, "sh0": 2.5e-3, "shN": 1.25e-4}


# Of a scene's training: the rates above fall to zero as a cosine.
RECIPE: dict[str, Any] = {
    "lr": 1.0,
    "weight_decay": 0.0,
    "optimizer": "adam",
    "warmup": 0.0,
    "decay": "cosine",
    "options": {"eps": 1e-15},
}


def view_loss(model: nn.Module, view: View) -> Tensor:
    """0.8 L1 + 0.2 (1 - SSIM) of a rendering against its picture (3DGS)."""
    return picture_loss(model(view.camera), view)


def picture_loss(found: Tensor, view: View) -> Tensor:
    """0.8 L1 + 0.2 (1 - SSIM) of colours [height, width, 3] against a view's picture (3DGS)."""
    near = (found - view.image).abs().mean()
    return 0.8 * near + 0.2 * (1 - ssim_map_mean(found, view.image))


def mean_psnr(model: nn.Module, views: Sequence[View]) -> float:
    """PSNR in dB, the mean over views."""
    with torch.no_grad():
        return sum(psnr(model(view.camera), view.image) for view in views) / len(views)


def scene_job(
    train: Sequence[View],
    test: Sequence[View] = (),
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    **changes: Any,
) -> Job:
    """The job of fitting a scene to views, one view a step.

    Args:
        test: views that score a scene.
        recipe: by default `RECIPE`, whose `lr` is a factor on the rates of `RATES`.
        changes: fields of the recipe to replace, e.g. `steps=300`.
    """
    recipe = replace(recipe or Recipe(**RECIPE), **changes)
    judged = list(test)
    score = (lambda model: mean_psnr(model, judged)) if judged else None
    return Job(ViewBatches(list(train)), loss=view_loss, score=score, recipe=recipe, seed=seed)


def rate_groups(scene: GaussianScene, extent: float, lr: float = 1.0) -> list[dict[str, Any]]:
    """A group of parameters for each rate, as optimisers take them; `extent` is the cameras' distance."""
    groups = []
    for name, parameter in scene.named_parameters():
        if parameter.numel():
            rate = lr * RATES[name] * (extent if name == "means" else 1.0)
            groups.append({"params": [parameter], "lr": rate, "name": name})
    return groups


def refine(
    scene: GaussianScene,
    job: Job,
    after_step: Callable[[Fit], object] | None = None,
    *,
    mobility: float = 1.0,
) -> GaussianScene:
    """Fit a scene in place, to the end of the job's recipe.

    Args:
        after_step: called with the training after each step.
        mobility: factor on the rate of the means, for a scene that begins far from where it should be and has
            few of the 30,000 steps of 3DGS to get there.

    Raises:
        ConfigError: a job whose batches are not views.
    """
    _, extent = middle_of_views(views_of(job))
    fit = job.fit(scene, parameters=rate_groups(scene, extent * mobility, job.recipe.lr), macs=lambda: 0.0)
    fit.run(None if after_step is None else lambda: after_step(fit))
    return scene


def views_of(job: Job) -> list[View]:
    """The views that a job trains on.

    Raises:
        ConfigError: its batches are not views.
    """
    views = getattr(job.batches, "views", None)
    if not views or not isinstance(views[0], View):
        raise ConfigError(
            f"scenes are fitted to views; the job has {type(job.batches).__name__}: make it by "
            "zoo.neural3d.refine.scene_job"
        )
    found: list[View] = views
    return found


def start_of(views: Views, count: int, sh_degree: int, seed: int) -> GaussianScene:
    """A scene to train: `count` of the points of the surface, or, without any, of a cube round the centre."""
    generator = torch.Generator().manual_seed(seed)
    if views.points is not None and views.colours is not None:
        rows = torch.randperm(len(views.points), generator=generator)[:count]
        points, colours = views.points[rows], views.colours[rows]
    else:
        points = views.centre + (torch.rand(count, 3, generator=generator) - 0.5) * 0.6 * views.extent
        colours = torch.rand(count, 3, generator=generator)
    if len(points) < count:
        raise ConfigError(f"{views.name} has {len(points)} points to start from; received count {count}")
    return GaussianScene.from_splats(from_points(points, colours, sh_degree), views.background)
