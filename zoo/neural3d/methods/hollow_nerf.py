"""HollowNeRF: a radiance field that learns where space matters, and is empty elsewhere.

Xie et al., "HollowNeRF: Pruning Hashgrid-Based NeRFs with Trainable Collision Mitigation", ICCV 2023: the
features of a point are scaled by a trained saliency, whose mean over the cells is held under a bound by an
augmented Lagrangian; a soft gate makes density vanish where features do.

Differs from the paper in: cells below 0.01 are emptied for good after `trained` of the steps, and the table's
entries that no remaining cell reaches with them (the paper leaves small values); the steepness of the gate is
constant; the saliency trains `saliency_rate` times as fast as the rest, as there are 500 times fewer steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, required, stated_options
from zoo.neural3d.fields import RECIPE, TOLD, HashField, RayBatches
from zoo.shared.learned.constraints import AugmentedLagrangian
from zoo.shared.masks import MaskSet, set_masks
from zoo.shared.ops.hash_encode import HashGrid
from zoo.shared.train import Job


@dataclass
class HollowNeRF:
    """Train a field of the same kind afresh with a saliency grid, whose empty cells are then skipped."""

    needs_job: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {**RECIPE, "steps": 600}

    bound: float = 0.04
    """Largest mean saliency of a cell (C), above 0 and at most 1."""

    cells: int = 32
    """Cells of the saliency grid on a side."""

    log2_size: int = 0
    """Logarithm of the entries of a level of the hash table; 0 for the given field's."""

    rho: float = 1.0
    """Weight of the squared excess."""

    dual_step: float = 0.01
    """Step of the dual variable."""

    start: float = 0.3
    """Share of the steps before the bound is imposed."""

    trained: float = 0.8
    """Share of the steps after which the cells that are empty stay so."""

    saliency_rate: float = 25.0
    """Learning rate of the saliency over that of the rest."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """A field with empty cells; the one given stays as it is.

        Raises:
            ConfigError: a model that is no field, a job without rays, an option out of range, a dual variable
                that is no number.
        """
        if not isinstance(model, HashField):
            raise ConfigError(f"hollow-nerf takes a field on a hash grid; received {type(model).__name__}")
        if not 0 < self.bound <= 1 or self.cells < 2 or not 0 <= self.start < self.trained <= 1:
            raise ConfigError(
                "hollow-nerf needs 0 < bound <= 1, 2 cells or more on a side and 0 <= start < trained <= 1; "
                f"received bound {self.bound}, cells {self.cells}, start {self.start}, trained "
                f"{self.trained}"
            )
        job = required(job, self)
        if not isinstance(job.batches, RayBatches):
            raise ConfigError(f"fields are fitted to rays; the job has {type(job.batches).__name__}")
        size = self.log2_size or model.grid.log2_size
        field = model.like(job.seed, saliency=self.cells, log2_size=size, hardened=False)
        masks = self._fit(field, job)
        return Sparsified(
            field.eval(),
            masks,
            hyperparameters=stated_options(self, job),
            arguments=dict(field.arguments),
        )

    def _fit(self, field: HashField, job: Job) -> MaskSet:
        lagrangian = AugmentedLagrangian(self.bound, self.rho, self.dual_step)
        rest = [p for name, p in field.named_parameters() if name != "saliency"]
        rate = job.recipe.lr * self.saliency_rate
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": [field.saliency], "lr": rate}]

        def begun() -> bool:
            return fit.step >= self.start * fit.steps and not field.hardened

        def penalty() -> Tensor:
            return lagrangian.penalty(field.salient.mean()) if begun() else torch.zeros(())

        def dual() -> None:
            if begun():
                lagrangian.dual_step(field.salient.mean())
                if not bool(lagrangian.dual.isfinite()):
                    raise ConfigError(
                        f"the dual variable is {float(lagrangian.dual)} after step {fit.step}: the saliency "
                        "has diverged; lower saliency_rate or the learning rate"
                    )

        fit = job.fit(field, parameters=groups, macs=lambda: 0.0, penalty=penalty)
        fit.run(dual, until_step=round(self.trained * fit.steps))
        masks = hollow(field)
        with masks.attach(field, fit.optimizer):
            fit.run()
        return masks


def hollow(field: HashField, keep: Tensor | None = None) -> MaskSet:
    """Empty the cells of a field in place but those of `keep`, by default those of saliency 0.01 and more.

    Returns:
        Masks of the saliency and of the table, of which the entries that no kept cell reaches are dropped.

    Raises:
        ConfigError: the field has no saliency grid, or no cell is left.
    """
    keep = field.salient.detach() >= TOLD if keep is None else keep
    if not bool(keep.any()):
        raise ConfigError("every cell is empty: raise the bound, or slow the dual with a smaller dual_step")
    field.harden(keep)
    rows = field.reachable()
    masks = MaskSet({"saliency": keep, "table": rows[:, None].expand(-1, 2).contiguous()})
    masks.apply_(field)
    set_masks(field, masks)
    return masks


def parameters_of(log2_size: int, cells: int = 0) -> int:
    """Parameters of the paper's field: 16 levels of 16 to 1,024 cells, two networks of width 64, `cells` a
    side of the saliency grid. 2^19 gives the 11.49 M of Instant-NGP, 2^18 and 2^17 with 64 cells 6.48 M and
    3.60 M."""
    grid = HashGrid(16, 2, log2_size, 16, 1024)
    rounded = sum(-(-(b - a) // 8) * 8 for a, b in zip(grid.offsets, grid.offsets[1:], strict=False))
    networks = 32 * 64 + 64 * 16 + 31 * 64 + 64 * 64 + 64 * 3
    return 2 * rounded + networks + cells**3
