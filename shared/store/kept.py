"""Whether this process has stored or found finished work, from which the same command goes on after a stop."""

from __future__ import annotations

_seen = False


def keep_in_mind() -> None:
    """Say that a piece of finished work was stored or found."""
    global _seen
    _seen = True


def goes_on() -> bool:
    """Whether one was, since the process began or `forget` was called."""
    return _seen


def forget() -> None:
    """Begin a command of which nothing is stored yet."""
    global _seen
    _seen = False
