"""Toy solids that three words describe, as volumes of Gaussians: what GVGEN's text-to-volume nets learn from.

A prompt has a size, a colour and a shape, "small red ball" say. The volumes are constructed, not fitted to
views: a node within three quarters of a spacing of the surface has a round, opaque Gaussian at the nearest
point of it, all others have one that is not seen, of the colour there and moved towards it as far as the
range allows. Place, size and shade of colour vary from volume to volume.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.neural3d.methods.gvgen import LIMITS, GaussianVolume
from zoo.neural3d.splats import SH_C0

SIZES = {"small": 0.25, "large": 0.4}  # half the extent, of a volume of side 1
COLOURS = {
    "red": (0.85, 0.2, 0.2),
    "green": (0.2, 0.7, 0.25),
    "blue": (0.2, 0.35, 0.85),
    "yellow": (0.9, 0.8, 0.2),
}
SHAPES = ("ball", "box", "cone")
KINDS = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES}
WORDS = (*SIZES, *COLOURS, *SHAPES)
PROMPTS = tuple(" ".join(words) for words in product(*KINDS.values()))
# Pairs of a colour and a shape that no training sees: each shape once, four colours of which red stays whole.
HELD = tuple(one for one in PROMPTS if one.split(" ", 1)[1] in ("blue ball", "green box", "yellow cone"))
KNOWN = tuple(one for one in PROMPTS if one not in HELD)
CHANNELS = {"offsets": 3, "sh0": 3, "scales": 3, "quats": 4, "opacities": 1}
TOTAL = sum(CHANNELS.values())
BOX = torch.tensor([0.95, 0.55, 0.95])  # half its edges
TOP, BASE = -1.0, 0.8  # the cone's apex (y points down) and base
RADIUS = 0.9  # of the cone's base
PLACE, SIZE, SHADE = 0.05, 0.07, 0.06  # how much volumes of one prompt vary


def told(prompts: Sequence[str]) -> Float[Tensor, "b 9"]:
    """Which words each prompt has, in any order.

    Raises:
        ConfigError: an unknown word, or not exactly one size, one colour and one shape.
    """
    found = torch.zeros(len(prompts), len(WORDS))
    for row, prompt in enumerate(prompts):
        words = prompt.split()
        for word in words:
            if word not in WORDS:
                raise ConfigError(f"the prompt {prompt!r} has the word {word!r}; known: {', '.join(WORDS)}")
            found[row, WORDS.index(word)] = 1
        for kind, names in KINDS.items():
            if sum(word in names for word in words) != 1:
                raise ConfigError(f"the prompt {prompt!r} needs one {kind}: {' or '.join(names)}")
    return found


def inside(shape: str, points: Float[Tensor, "*n 3"]) -> Bool[Tensor, "*n"]:
    """Which points are in the solid of size one."""
    if shape == "ball":
        return points.norm(dim=-1) <= 1
    if shape == "box":
        return (points.abs() <= BOX).all(-1)
    x, y, z = points.unbind(-1)
    return (y <= BASE) & ((x.square() + z.square()).sqrt() <= RADIUS * (y - TOP) / (BASE - TOP))


def surface(shape: str, count: int, generator: torch.Generator) -> Float[Tensor, "count 3"]:
    """Points of the surface of the solid of size one, evenly spread."""
    draws = torch.rand(count, 3, generator=generator)
    if shape == "ball":
        return functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    if shape == "box":
        areas = BOX.prod() / BOX  # of the faces across each axis
        across = areas.multinomial(count, replacement=True, generator=generator)[:, None]
        points = 2 * draws - 1
        return BOX * points.scatter(1, across, points.gather(1, across).sign())
    slant = (RADIUS**2 + (BASE - TOP) ** 2) ** 0.5
    on_base = draws[:, 0] < RADIUS / (RADIUS + slant)
    out, angle = draws[:, 1].sqrt(), 2 * torch.pi * draws[:, 2]
    height = torch.where(on_base, BASE, TOP + (BASE - TOP) * out)
    return torch.stack([RADIUS * out * angle.cos(), height, RADIUS * out * angle.sin()], 1)


def built(prompt: str, side: int, generator: torch.Generator) -> Float[Tensor, "14 n"]:
    """A random volume of a prompt: attributes of the side^3 nodes, from -1 to 1 over their ranges.

    Raises:
        ConfigError: as for `told`, and fewer than two nodes a side.
    """
    told([prompt])
    size, colour, shape = (next(word for word in prompt.split() if word in names) for names in KINDS.values())
    grid = GaussianVolume(side, (1.0, 1.0, 1.0)).grid
    place, larger, shade = (
        amount * (2 * torch.rand(count, generator=generator) - 1)
        for amount, count in ((PLACE, 3), (SIZE, 1), (SHADE, 3))
    )
    radius = SIZES[size] * (1 + larger)
    thin = 0.3 / (side - 1)  # deviation of a Gaussian, which is opaque up to 1.3 of it
    points = place + (radius - 1.3 * thin) * surface(shape, 1500, generator)
    distance, nearest = torch.cdist(grid, points).min(1)
    offsets = points[nearest] - grid
    seen = (distance <= 0.75 / (side - 1)) & (offsets.abs().amax(1) <= LIMITS["offsets"][1])
    light = 0.8 - 0.25 * (points[nearest] - place)[:, 1:2] / radius  # from above
    colours = (torch.tensor(COLOURS[colour]) + shade) * light
    values = {
        "offsets": offsets,
        "sh0": (colours - 0.5) / SH_C0,
        "scales": torch.full((len(grid), 3), thin).log(),
        "quats": torch.tensor([1.0, 0, 0, 0]).repeat(len(grid), 1),
        "opacities": torch.where(seen, 4.0, -7.0)[:, None],
    }
    scaled = []
    for name in CHANNELS:
        low, high = LIMITS[name]
        scaled.append(2 * (values[name] - low) / (high - low) - 1)
    return torch.cat(scaled, 1).T.clamp(-1, 1)


@functools.cache
def pool(side: int, each: int, seed: int) -> tuple[Float[Tensor, "v 14 n"], tuple[str, ...]]:
    """`each` volumes of every known prompt, and their prompts."""
    generator = torch.Generator().manual_seed(seed)
    prompts = KNOWN * each
    return torch.stack([built(prompt, side, generator) for prompt in prompts]), prompts
