"""Fewer Gaussians: those that the views can do without go, and the rest is trained on.

The scores are those of `zoo.neural3d.importance`; what is dropped is gone, the file is as small as it looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, required, stated_options
from zoo.neural3d.importance import SCORES, pruned
from zoo.neural3d.refine import RECIPE, refine, views_of
from zoo.neural3d.scene import GaussianScene
from zoo.shared.masks import MaskSet
from zoo.shared.train import Job


@dataclass
class SplatPruning:
    """Drop Gaussians of a scene by what its training views lose without them."""

    needs_job: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {**RECIPE, "steps": 300}

    keep: float = 0.3
    """Share of the Gaussians that stay, exactly."""

    score: Literal[
        "removal-error", "max-contribution", "contribution", "opacity-volume", "opacity", "random"
    ] = "removal-error"
    """What tells which Gaussians matter."""

    rounds: int = 4
    """In how many rounds the others go; what is left is scored again in each."""

    tune: bool = True
    """Train what is left by the job's recipe."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """A smaller scene; the one given stays as it is.

        Raises:
            ConfigError: a model that is no scene of Gaussians, a job without views, a share that keeps none.
        """
        if not isinstance(model, GaussianScene):
            raise ConfigError(f"splat-pruning takes a scene of Gaussians; received {type(model).__name__}")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1; received {self.rounds}")
        job = required(job, self)
        cameras = [view.camera for view in views_of(job)]
        mask = pruned(model, SCORES[self.score], self.keep, cameras, rounds=self.rounds, seed=job.seed)
        scene = model.like(model.splats.rows(mask))
        if self.tune:
            refine(scene, job)
        kept, total = len(scene), len(model)
        part = {"kept": kept, "total": total, "sparsity": 1 - kept / total, "pattern": "rows"}
        arguments = {"count": kept, "sh_degree": scene.sh_degree, "background": scene.background.tolist()}
        return Sparsified(
            scene.eval(),
            MaskSet({}),
            extras={"gaussians/keep": mask},  # the evidence that a verified card asks for
            hyperparameters=stated_options(self, job),
            parts={"gaussians": part},
            arguments=arguments | {"antialiased": scene.antialiased},
        )
