"""Fewer Gaussians: those that the views can do without go, and the rest is trained on.

The scores are those of `zoo.neural3d.importance`; what is dropped is gone, the file is as small as it looks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn

from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified
from zoo.neural3d.importance import SCORES, pruned
from zoo.neural3d.refine import refine, scene_job
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.views import load_views
from zoo.shared.masks import MaskSet


@dataclass
class SplatPruning:
    """Drop Gaussians of a scene by what its training views lose without them."""

    keep: float = 0.3
    """Share of the Gaussians that stay, exactly."""

    score: Literal[
        "removal-error", "max-contribution", "contribution", "opacity-volume", "opacity", "random"
    ] = "removal-error"
    """What tells which Gaussians matter."""

    rounds: int = 4
    """In how many rounds the others go; what is left is scored again in each."""

    steps: int = 300
    """Training steps afterwards, one view each."""

    dataset: str = "shapes"
    """The views: those that the scene was trained on."""

    longest: int | None = None
    """No side of a view has more pixels than this."""

    seed: int = 0
    """Of random signs and the order of the steps."""

    def sparsify(self, model: nn.Module) -> Sparsified:
        """A smaller scene; the one given stays as it is.

        Raises:
            ConfigError: a model that is no scene of Gaussians, or a share that keeps none.
            DataError: the views are not there.
        """
        if not isinstance(model, GaussianScene):
            raise ConfigError(f"splat-pruning takes a scene of Gaussians; received {type(model).__name__}")
        if self.rounds < 1 or self.steps < 0:
            raise ConfigError(f"rounds from 1 and steps from 0; received {self.rounds} and {self.steps}")
        views = load_views(self.dataset, longest=self.longest)
        cameras = [view.camera for view in views.train]
        mask = pruned(model, SCORES[self.score], self.keep, cameras, rounds=self.rounds, seed=self.seed)
        scene = model.like(model.splats.rows(mask))
        if self.steps:
            refine(scene, scene_job(views.train, steps=self.steps, seed=self.seed), views.extent)
        kept, total = len(scene), len(model)
        part = {"kept": kept, "total": total, "sparsity": 1 - kept / total, "pattern": "rows"}
        arguments = {"count": kept, "sh_degree": scene.sh_degree, "background": scene.background.tolist()}
        return Sparsified(
            scene.eval(),
            MaskSet({}),
            hyperparameters=dataclasses.asdict(self),
            parts={"gaussians": part},
            arguments=arguments | {"antialiased": scene.antialiased},
        )
