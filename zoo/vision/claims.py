"""`zoo reproduce pruning-claims`: one small study per paper, each with its claims and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from zoo.errors import ConfigError
from zoo.harness.experiments import CellCache, Experiment, ExperimentResult, share
from zoo.harness.judging import judge, mean_cell
from zoo.harness.stats import seed_difference
from zoo.harness.tables import Table, Verdict
from zoo.names import suggestion
from zoo.vision.studies import STUDIES, Figures, Study


@dataclass(frozen=True)
class ClaimsConfig:
    """Options.

    Args:
        studies: which; by default all.
        seeds: how many, from 0.
    """

    studies: tuple[str, ...] = tuple(STUDIES)
    seeds: int = 3

    def __post_init__(self) -> None:
        for study in self.studies:
            if study not in STUDIES:
                raise ConfigError(f"Unknown study {study!r}. {suggestion(study, STUDIES)}")
        if self.seeds < 1 or not self.studies:
            raise ConfigError("give at least one study and one seed")


class PruningClaims(Experiment):
    """The claims of the domain's papers at a size that a laptop re-measures."""

    name: ClassVar[str] = "pruning-claims"
    title: ClassVar[str] = "What the pruning papers claim, each in a small study"
    paper: ClassVar[str] = "those of the methods; see zoo/vision/README.md"
    config_class: ClassVar[type] = ClaimsConfig

    def run(
        self, config: ClaimsConfig, cells: CellCache, progress: Callable[..., None] | None = None
    ) -> ExperimentResult:
        """Run what is missing and sum up."""

        def run(name: str, seed: int) -> Figures:
            study = STUDIES[name]
            key = {"experiment": self.name, "version": study.version, "study": name, "seed": seed}
            return dict(cells.cell(key, partial(study.run, seed)))

        pairs = [(name, seed) for name in config.studies for seed in range(config.seeds)]
        found = share(
            [(f"{name} seed {seed}", partial(run, name, seed)) for name, seed in pairs], cells, progress
        )
        return summarise(
            {
                name: [figures for (own, _), figures in zip(pairs, found, strict=True) if own == name]
                for name in config.studies
            }
        )


def summarise(found: dict[str, list[Figures]]) -> ExperimentResult:
    """Tables and verdicts of the studies.

    Args:
        found: by study the figures of each seed.
    """
    tables = [_table(STUDIES[name], runs) for name, runs in found.items()]
    verdicts = [verdict for name, runs in found.items() for verdict in _verdicts(STUDIES[name], runs)]
    rows: list[dict[str, Any]] = [
        {"study": name, "seed": seed, **run} for name, runs in found.items() for seed, run in enumerate(runs)
    ]
    notes = [
        "Mean ± sample standard deviation over seeds; differences are paired by seed with a 95 % interval "
        "(Student's t). Test images served for no choice, but the recipes were set by hand beforehand.",
    ]
    return ExperimentResult(tables, verdicts, rows=rows, notes=notes)


def _table(study: Study, runs: Sequence[Figures]) -> Table:
    digits = 2 if study.unit in ("dB", "times") else 1
    body = [
        [name, mean_cell([run[name] for run in runs], 2 if name in study.facts else digits)]
        for name in runs[0]
    ]
    return Table(study.title, ["", f"test ({study.unit})"], body)


def _verdicts(study: Study, runs: Sequence[Figures]) -> list[Verdict]:
    out = []
    for claim in study.claims:
        pairs = [[run[side] for run in runs] for side in (claim.first, claim.second)]
        unit = "points" if study.unit == "%" else study.unit
        difference = seed_difference(pairs[0], pairs[1])
        digits = 1 if study.unit == "%" else 2
        out.append(
            judge(claim.text, claim.published, difference, at_least=claim.bar, unit=unit, digits=digits)
        )
    return out
