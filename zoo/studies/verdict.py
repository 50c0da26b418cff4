"""The rule of verdicts: from paired differences over seeds to holds, does not hold, or cannot be told.

A claim has a bar (zero where it only says "above"). It holds if the difference is above the bar and the test
against the bar says so after Holm's correction over the claims of its family; it does not hold if the
difference is below the bar with the same certainty; else it cannot be told, whatever the mean is. Beside each
stands the smallest difference that the study could have seen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zoo.studies.stats import Difference, holm
from zoo.studies.tables import Outcome, Verdict

LEVEL = 0.05
Cap = Literal["", "cannot be told", "invalid"]


@dataclass(frozen=True)
class Finding:
    """What a study measured of a claim that one arm is above another, before it is judged.

    Attributes:
        claim: what is claimed, with the setting it was tried in.
        published: what the paper says, or that it says nothing.
        difference: the paired difference over seeds, positive where the claim is right; None where it was not
            measured.
        bar: what the difference must exceed.
        unit, digits: of the difference, as it is shown.
        paper: numbers of the papers.
        cap: the most that can be said, whatever the difference: a control that is not shown to beat random
            leaves "cannot be told", one that does not beat it or an arm tuned on test data "invalid".
        note: why there is a cap; what was tuned.
    """

    claim: str
    published: str
    difference: Difference | None
    bar: float = 0.0
    unit: str = "points"
    digits: int = 1
    paper: tuple[int, ...] = ()
    cap: Cap = ""
    note: str = ""


def judge(findings: Sequence[Finding]) -> list[Verdict]:
    """The verdicts on one family of claims, in their order, with p-values corrected for their number."""
    measured = [one for one in findings if one.difference is not None]
    corrected = iter(holm([one.difference.p_against(one.bar) for one in measured if one.difference]))
    return [
        _verdict(one, one.difference, next(corrected), len(measured))
        if one.difference is not None
        else Verdict(one.claim, one.published, "", "not measured", paper=one.paper)
        for one in findings
    ]


def _verdict(one: Finding, difference: Difference, p: float, family: int) -> Verdict:
    outcome, notes = _outcome(one, difference, p), [one.note, difference.warning]
    if outcome == "cannot be told" and not one.cap and difference.p_against(one.bar) < LEVEL:
        notes.append(f"only without the correction for {family} claims")
    half = (difference.high - difference.low) / 2
    unit, digits = one.unit, one.digits
    text = f"{difference.value:+.{digits}f} ± {half:.{digits}f} {unit} ({difference.n} seeds)"
    if one.bar:
        text += f", bar {one.bar:+.{digits}f}"
    visible = "" if math.isinf(difference.detectable) else f"{difference.detectable:.{digits}f} {unit}"
    note = "; ".join(note for note in notes if note)
    return Verdict(one.claim, one.published, text, outcome, visible, note, one.paper, p)


def _outcome(one: Finding, difference: Difference, p: float) -> Outcome:
    if one.cap == "invalid":
        return "invalid"
    if p >= LEVEL:
        return "cannot be told"
    if difference.value < one.bar:
        return "does not hold"
    return "cannot be told" if one.cap else "holds"


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation over seeds (n - 1); 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_cell(values: Sequence[float], digits: int = 1) -> str:
    """A table's cell: mean ± sample standard deviation over seeds; empty where there are no values."""
    return f"{statistics.fmean(values):.{digits}f} ± {deviation(values):.{digits}f}" if values else ""
