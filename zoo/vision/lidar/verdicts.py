"""From the runs of the DSVT experiment to tables, plots and verdicts. Differences are paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.harness.experiments import ExperimentResult
from zoo.harness.judging import judge, mean_cell
from zoo.harness.stats import Difference, seed_difference
from zoo.harness.tables import Plot, Series, Table, Verdict

Rows = Sequence[dict[str, Any]]
METRIC = "bev_ap_loose"
METRICS = {
    "bev_ap_loose": "BEV, IoU 0.5 / 0.25 / 0.25",
    "ap_3d_loose": "3D, IoU 0.5 / 0.25 / 0.25",
    "bev_ap": "BEV, IoU 0.7 / 0.5 / 0.5",
    "ap_3d": "3D, IoU 0.7 / 0.5 / 0.5",
}
PUBLISHED = {
    "dense pillars": "ahead; Waymo L2 73.2 mAP for DSVT on pillars, the baselines' figures were not at hand",
    "sparse convolution": "ahead, at a latency fit for real time; the baselines' figures were not at hand",
    "no rotation, no shift": "rotated, shifted sets are ahead of fixed ones; figures were not at hand",
}


def summarise(rows: Rows, config: Any, times: Mapping[str, float]) -> ExperimentResult:
    """Everything that is reported of the runs.

    Args:
        rows: one per run and comparison: arm, seed, equal ("epochs" or "time"), epochs, seconds, metrics,
            stderr.
        config: of the experiment.
        times: seconds of a training step per arm.
    """
    arms = list(config.arms)
    tables = [_ap_table(rows, arms, equal) for equal in ("epochs", "time")]
    tables += [_class_table(rows, arms), _cost_table(rows, arms, times)]
    found = [_verdict(rows, arms[0], other, equal) for equal in ("epochs", "time") for other in arms[1:]]
    notes = [
        f"{config.scenes} training and {config.test_scenes} test scenes of 25.6 x 25.6 m, 24 beams, "
        f"{config.epochs} epochs, batch {config.batch}, {config.seeds} seeds (of the weights, the order and "
        f"the augmentation; the scenes are the same). Pillars of 0.8 m; for the sparse convolutions cut in "
        f"eight along z.",
        "AP is the mean over cars, pedestrians and cyclists in percent, 40 points of recall; objects with "
        "fewer than five echoes are ignored. ± is the sample standard deviation over seeds; the standard "
        "error of one model over scenes (jackknife) stands in its own column.",
        "Equal time gives each arm as many epochs as take as long as those of the first, by the step times "
        "in the table, measured in turn in one process.",
        "The published numbers are of far larger models on real data, trained to convergence; here only the "
        "order of the arms after a short training is asked for.",
    ]
    return ExperimentResult(tables, found, _plots(rows, arms), rows=[_flat(row) for row in rows], notes=notes)


def chosen(rows: Rows, arm: str, equal: str) -> list[dict[str, Any]]:
    """The runs of an arm in one of the comparisons, by seed."""
    return sorted((r for r in rows if r["arm"] == arm and r["equal"] == equal), key=lambda row: row["seed"])


def difference(rows: Rows, first: str, second: str, equal: str, metric: str = METRIC) -> Difference | None:
    """AP of one arm minus another's, paired by seed; None if one of them was not run."""
    a, b = chosen(rows, first, equal), chosen(rows, second, equal)
    if not a or len(a) != len(b):
        return None
    return seed_difference([r["metrics"][metric] for r in a], [r["metrics"][metric] for r in b])


def _verdict(rows: Rows, first: str, other: str, equal: str) -> Verdict:
    return judge(
        f"DSVT is ahead of {other} after the same {'training time' if equal == 'time' else 'epochs'}",
        PUBLISHED.get(other, "not stated"),
        difference(rows, first, other, equal),
        unit="AP",
    )


def _ap_table(rows: Rows, arms: Sequence[str], equal: str) -> Table:
    body = []
    for arm in arms:
        own = chosen(rows, arm, equal)
        cells = [mean_cell([r["metrics"][name] for r in own]) for name in METRICS]
        error = statistics.fmean(r["stderr"][METRIC] for r in own) if own else 0.0
        gap = difference(rows, arms[0], arm, equal) if arm != arms[0] else None
        shown = f"{gap.value:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]" if gap is not None else ""
        body.append([arm, own[0]["epochs"] if own else "", *cells, f"{error:.1f}", shown])
    return Table(
        f"Average precision after the same {'training time' if equal == 'time' else 'epochs'}",
        ["arm", "epochs", *METRICS.values(), "error over scenes", f"{arms[0]} minus arm [95 %]"],
        body,
        note="The error over scenes and the difference are those of the first column of AP.",
    )


def _class_table(rows: Rows, arms: Sequence[str]) -> Table:
    names = [name for name in (rows[0]["metrics"] if rows else {}) if name.startswith(f"{METRIC}/")]
    body = []
    for arm in arms:
        own = chosen(rows, arm, "epochs")
        body.append([arm, *(mean_cell([r["metrics"][name] for r in own]) for name in names)])
    return Table(
        "BEV AP by class at IoU 0.5 / 0.25 / 0.25, same epochs",
        ["arm", *(n.partition("/")[2] for n in names)],
        body,
    )


def _cost_table(rows: Rows, arms: Sequence[str], times: Mapping[str, float]) -> Table:
    body = []
    for arm in arms:
        own = chosen(rows, arm, "epochs")
        seconds = mean_cell([r["seconds"] for r in own], 0)
        parameters = own[0]["parameters"] if own else ""
        body.append(
            [arm, parameters, f"{1e3 * times[arm]:.0f}", f"{times[arm] / times[arms[0]]:.2f}", seconds]
        )
    return Table(
        "Size and time",
        ["arm", "parameters", "ms per step", f"of {arms[0]}", "seconds of training"],
        body,
        note="Processor time of one thread, or on a GPU the time of the wall.",
    )


def _plots(rows: Rows, arms: Sequence[str]) -> list[Plot]:
    series = []
    for equal in ("epochs", "time"):
        x, y, spread = [], [], []
        for place, arm in enumerate(arms):
            values = [r["metrics"][METRIC] for r in chosen(rows, arm, equal)]
            if values:
                x.append(place + (0.08 if equal == "time" else -0.08))
                y.append(statistics.fmean(values))
                spread.append(statistics.stdev(values) if len(values) > 1 else 0.0)
        label = "same training time" if equal == "time" else "same epochs"
        series.append(Series(label, x, y, spread, kind="points"))
    legend = ", ".join(f"{place} = {arm}" for place, arm in enumerate(arms))
    return [
        Plot(
            "ap",
            "Average precision of the arms, mean and spread over seeds",
            f"arm ({legend})",
            "BEV AP, IoU 0.5 / 0.25 / 0.25 (%)",
            series,
            alt="AP of DSVT and its baselines after equal epochs and after equal training time.",
        )
    ]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without nested dictionaries, as reports expect."""
    plain = {k: v for k, v in row.items() if k not in ("metrics", "stderr")}
    return plain | dict(row["metrics"]) | {f"{k} stderr": v for k, v in row["stderr"].items()}
