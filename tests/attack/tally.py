"""What became of the attempts of one part."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from zoo.shared.errors import SparseError

NOTES = 20  # kept of each part


class Wrong(Exception):
    """Something else came back than what was saved."""


class Lost(Exception):
    """What was there is gone."""


@dataclass
class Tally:
    """Counts of one part, and what was tried where something failed."""

    tried: int = 0
    refused: int = 0
    served: int = 0
    crashed: int = 0
    wrong: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def attempt(self, what: str, act: Callable[..., object], *arguments: object) -> None:
        """Run `act(*arguments)`: it returns if it was served what is right, and raises otherwise."""
        self.tried += 1
        try:
            act(*arguments)
        except SparseError:
            self.refused += 1
        except Wrong as error:
            self.wrong += 1
            self.note(f"wrong: {what}: {error}")
        except Lost as error:
            self.lost += 1
            self.note(f"lost: {what}: {error}")
        except Exception as error:  # whatever else there is, is what this suite looks for
            self.crashed += 1
            self.note(f"crashed: {what}: {type(error).__name__}: {error}")
        else:
            self.served += 1

    def note(self, text: str) -> None:
        if len(self.notes) < NOTES:
            self.notes.append(text[:500])

    @property
    def failed(self) -> int:
        return self.crashed + self.wrong + self.lost

    def write(self, path: Path) -> None:
        """For the parent: also when the process is ended by what it tries."""
        path.with_suffix(".new").write_text(json.dumps(asdict(self)))
        os.replace(path.with_suffix(".new"), path)


def seeds(seconds: float, seed: int, tally: Tally, out: Path) -> Iterator[random.Random]:
    """A generator for each attempt until the time is over."""
    end, index = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        yield random.Random(f"{seed}:{index}")
        index += 1
        if index % 50 == 0:
            tally.write(out)
