"""`zoo finetune neural3d`: train a scene on, with every zero kept and dropped Gaussians gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.bundles.catalog import Bundle
from zoo.errors import ConfigError
from zoo.neural3d import fields, refine
from zoo.neural3d.densify import Densification, Densifier
from zoo.neural3d.domain import make_job
from zoo.neural3d.fields import HashField
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.views import middle_of_views
from zoo.shared.train import Fit, Job, Recipe
from zoo.training.finetune import FineTuner, Plan


@dataclass
class Finetune(FineTuner):
    """Fine-tune a scene of Gaussians or a field on posed views.

    The cells that a hollow field left empty stay empty. Of a pruned scene the dropped Gaussians are gone;
    with --densify others are cloned and split from those that are left, as in 3D Gaussian Splatting.
    """

    domain: ClassVar[str] = "neural3d"
    shares: ClassVar[bool] = False
    counts: ClassVar[str] = "steps"

    dataset: str | None = None
    """Views to train on, e.g. shapes or lego-100; by default those of the first figure on the card."""

    steps: int = 300
    """Steps, of a view each, or of 256 rays for a field."""

    rate: float = 0.5
    """Factor on the usual learning rates."""

    densify: bool = False
    """Clone, split and drop Gaussians."""

    densify_every: int = 100
    """Steps between two such changes."""

    gradient: float = 2e-4
    """Mean gradient of a Gaussian's place in the views above which it is doubled."""

    most: int = 100_000
    """Largest number of Gaussians."""

    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def plan(self, source: Bundle, loaded: nn.Module, twin: Bundle | None, device: torch.device) -> Plan:
        """Training on the views."""
        if self.distillation:
            raise ConfigError(
                "a scene is fitted to pictures: distillation from a twin has no output to match"
            )
        if not isinstance(loaded, GaussianScene | HashField):
            raise ConfigError(f"{source.card.name} is neither a scene of Gaussians nor a field.")
        usual = fields.RECIPE if isinstance(loaded, HashField) else refine.RECIPE
        recipe = Recipe(**{**usual, "lr": usual["lr"] * self.rate, "steps": self.steps})
        job: Job = make_job(self.dataset, recipe=recipe, seed=self.seed, device=device, model=loaded)
        dataset = self.dataset or source.card.metrics[0].task.partition("/")[2]
        if isinstance(loaded, HashField):
            if self.densify:
                raise ConfigError(f"{source.card.name} is a field: there are no Gaussians to densify")
            return Plan(loaded, job, dataset)
        _, extent = middle_of_views(refine.views_of(job))
        groups = refine.rate_groups(loaded, extent, recipe.lr)
        if not self.densify:
            return Plan(loaded, job, dataset, parameters=groups)
        options = Densification(every=self.densify_every, gradient=self.gradient, most=self.most)
        densifier = Densifier(loaded, options, extent, self.seed)

        def after_step(fit: Fit) -> Any:
            return lambda: densifier.after_step(fit)

        return Plan(
            loaded,
            job.replace(loss=densifier.loss),
            dataset,
            "with densification",
            # Which rows of the twin these were can no longer be said.
            extras={},
            parts={},
            parameters=groups,
            after_step=after_step,
            finish=densifier.finish,
        )

    def _publish(
        self, source: Bundle, plan: Plan, twin: Bundle | None, fit: Fit, extras: Mapping[str, Tensor]
    ) -> Path:
        if self.densify:
            assert isinstance(plan.model, GaussianScene)
            count = {**source.card.architecture.args, "count": len(plan.model)}
            plan = dataclasses.replace(plan, arguments=count)
        return super()._publish(source, plan, twin, fit, extras)
