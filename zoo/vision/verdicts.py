"""From the runs of the pruning benchmark to tables, plots and verdicts.

Two tests stand side by side: over seeds (Student's t on paired seeds, which sees the variance of training),
and over test images (bootstrap of the paired differences of each image's mean over seeds, which sees the
variance of the test set). A verdict rests on the seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from zoo.harness.experiments import ExperimentResult
from zoo.harness.judging import deviation, judge, mean_cell
from zoo.harness.stats import Difference, paired_difference, seed_difference
from zoo.harness.tables import Plot, Series, Table, Verdict
from zoo.vision.arms import unpacked

Rows = Sequence[dict[str, Any]]
CONTROL, LEADER = "random mask", "global magnitude"
CURVES = (  # as many as a plot has distinct colours
    "global magnitude",
    "uniform magnitude",
    "LAMP",
    "random mask",
    "BiP",
    "random, ERK",
    "RigL",
)
POINTS = (  # what differs in cost; the allocations among themselves hardly do
    "global magnitude",
    "uniform magnitude",
    "random mask",
    "jackpot",
    "BiP",
    "soup of 3",
    "random, uniform",
    "random, ERK",
    "SET",
    "RigL",
    "lottery ticket",
)
BAR = "this zoo's bar"
SECONDS = {
    "cpu": "one processor thread",
    "cuda": "the wall on a GPU that the runs may have shared",
    "mixed": "one processor thread or of the wall on a GPU",
}


def chosen(rows: Rows, arm: str, level: float, width: float = 1.0) -> list[dict[str, Any]]:
    """The runs of an arm at a level, by seed."""
    found = [r for r in rows if r["arm"] == arm and r["level"] == level and r["width"] == width]
    return sorted(found, key=lambda row: row["seed"])


def over_seeds(rows: Rows, first: str, second: str, level: float) -> Difference | None:
    """Accuracy of one arm minus another's in points, paired by seed; None if one of them was not run."""
    a, b = chosen(rows, first, level), chosen(rows, second, level)
    if not a or len(a) != len(b):
        return None
    return seed_difference([100 * r["accuracy"] for r in a], [100 * r["accuracy"] for r in b])


def over_images(rows: Rows, first: str, second: str, level: float) -> Difference | None:
    """The same difference with the test images as the sample: each image's mean over seeds, paired."""
    a, b = chosen(rows, first, level), chosen(rows, second, level)
    if not a or len(a) != len(b):
        return None
    means = [100 * np.mean([unpacked(row) for row in arm], axis=0) for arm in (a, b)]
    return paired_difference(means[0], means[1], resamples=2000)


def summarise(rows: Rows, dataset: str, levels: Sequence[float], protocol: str) -> ExperimentResult:
    """Everything that is reported of the runs.

    Args:
        rows: one per run: arm, level, seed, width, accuracy, correct, sparsity, flops, seconds.
        dataset: name of the images.
        levels: the sparsities.
        protocol: what was trained on what.
    """
    arms = list(dict.fromkeys(r["arm"] for r in rows if r["level"] > 0 and r["width"] == 1.0))
    tables = [
        _accuracy_table(rows, arms, levels, protocol),
        _cost_table(rows, arms, levels),
        _paired_table(rows, arms, levels, CONTROL),
        _paired_table(rows, arms, levels, LEADER),
    ]
    if len(widths := sorted({r["width"] for r in rows})) > 1:
        tables.append(_width_table(rows, widths))
    notes = [
        protocol,
        "Accuracy is that of the test images in percent, mean ± sample standard deviation over seeds. Cost "
        "counts multiply-adds of forward and backward products (two operations each) with the kept weights "
        "only, dense weight gradients where a method needs them, and the dense start where there is one; "
        f"seconds are those of {SECONDS[_devices(rows)]}, where zeros save no time.",
        "A lottery ticket's rounds are each as long as the dense training and a soup trains three networks: "
        "more than the equal epochs of the others, which the cost shows.",
    ]
    public = [{k: v for k, v in row.items() if k != "correct"} for row in rows]
    plots = _plots(rows, arms, levels, dataset)
    return ExperimentResult(tables, _verdicts(rows, levels), plots, public, notes)


def _accuracy_table(rows: Rows, arms: Sequence[str], levels: Sequence[float], protocol: str) -> Table:
    body = []
    for arm in ("dense", "dense, trained on"):
        cell = mean_cell([100 * r["accuracy"] for r in chosen(rows, arm, 0.0)])
        body.append([arm, *[cell] * len(levels)])
    for arm in arms:
        body.append([arm, *(_accuracy_cell(chosen(rows, arm, level)) for level in levels)])
    columns = ["arm", *(f"{level:.0%} zeros" for level in levels)]
    return Table("Accuracy (%)", columns, body, protocol)


def _accuracy_cell(found: Rows) -> str:
    cell = mean_cell([100 * r["accuracy"] for r in found])
    empty = max((r["empty_layers"] for r in found), default=0)
    return f"{cell} ({empty} layers empty)" if empty else cell


def _cost_table(rows: Rows, arms: Sequence[str], levels: Sequence[float]) -> Table:
    body = []
    for arm in ("dense, trained on", *arms):
        level = 0.0 if arm.startswith("dense") else levels[min(1, len(levels) - 1)]
        found = chosen(rows, arm, level)
        if not found:
            continue
        flops = statistics.fmean(r["flops"] for r in found) / 1e9
        seconds = statistics.fmean(r["seconds"] for r in found)
        body.append([arm, f"{level:.0%}", f"{flops:,.1f}", f"{seconds:,.0f}"])
    return Table("Training cost in all", ["arm", "zeros", "GFLOPs", "seconds"], body)


def _devices(rows: Rows) -> str:
    kinds = {r.get("device", "cpu") for r in rows}  # rows of earlier versions do not say
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _paired_table(rows: Rows, arms: Sequence[str], levels: Sequence[float], against: str) -> Table:
    body = []
    for arm in arms:
        if arm == against:
            continue
        cells = []
        for level in levels:
            images, seeds = over_images(rows, arm, against, level), over_seeds(rows, arm, against, level)
            if images is None or seeds is None:
                cells.append("")
                continue
            same_sign = seeds.low > 0 or seeds.high < 0
            mark = " **" if images.seen and same_sign else " *" if images.seen else ""
            cells.append(f"{images.value:+.1f} [{images.low:+.1f}, {images.high:+.1f}]{mark}")
        body.append([arm, *cells])
    columns = ["arm", *(f"{level:.0%} zeros" for level in levels)]
    note = "Points, 95 % interval over test images. *: seen over images; **: over seeds as well."
    return Table(f"Against {against}, paired by image", columns, body, note)


def gaps(rows: Rows, width: float, arm: str = "random, ERK", level: float = 0.9) -> list[float]:
    """By seed, how far an arm stays below the dense network of the same width that was trained as long."""
    dense = chosen(rows, "dense, trained on", 0.0, width)
    return [
        100 * (d["accuracy"] - r["accuracy"])
        for d, r in zip(dense, chosen(rows, arm, level, width), strict=False)
    ]


def _width_table(rows: Rows, widths: Sequence[float]) -> Table:
    body = []
    for width in widths:
        dense = mean_cell([100 * r["accuracy"] for r in chosen(rows, "dense, trained on", 0.0, width)])
        sparse = mean_cell([100 * r["accuracy"] for r in chosen(rows, "random, ERK", 0.9, width)])
        body.append([f"{width:g}", dense, sparse, mean_cell(gaps(rows, width))])
    columns = ["width factor", "dense", "random, ERK, 90 % zeros", "gap (points)"]
    return Table("Random pruning over widths", columns, body)


def _verdicts(rows: Rows, levels: Sequence[float]) -> list[Verdict]:
    out = []
    for level in levels:
        if 0.9 <= level <= 0.95:
            out.append(
                judge(
                    f"global magnitude is a point or more above uniform at {level:.0%}",
                    BAR,
                    over_seeds(rows, LEADER, "uniform magnitude", level),
                    at_least=1.0,
                )
            )
    top = levels[-1]
    empty = max((r["empty_layers"] for r in chosen(rows, LEADER, top)), default=0)
    out.append(
        judge(
            f"the minimum threshold repairs what the global one loses at {top:.0%} (layers empty there: "
            f"{empty})",
            "layers collapse without it (abstract)",
            over_seeds(rows, "global magnitude, floor", LEADER, top),
        )
    )
    for level in levels:
        for first, second, claim, published in (
            ("random, ERK", "random, uniform", "ERK random is above uniform random", BAR),
            ("random, ERK", "random, SNIP ratio", "ERK random differs from the SNIP ratio", "they tie"),
            ("BiP", LEADER, "BiP is above one-shot global magnitude", "above IMP in most settings"),
            ("BiP", "global magnitude, gradual", "BiP is above gradual magnitude", "above IMP in most"),
            (
                "jackpot",
                CONTROL,
                "a jackpot, whose weights are never trained, beats a trained random mask",
                "not stated; " + BAR,
            ),
            ("lottery ticket", "random, ERK", "a lottery ticket beats a random one", "tickets win (paper)"),
            ("RigL", "random, ERK", "moving the mask (RigL) beats holding it", "above static (abstract)"),
            (
                "soup of 3",
                "global magnitude",
                "a soup is above one network of one-shot pruning",
                "above its members (abstract)",
            ),
        ):
            if level in (0.9, 0.95):
                found = over_seeds(rows, first, second, level)
                out.append(judge(f"{claim} at {level:.0%}", published, found))
        if level in (0.9, 0.95):
            for arm in (LEADER, "LAMP", "random, ERK"):
                out.append(
                    judge(
                        f"{arm} beats a random mask of equal budget at {level:.0%}",
                        BAR,
                        over_seeds(rows, arm, CONTROL, level),
                    )
                )
    widths = sorted({r["width"] for r in rows})
    if len(widths) > 1 and (narrow := gaps(rows, widths[0])) and (wide := gaps(rows, widths[-1])):
        out.append(
            judge(
                f"the gap of random pruning to dense closes from width {widths[0]:g} to {widths[-1]:g}",
                "it closes (abstract)",
                seed_difference(narrow, wide),
            )
        )
    return [verdict for verdict in out if verdict.verdict != "not measured"]


def _kept(level: float) -> float:
    return round(100 * (1 - level), 6)


def _plots(rows: Rows, arms: Sequence[str], levels: Sequence[float], dataset: str) -> list[Plot]:
    curves = []
    for arm in arms:
        found = {level: one for level in levels if (one := chosen(rows, arm, level))}
        if arm in CURVES:
            values = [[100 * r["accuracy"] for r in one] for one in found.values()]
            means, spreads = [statistics.fmean(v) for v in values], [deviation(v) for v in values]
            curves.append(Series(arm, [_kept(level) for level in found], means, spreads))
    dense = statistics.fmean(100 * r["accuracy"] for r in chosen(rows, "dense, trained on", 0.0))
    curves.append(Series("dense, trained on", [], [dense], kind="reference"))
    level = 0.95 if 0.95 in levels else levels[-1]
    points: list[Series] = []
    for arm in arms:
        if arm in POINTS and (runs := chosen(rows, arm, level)):
            cost = statistics.fmean(r["flops"] for r in runs) / 1e9
            reached = [100 * r["accuracy"] for r in runs]
            mean, spread = statistics.fmean(reached), deviation(reached)
            number = str(len(points) + 1)  # colours repeat, numbers do not
            label = f"{number}: {arm}"
            points.append(Series(label, [cost], [mean], [spread], kind="points", marks=[number]))
    return [
        Plot(
            "accuracy",
            f"Accuracy against weights left, {dataset}",
            "weights kept (%)",
            "test accuracy (%)",
            curves,
            log_x=True,
            alt="One curve per method, with bands of one standard deviation over seeds.",
        ),
        Plot(
            "cost",
            f"Accuracy at {level:.0%} zeros against total training cost, {dataset}",
            "training cost (GFLOPs)",
            "test accuracy (%)",
            points,
            log_x=True,
            alt="One point per method: what it reaches and what it costs, dense start included.",
        ),
    ]
