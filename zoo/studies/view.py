"""A look at the rows of a study: the values of an arm by level and seed, and differences between arms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zoo.studies.stats import Difference, seed_difference
from zoo.studies.tables import Outcome, Verdict
from zoo.studies.verdict import mean_cell

if TYPE_CHECKING:
    from zoo.studies.study import Study

Row = dict[str, Any]
Rows = Sequence[Row]


class NotRunError(LookupError):
    """What a table, picture or fact is made of is not there, an arm or data: it is then left out."""


@dataclass(frozen=True)
class Value:
    """A figure of the rows, and how it is shown and compared.

    Attributes:
        name: of the figure in a row; a list there counts by its mean.
        scale: factor for showing, 100 for a share in percent.
        digits: decimals in tables.
        unit, decimals: of differences, in verdicts.
        lower: whether less is better.
        log: compare logarithms, for figures that differ by orders of magnitude (perplexity).
    """

    name: str = "accuracy"
    scale: float = 100.0
    digits: int = 1
    unit: str = "points"
    decimals: int = 1
    lower: bool = False
    log: bool = False

    def of(self, row: Row) -> float:
        """The figure of a row, scaled."""
        found = row[self.name]
        return self.scale * (statistics.fmean(found) if isinstance(found, list) else float(found))

    def compared(self, shown: float) -> float:
        """What differences are taken of, larger where better."""
        return (-1.0 if self.lower else 1.0) * (math.log(shown) if self.log else shown)


@dataclass(frozen=True)
class View:
    """Rows of one group of a study (one data set, say), or of all.

    Attributes:
        study: whose rows these are.
        rows: one per run: arm, level, seed, what else the study says, and figures.
        options: what was run.
        where: what the rows of the group have in common; empty for all rows.
    """

    study: Study
    rows: Rows
    options: Any
    where: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The group in words."""
        return ", ".join(str(self.study.titles.get(one, one)) for one in self.where.values())

    def part(self, **conditions: Any) -> View:
        """The rows that have these values."""
        kept = [row for row in self.rows if all(row.get(k) == v for k, v in conditions.items())]
        return replace(self, rows=kept)

    def arms(self, named: Sequence[str] = ()) -> list[str]:
        """The arms that were run, in the study's order; or those of the named that were."""
        present = dict.fromkeys(row["arm"] for row in self.rows)
        known = [arm for arm in self.study.arms if arm in present]
        return [arm for arm in (named or [*known, *(a for a in present if a not in known)]) if arm in present]

    def levels(self, arm: str | None = None) -> list[Any]:
        """The levels of an arm, or of all, in their order in the rows."""
        return list(dict.fromkeys(row["level"] for row in self.rows if arm in (None, row["arm"])))

    def chosen(self, arm: str, level: Any = None) -> list[Row]:
        """The runs of an arm at a level, by seed; of a flat arm (`Arm.flat`) those at its own level."""
        own = [row for row in self.rows if row["arm"] == arm]
        if level is not None and not self.study.arm({"arm": arm}).flat:
            own = [row for row in own if row["level"] == level]
        return sorted(own, key=lambda row: row["seed"])

    def values(self, arm: str, level: Any = None, value: Value | None = None) -> list[float]:
        """Scaled figures of an arm at a level, by seed; of runs that have the figure."""
        value = value or self.study.value
        return [value.of(row) for row in self.chosen(arm, level) if value.name in row]

    def required(self, arm: str, level: Any = None) -> list[Row]:
        """`chosen`, of which there must be one; raises NotRunError."""
        found = self.chosen(arm, level)
        if not found:
            raise NotRunError(arm if level is None else f"{arm} at {level}")
        return found

    def mean(self, arm: str, level: Any = None, value: Value | None = None) -> float:
        """Mean of `values`; raises NotRunError where there are none."""
        found = self.values(arm, level, value)
        if not found:
            raise NotRunError(f"{arm}, {(value or self.study.value).name}")
        return statistics.fmean(found)

    def cell(self, arm: str, level: Any = None, value: Value | None = None) -> str:
        """Mean ± sample standard deviation."""
        return mean_cell(self.values(arm, level, value), (value or self.study.value).digits)

    def by_seed(self, arm: str, level: Any = None, value: Value | None = None) -> dict[int, float]:
        """Comparable figures of an arm, by seed."""
        value = value or self.study.value
        found = [row for row in self.chosen(arm, level) if value.name in row]
        return {row["seed"]: value.compared(value.of(row)) for row in found}

    def difference(
        self, first: str, second: str, levels: Sequence[Any] = (None,), value: Value | None = None
    ) -> Difference | None:
        """How much better one arm is than another, paired by seed; None if one of them was not run.

        An arm that was run once and draws nothing (`Arm.once`) stands for every seed of the other.

        Args:
            first, second: the arms; without a second the first's figure itself.
            levels: over which the mean is taken, those that both have.
            value: the figure.
        """
        gaps: dict[int, list[float]] = {}
        for level in levels:
            pair = [self.by_seed(arm, level, value) for arm in (first, second) if arm]
            if not all(pair):
                continue
            seeds = sorted(set().union(*pair))
            if not second:
                pair.append(dict.fromkeys(seeds, 0.0))
            for place, arm in enumerate((first, second)):
                if arm and len(pair[place]) == 1 and self.study.arm({"arm": arm}).once:
                    pair[place] = dict.fromkeys(seeds, next(iter(pair[place].values())))
            for seed in seeds:
                if seed in pair[0] and seed in pair[1]:
                    gaps.setdefault(seed, []).append(pair[0][seed] - pair[1][seed])
        most = max((len(found) for found in gaps.values()), default=0)
        means = [statistics.fmean(found) for found in gaps.values() if len(found) == most]
        return seed_difference(means, [0.0] * len(means)) if means else None

    def contrast(self, plus: Sequence[tuple[str, Any]], minus: Sequence[tuple[str, Any]]) -> dict[int, float]:
        """Sum of comparable figures of some (arm, level) minus that of others, by the seeds that all have."""
        parts = [(sign, self.by_seed(*one)) for sign, some in ((1, plus), (-1, minus)) for one in some]
        seeds = set.intersection(*(set(own) for _, own in parts))
        return {seed: sum(sign * own[seed] for sign, own in parts) for seed in sorted(seeds)}

    def fact(self, claim: str, published: str, measured: str, holds: bool | None, **fields: Any) -> Verdict:
        """The verdict on what is no difference over seeds: a count, a ratio; None where it was not measured.

        The claim may have `{where}` for the group.
        """
        outcome: Outcome = "not measured" if holds is None else "holds" if holds else "does not hold"
        given = {"paper": self.study.papers, **fields}
        return Verdict(claim.format(where=self.title), published, measured, outcome, **given)
