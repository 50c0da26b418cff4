"""A field that says what each sample along a ray weighs, so that a loss may leave the geometry alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from zoo.neural3d.fields import HashField


class Weighed(NamedTuple):
    """Samples along rays: points [n, s, 3], distances, weights [n, s] and colours [n, s, 3]."""

    points: Tensor
    distances: Tensor
    weights: Tensor
    colours: Tensor

    def colour(self, background: Tensor, detached: bool = False) -> Float[Tensor, "n 3"]:
        """Colours of the rays; detached weights let them move colours only."""
        weights = self.weights.detach() if detached else self.weights
        return (weights[..., None] * self.colours).sum(1) + (1 - weights.sum(1))[:, None] * background

    def depth(self) -> Float[Tensor, " n"]:
        """Expected distances along the rays."""
        return (self.weights * self.distances).sum(1) / self.weights.sum(1).clamp_min(1e-6)


class WeighedField(HashField):
    """A radiance field whose samples' weights are at hand."""

    def weigh(self, origins: Float[Tensor, "n 3"], rays: Float[Tensor, "n 3"]) -> Weighed:
        """Samples of rays with unit directions; jittered in training mode."""
        points, widths, distances = self._samples(origins, rays)
        count = widths.shape[1]
        density, colours = self.at(points.flatten(0, 1), rays.repeat_interleave(count, 0))
        thickness = density.unflatten(0, widths.shape) * widths / (2 * self.half_side)
        before = functional.pad(thickness.cumsum(1)[:, :-1], (1, 0))
        weights = (-before).exp() * -torch.expm1(-thickness)
        return Weighed(points, distances, weights, colours.unflatten(0, widths.shape))
