"""Densification: Gaussians are cloned and split where pictures pull at them, and dropped where they fade.

The strategy of 3DGS (Kerbl et al. 2023, section 5.2), with the numbers of gsplat's `DefaultStrategy`; rows
and optimiser state are changed by `zoo.shared.structure.resize.RowResizer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.neural3d.refine import picture_loss
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.views import View
from zoo.shared.masks import masks_of
from zoo.shared.ops.rasterize_reference import rotations
from zoo.shared.structure.resize import RowResizer
from zoo.shared.train import Fit

SHRINK = 1.6  # by how much the halves of a split Gaussian are smaller
STATISTICS = ("pull", "seen")


@dataclass(frozen=True)
class Densification:
    """When Gaussians come and go.

    Args:
        every: steps between two changes.
        until: share of the steps after which the number stays.
        gradient: of the loss for the position in a view of width and height 2, on average over the views that
            see a Gaussian, above which it is doubled.
        scale: of a Gaussian over the cameras' distance, above which it is split rather than cloned.
        opacity: below which it is dropped.
        most: Gaussians; those with the largest gradients are doubled first.
    """

    every: int = 100
    until: float = 0.7
    gradient: float = 2e-4
    scale: float = 0.01
    opacity: float = 0.005
    most: int = 100_000

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.until <= 1 or self.most < 1:
            raise ConfigError(
                "densification needs every >= 1, 0 < until <= 1 and most >= 1; received "
                f"{self.every}, {self.until}, {self.most}"
            )
        if min(self.gradient, self.scale) <= 0 or not 0 <= self.opacity < 1:
            raise ConfigError(
                "densification needs gradient > 0, scale > 0 and 0 <= opacity < 1; received "
                f"{self.gradient}, {self.scale}, {self.opacity}"
            )


class Densifier:
    """Changes the Gaussians of a scene while it trains.

    What it has seen since the last change are buffers of the scene (`pull`, `seen`), so that `Fit.state`
    holds them and a killed training resumes bit for bit, with however many Gaussians it had.

    Args:
        scene: in training; without masks, as new rows have none.
        options: when.
        extent: mean distance of the cameras.
        seed: of where the halves of a split Gaussian go.

    Raises:
        ConfigError: the scene carries masks.
    """

    def __init__(self, scene: GaussianScene, options: Densification, extent: float, seed: int = 0) -> None:
        if masks_of(scene):
            raise ConfigError("a scene whose parameters carry masks cannot be densified: new rows have none")
        self.scene, self.options, self.extent, self.seed = scene, options, extent, seed
        self._shift, self._half = torch.zeros(0, 2), torch.ones(2)
        self._reset()
        self._hook = scene.register_load_state_dict_pre_hook(_as_many)

    def loss(self, model: nn.Module, view: View) -> Tensor:
        """`view_loss` of the scene, with the positions in the view watched."""
        assert isinstance(model, GaussianScene)
        self._shift = torch.zeros(len(model), 2, requires_grad=True)
        self._half = torch.tensor([view.camera.width / 2, view.camera.height / 2])
        return picture_loss(model.render(view.camera, shift=self._shift).colour, view)

    @torch.no_grad()
    def after_step(self, fit: Fit) -> None:
        """Take the step's gradients in, and change the Gaussians when it is time."""
        if self._shift.grad is not None:
            norm = (self._shift.grad * self._half).norm(dim=1)
            self.scene.get_buffer("pull").add_(norm)
            self.scene.get_buffer("seen").add_(norm > 0)
        last = min(self.options.until * fit.steps, fit.steps - 1)
        if fit.step % self.options.every == 0 and fit.step <= last:
            self.change(RowResizer(self.scene, _names(self.scene), [fit.optimizer]), fit.step)

    @torch.no_grad()
    def change(self, rows: RowResizer, step: int) -> None:
        """Clone, split and drop.

        Raises:
            ConfigError: no Gaussian would be left.
        """
        scene, options = self.scene, self.options
        pulled = scene.get_buffer("pull") / scene.get_buffer("seen").clamp_min(1)
        grown = _largest(pulled, pulled > options.gradient, max(0, options.most - len(scene)))
        wide = scene.scales.exp().amax(1) > options.scale * self.extent
        cloned, split = (grown & ~wide).nonzero()[:, 0], (grown & wide).nonzero()[:, 0]
        if len(cloned):
            rows.clone(cloned)
        if len(split):
            rows.split(split, self._halves(split, step))
        kept = scene.opacities.sigmoid() >= options.opacity
        if not bool(kept.any()):
            raise ConfigError(f"all {len(scene)} Gaussians are fainter than {options.opacity}: lower opacity")
        rows.keep(kept)
        self._reset()

    def finish(self) -> None:
        """Leave the scene as it is without densification."""
        self._hook.remove()
        for name in STATISTICS:
            delattr(self.scene, name)

    def _halves(self, rows: Tensor, step: int) -> dict[str, Tensor]:
        """Two Gaussians for each of some, drawn from it and smaller by `SHRINK`."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        values = {
            name: self.scene.get_parameter(name)[rows].repeat_interleave(2, 0) for name in _names(self.scene)
        }
        offset = torch.randn(values["means"].shape, generator=generator) * values["scales"].exp()
        turned = rotations(values["quats"]) @ offset[..., None]
        values["means"] = values["means"] + turned[..., 0]
        values["scales"] = values["scales"] - torch.tensor(SHRINK).log()
        return values

    def _reset(self) -> None:
        for name in STATISTICS:
            self.scene.register_buffer(name, torch.zeros(len(self.scene)))


def _names(scene: GaussianScene) -> list[str]:
    return [name for name, _ in scene.named_parameters()]


def _largest(values: Tensor, among: Tensor, most: int) -> Tensor:
    """The `most` largest values among some, as a mask; of equals the earlier ones."""
    order = torch.where(among, values, -1.0).argsort(descending=True, stable=True)[:most]
    found = torch.zeros_like(among)
    found[order] = True
    return found & among


def _as_many(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Give the scene as many rows as a state has, its parameters staying the ones that an optimiser steps."""
    count = len(state[f"{prefix}means"])
    for value in (*module.parameters(), *(module.get_buffer(name) for name in STATISTICS)):
        if len(value) != count:
            value.data = value.new_zeros(count, *value.shape[1:])
