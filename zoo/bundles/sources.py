"""Where data come from, for cards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """What a card says of a data set: its title, where it is published, and under which licence."""

    title: str
    origin: str
    licence: str
