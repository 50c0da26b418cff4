"""Few views of sets that have many: what methods for sparse views are trained on and judged by."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zoo.errors import DataError
from zoo.neural3d.views import View, Views, load_views


def few(views: Sequence[View], count: int) -> list[View]:
    """`count` of the views, evenly spaced from the first to the last (LLFF's sparse protocol).

    Raises:
        DataError: more than there are, or none.
    """
    if not 1 <= count <= len(views):
        raise DataError(f"{count} of {len(views)} views cannot be taken")
    return [views[round(at)] for at in torch.linspace(0, len(views) - 1, count).tolist()]


def farthest(views: Sequence[View], count: int) -> list[View]:
    """Views whose cameras are far from each other, from the first on (farthest-point choice)."""
    places = torch.stack([view.camera.centre for view in views])
    chosen = [0]
    while len(chosen) < count:
        gap = torch.cdist(places, places[chosen]).amin(1)
        chosen.append(int(gap.argmax()))
    return [views[number] for number in chosen]


def ring(name: str, source: str) -> Views:
    """Four training views of a set that are far from each other, and eight of its test views."""
    found = load_views(source)
    return Views(name, farthest(found.train, 4), few(found.test, 8), found.background, licence=found.licence)


def frames() -> Views:
    """Three frames of the living room at 64 pixels, and the four between them."""
    found = load_views("livingroom-64")
    seen = sorted([*found.train, *found.test], key=lambda view: view.name)[10:17]
    test = [view for number, view in enumerate(seen) if number % 3]
    return Views("livingroom-frames", seen[::3], test, licence=found.licence)
