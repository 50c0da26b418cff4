"""Options as cards and YAML files hold them, with lists, and as frozen configurations do, with tuples."""

from __future__ import annotations

import dataclasses
from typing import Any


def as_tuples(value: Any) -> Any:
    """Lists, also within dictionaries, as tuples."""
    if isinstance(value, dict):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def as_lists(value: Any) -> Any:
    """A frozen configuration, or tuples within dictionaries, as plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
