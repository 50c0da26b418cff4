"""From the runs of TEDDY's comparison to tables, plots and verdicts.

Differences are paired by seed: for each seed the mean over the levels that both arms have, then mean and 95 %
interval (Student's t) over seeds. TEDDY's edges are the same for every seed, so its spread holds no variance
of the edge set.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from zoo.harness.experiments import ExperimentResult
from zoo.harness.judging import deviation, judge, mean_cell
from zoo.harness.stats import Difference, seed_difference
from zoo.harness.tables import Outcome, Plot, Series, Table, Verdict

Rows = Sequence[dict[str, Any]]
TITLES = {
    "gcn": "GCN",
    "gin": "GIN",
    "gat": "GAT",
    "cora": "Cora",
    "citeseer": "CiteSeer",
    "digits": "digits",
    "cs": "Coauthor-CS",
    "pubmed": "PubMed",
}
CURVES = (
    "teddy",
    "teddy, no distillation",
    "random",
    "random, no distillation",
    "reversed",
    "magnitude weights",
    "ugs",
)
EDGES = "edges 30 %"
NOT_STATED = "not stated; this zoo's bar"


def summarise(
    rows: Rows, datasets: Sequence[str], architectures: Sequence[str], entries: dict[str, int]
) -> ExperimentResult:
    """Everything that is reported of the runs.

    Args:
        rows: one per run: dataset, architecture, arm, level, seed, test, seconds, edges_kept, weights_kept.
        datasets: the first one has UGS and the verdicts that need all arms.
        architectures: which ran.
        entries: directed entries of each graph.
    """
    tables: list[Table] = []
    verdicts: list[Verdict] = []
    plots: list[Plot] = []
    for dataset in datasets:
        for architecture in architectures:
            own = [r for r in rows if r["dataset"] == dataset and r["architecture"] == architecture]
            tables.append(_accuracy_table(own, dataset, architecture, entries[dataset]))
            verdicts += _score_verdicts(own, dataset, architecture)
            if dataset == datasets[0]:
                tables.append(_time_table(own, dataset, architecture))
                verdicts += _method_verdicts(own, dataset, architecture)
                plots += _plots(own, dataset, architecture)
    notes = [
        "Accuracy is that of the test nodes at the epoch of best validation accuracy, in percent: mean ± "
        "sample standard deviation over seeds.",
        "Times are processor seconds of all trainings that an arm needs, on one thread: TEDDY and the "
        "distilled arms one dense training and one of their own; UGS every round before the level.",
        "Magnitude weights and l0 weights keep all edges: they show what the weights alone cost. GAT counts "
        "self-loops among the entries, as TEDDY does, so that it loses more edges at the same level.",
        "Published numbers could not be had; the paper's claim is that TEDDY significantly surpasses "
        "iterative methods.",
    ]
    return ExperimentResult(tables, verdicts, plots, rows=list(rows), notes=notes)


def paired(rows: Rows, first: str, second: str, levels: Sequence[str] | None = None) -> Difference | None:
    """Accuracy of one arm minus another's in points, over the levels both have (or those given); None if
    there are none.

    `dense` has one level, which is compared with each level of the other arm.
    """
    one, other = _by_seed(rows, first), _by_seed(rows, second)
    differences = []
    for seed in sorted(one.keys() & other.keys()):
        names = set(one[seed]) if levels is None else set(levels) & set(one[seed])
        if second.startswith("dense"):
            base = dict.fromkeys(names, other[seed]["dense"])
        else:
            base = {name: value for name, value in other[seed].items() if name in names}
        if base and (levels is None or len(base) == len(levels)):
            differences.append(100 * statistics.fmean(one[seed][name] - base[name] for name in base))
    if not differences:
        return None
    return seed_difference(differences, [0.0] * len(differences))


def _by_seed(rows: Rows, arm: str) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["arm"] == arm:
            found.setdefault(row["seed"], {})[row["level"]] = row["test"]
    return found


def _levels(rows: Rows) -> list[str]:
    names = {row["level"] for row in rows if row["level"].startswith("k") and "," not in row["level"]}
    return sorted(names, key=lambda name: int(name[1:]))


def _score_verdicts(rows: Rows, dataset: str, architecture: str) -> list[Verdict]:
    """What the order of the edges alone is worth, and what distillation is."""
    where = f"{TITLES[dataset]}, {TITLES[architecture]}"
    plain, levels = ", no distillation", _levels(rows)
    bare = {arm: f"{arm}{plain}" for arm in ("teddy", "random", "reversed")}
    return [
        judge(
            f"{where}: 30 % of the edges dropped by TEDDY's score beat the reversed order by 2 points",
            NOT_STATED,
            paired(rows, bare["teddy"], bare["reversed"], [EDGES]),
            at_least=2.0,
        ),
        judge(
            f"{where}: 30 % of the edges dropped by TEDDY's score beat random ones",
            "the score finds the edges that matter",
            paired(rows, bare["teddy"], bare["random"], [EDGES]),
        ),
        judge(
            f"{where}: TEDDY beats random edges with the same distillation, mean over levels",
            "the score finds the edges that matter",
            paired(rows, "teddy", "random", levels) or paired(rows, "teddy", "random"),
        ),
        judge(
            f"{where}: without distillation TEDDY's edges beat random ones, mean over levels",
            "the score finds the edges that matter",
            paired(rows, bare["teddy"], bare["random"], levels),
        ),
        judge(
            f"{where}: distillation adds to TEDDY, mean over levels",
            "helps",
            paired(rows, "teddy", bare["teddy"], levels),
        ),
    ]


def _method_verdicts(rows: Rows, dataset: str, architecture: str) -> list[Verdict]:
    """The whole method against UGS and dense."""
    where, levels = f"{TITLES[dataset]}, {TITLES[architecture]}", _levels(rows)
    found = [
        judge(
            f"{where}: TEDDY in one training beats UGS, mean over levels",
            "significantly surpasses iterative methods",
            paired(rows, "teddy", "ugs", levels),
        )
    ]
    undistilled = "teddy, no distillation"
    found.append(
        judge(
            f"{where}: TEDDY without distillation beats UGS, mean over levels",
            "not stated",
            paired(rows, undistilled, "ugs", levels),
        )
    )
    bars = (
        (f"{where}: TEDDY at level 5 is not below dense minus 1 point", "teddy", "dense", "k5", -1.0),
        (
            f"{where}: TEDDY at level 20 is 5 points above random edges without distillation",
            "teddy",
            "random, no distillation",
            "k20",
            5.0,
        ),
        (
            f"{where}: 90 % of the weights zero by l0 projection cost at most 1 point",
            "l0 weights",
            "dense",
            "weights 90 %",
            -1.0,
        ),
    )
    for claim, first, second, level, bar in bars:
        found.append(judge(claim, NOT_STATED, paired(rows, first, second, [level]), at_least=bar))
    return [*found, _time_verdict(rows, where, levels)]


def _time_verdict(rows: Rows, where: str, levels: Sequence[str]) -> Verdict:
    claim = f"{where}: the highest level costs less training than UGS"
    top = levels[-1] if levels else ""
    teddy, ugs = (_seconds(rows, arm, top) for arm in ("teddy", "ugs"))
    if not teddy or not ugs:
        return Verdict(claim, "one training instead of twenty rounds", "", "not measured")
    ours, theirs = statistics.fmean(teddy), statistics.fmean(ugs)
    outcome: Outcome = "holds" if ours < theirs else "does not hold"
    measured = f"{ours:.1f} s with the teacher against {theirs:.0f} s, {theirs / ours:.0f} times less"
    return Verdict(claim, "one training instead of twenty rounds", measured, outcome)


def _seconds(rows: Rows, arm: str, level: str) -> list[float]:
    return [row["seconds"] for row in rows if row["arm"] == arm and row["level"] == level]


def _values(rows: Rows, arm: str, level: str) -> list[float]:
    return [100 * row["test"] for row in rows if row["arm"] == arm and row["level"] == level]


def _accuracy_table(rows: Rows, dataset: str, architecture: str, entries: int) -> Table:
    levels = ["dense", *_levels(rows), EDGES, "weights 90 %", "k10, lambda 0.1", "k10, lambda 10"]
    levels = [level for level in levels if any(row["level"] == level for row in rows)]
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows)]
    body = [[arm, *(mean_cell(_values(rows, arm, level)) for level in levels)] for arm in arms]
    seeds = {arm: len({row["seed"] for row in rows if row["arm"] == arm}) for arm in arms}
    fewer = {arm: count for arm, count in seeds.items() if count != max(seeds.values(), default=0)}
    note = f"{max(seeds.values(), default=0)} seeds" + "".join(f"; {arm}: {n}" for arm, n in fewer.items())
    return Table(
        f"{TITLES[dataset]}, {TITLES[architecture]}: test accuracy in %",
        ["arm", *(_heading(rows, level, entries) for level in levels)],
        body,
        f"{note}. Level k: share of edges dropped / of weights zero; {entries} directed entries.",
    )


def _heading(rows: Rows, level: str, entries: int) -> str:
    if not level.startswith("k") or "," in level:
        return level
    one = next(row for row in rows if row["level"] == level and row["arm"] == "teddy")
    total = max(row["weights_kept"] for row in rows)
    dropped = 1 - one["edges_kept"] / entries
    return f"{level} ({100 * dropped:.0f} / {100 - 100 * one['weights_kept'] / total:.0f} %)"


def _time_table(rows: Rows, dataset: str, architecture: str) -> Table:
    levels = _levels(rows)
    body = []
    for arm in ("dense", *CURVES):
        if arm == "dense":
            values = [_seconds(rows, "dense", "dense")] * len(levels)
        else:
            values = [_seconds(rows, arm, level) for level in levels]
        if any(values):
            body.append([arm, *(round(statistics.fmean(v), 1) if v else "" for v in values)])
    return Table(
        f"{TITLES[dataset]}, {TITLES[architecture]}: processor seconds of training to reach a level",
        ["arm", *levels],
        body,
    )


def _plots(rows: Rows, dataset: str, architecture: str) -> list[Plot]:
    where = f"{TITLES[dataset]}, {TITLES[architecture]}"
    levels = _levels(rows)
    curves, points = [], []
    for arm in CURVES:
        known = [level for level in levels if _values(rows, arm, level)]
        if not known:
            continue
        values = [_values(rows, arm, level) for level in known]
        mean, spread = [statistics.fmean(v) for v in values], [deviation(v) for v in values]
        curves.append(Series(arm, [int(level[1:]) for level in known], mean, spread))
        times = [statistics.fmean(_seconds(rows, arm, level)) for level in known]
        if arm in ("teddy", "teddy, no distillation", "magnitude weights", "ugs"):
            points.append(Series(arm, times, mean, spread, kind="points", marks=known))
    for arm in ("dense", "dense, distilled"):
        if values_of := _values(rows, arm, "dense"):
            curves.append(Series(arm, [], [statistics.fmean(values_of)], kind="reference"))
    dense = _values(rows, "dense", "dense")
    if dense:
        points.append(Series("dense", [], [statistics.fmean(dense)], kind="reference"))
    alt = f"Test accuracy of each arm on {where}; see the table for the numbers."
    return [
        Plot(
            f"accuracy-{architecture}",
            f"{where}: accuracy against the level of sparsity",
            "level k: 1 - 0.95^k of the edges and 1 - 0.9^k of the weights dropped",
            "test accuracy [%]",
            curves,
            alt,
        ),
        Plot(
            f"time-{architecture}",
            f"{where}: accuracy against total training time",
            "processor time of all trainings needed [s]",
            "test accuracy [%]",
            points,
            alt,
            log_x=True,
        ),
    ]
