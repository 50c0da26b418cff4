"""One figure of a card beside what it was checked against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

# Means and spreads on a card follow from its own values per seed up to rounding in the last digits.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Check:
    """One figure of a card.

    Attributes:
        figure: what it is.
        on_card: what the card says.
        measured: what it was checked against.
        ok: whether they agree; None where it could not be checked.
        note: why not, or by what.
        how: measured again, or compared with another statement (the card's own values, a committed file, the
            twin's card).
    """

    figure: str
    on_card: Any
    measured: Any
    ok: bool | None
    note: str = ""
    how: Literal["measured", "compared"] = "measured"


@dataclass(frozen=True)
class Verification:
    """All checks of one card."""

    model: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every figure was checked and came back."""
        return all(check.ok is True for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        """The figures that did not come back."""
        return [check for check in self.checks if check.ok is False]

    @property
    def unknown(self) -> list[Check]:
        """The figures that could not be checked."""
        return [check for check in self.checks if check.ok is None]


def same_values(
    figure: str, on_card: Mapping[int, float], known: Mapping[int, float], tolerance: float, note: str
) -> Check:
    """Values per seed against another statement of them."""
    same = set(on_card) == set(known) and all(
        math.isclose(value, known[seed], rel_tol=tolerance, abs_tol=1e-12) for seed, value in on_card.items()
    )
    return Check(figure, listed(on_card), listed(known), same, note, "compared")


def stated(figure: str, on_card: float, computed: float) -> Check:
    """A figure that follows from others on the card."""
    check = close(figure, on_card, computed, ROUNDING)
    return replace(check, note="by the card's values per seed", how="compared")


def exact(figure: str, on_card: Any, measured: Any) -> Check:
    """A count, size or hash, which must be the same."""
    return Check(figure, on_card, measured, on_card == measured)


def close(figure: str, on_card: float, measured: float, tolerance: float) -> Check:
    """A measured quantity, within a relative tolerance."""
    return Check(figure, on_card, measured, math.isclose(on_card, measured, rel_tol=tolerance, abs_tol=1e-9))


def listed(values: Mapping[int, float]) -> str:
    """Values per seed as one line of text."""
    return ", ".join(f"{seed}: {value:.6g}" for seed, value in values.items()) or "none"
