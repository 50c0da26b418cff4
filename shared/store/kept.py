"""Whether finished work was stored or found here, from which the same command goes on after a stop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

_seen = threading.Event()  # not a plain value, which would count as changed code in digests


def keep_in_mind() -> None:
    """Say that a piece of finished work was stored or found."""
    _seen.set()


@contextlib.contextmanager
def going_on_from(place: Path) -> Iterator[None]:
    """Keep in mind what lies in a place when the work inside is stopped: a checkpoint, say."""
    try:
        yield
    except BaseException:
        if place.exists():
            keep_in_mind()
        raise


def goes_on() -> bool:
    """Whether one was, since the process began or `forget` was called."""
    return _seen.is_set()


def forget() -> None:
    """Begin a command of which nothing is stored yet."""
    _seen.clear()
