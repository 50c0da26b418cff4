"""What the options of all studies have in common: seeds, and lists and counts that must not be empty."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from zoo.errors import ConfigError


@dataclass(frozen=True)
class StudyOptions:
    """Options of a study.

    A list takes at least one value and a count is at least 1, unless the default is none or the name stands
    in `may_be_none`.

    Args:
        seeds: how many, from 0.
        from_seed: leave out those below, which another run has; `--from-results ... --add` joins them.

    Raises:
        ConfigError: an empty list, a count below 1, or no seed left.
    """

    may_be_none: ClassVar[tuple[str, ...]] = ()
    seeds: int = 3
    from_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.from_seed < max(self.seeds, 1):
            raise ConfigError(
                f"from seed {self.from_seed} on there is none of {self.seeds} seeds; give more --seeds, or "
                "--from-seed below them"
            )
        for one in dataclasses.fields(self):
            default: Any = one.default
            given, least = getattr(self, one.name), int(one.name not in self.may_be_none)
            usual, count = (len(v) if isinstance(v, tuple) else v for v in (default, given))
            if type(usual) is int and count < min(least, usual):
                raise ConfigError(
                    f"give at least {least} of {one.name.replace('_', ' ')}; received {given!r}"
                )
