"""Pictures of two or three coloured sprites on a noisy ground, with the object of each pixel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST = 3  # objects in a picture


class Sprites(NamedTuple):
    """Pictures [n, 3, size, size] in [0, 1]; the object of each pixel [n, size, size], 0 for the ground; the
    centres [n, MOST, 2] (row, column) in [-0.5, 0.5], NaN where there is none."""

    images: Float[Tensor, "n 3 size size"]
    owners: Int[Tensor, "n size size"]
    centres: Float[Tensor, "n most 2"]


def sprites(count: int, size: int, generator: torch.Generator) -> Sprites:
    """Discs, squares and diamonds, the later ones in front; a picture whose objects hide each other's centre
    is drawn with them all the same."""
    axis = torch.arange(size) + 0.5
    radius = 0.16 * size + 0.05 * size * torch.rand(count, MOST, generator=generator)
    places = (0.18 + 0.64 * torch.rand(count, MOST, 2, generator=generator)) * size
    kind = torch.randint(3, (count, MOST), generator=generator)
    there = torch.arange(MOST) < torch.randint(2, MOST + 1, (count, 1), generator=generator)
    dy = (axis[:, None] - places[..., 0, None, None]).abs()
    dx = (axis[None, :] - places[..., 1, None, None]).abs()
    square = torch.maximum(dy, dx) * 1.15
    far = torch.stack(
        [(dy.square() + dx.square()).sqrt(), square.expand(count, MOST, size, size), (dy + dx) * 0.8], 2
    )
    shape = far.gather(2, kind[..., None, None, None].expand(-1, -1, 1, size, size))[:, :, 0]
    inside = (shape < radius[..., None, None]) & there[..., None, None]
    numbers = inside * torch.arange(1, MOST + 1)[:, None, None]
    owners = numbers.amax(1)
    colours = torch.rand(count, MOST + 1, 3, generator=generator)
    colours = 0.25 + 0.75 * colours / colours.amax(2, keepdim=True)
    colours[:, 0] *= 0.35
    images = colours.gather(1, owners.reshape(count, -1, 1).expand(-1, -1, 3))
    images = images.reshape(count, size, size, 3).permute(0, 3, 1, 2)
    noise = 0.05 * torch.randn(images.shape, generator=generator)
    centres = torch.where(there[..., None], places / size - 0.5, torch.nan)
    return Sprites((images + noise).clamp(0, 1), owners, centres)
