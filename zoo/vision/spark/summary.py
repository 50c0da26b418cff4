"""From the runs of the SparK study to tables, plots and verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.harness.experiments import ExperimentResult
from zoo.harness.judging import deviation, judge, mean_cell
from zoo.harness.stats import seed_difference
from zoo.harness.tables import Outcome, Plot, Series, Table, Verdict
from zoo.vision.spark.study import ARMS, SCRATCH

Rows = Sequence[dict[str, Any]]
BAR = "this zoo's bar"
WELL_BELOW = 0.8  # "well below 1.0": a prediction of zero costs (p - 1) / p


def best(rows: Rows, arm: str, labels: int) -> list[dict[str, Any]]:
    """The runs of an arm by seed, at the learning rate with the best mean validation accuracy."""
    found = [r for r in rows if r["what"] == "fine-tuning" and (r["arm"], r["labels"]) == (arm, labels)]
    if not found:
        return []
    rates = sorted({r["lr"] for r in found})
    rate = best_rate({lr: [r["validation"] for r in found if r["lr"] == lr] for lr in rates})
    return sorted((r for r in found if r["lr"] == rate), key=lambda row: row["seed"])


def best_rate(validation: Mapping[float, Sequence[float]]) -> float:
    """The learning rate with the best mean of these validation accuracies; the first of equals."""
    return max(validation, key=lambda lr: statistics.fmean(validation[lr]))


def points(rows: Rows, arm: str, labels: int) -> dict[int, float]:
    """Test accuracy in percent by seed."""
    return {r["seed"]: 100 * r["accuracy"] for r in best(rows, arm, labels)}


def gains(rows: Rows, arm: str, other: str, labels: int) -> list[float]:
    """By seed, how many points an arm is above another."""
    first, second = points(rows, arm, labels), points(rows, other, labels)
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def summarise(rows: Rows, few: int, protocol: str) -> ExperimentResult:
    """Everything that is reported.

    Args:
        rows: pre-trainings, linear probes, fine-tunings and occupancies.
        few: labels of the first fine-tuning.
        protocol: what was trained on what.
    """
    tables = [_accuracies(rows, few, protocol), _probes(rows, few), _losses(rows), _occupancies(rows)]
    notes = [
        protocol,
        "Accuracy is that of the test images in percent at the last epoch, mean ± sample standard deviation "
        "over seeds. The loss is that of hidden cells of validation images; predicting zero everywhere costs "
        "(p - 1) / p for cells of p values.",
        "A linear probe is a ridge regression of the classes on frozen features; from scratch on those of "
        "fresh weights.",
        "Occupancy is the share of non-zero sites after each convolution of a fresh network in eval mode.",
    ]
    public = [{k: v for k, v in row.items() if k != "correct"} for row in rows]
    return ExperimentResult(tables, _verdicts(rows, few), _plots(rows, few), public, notes)


def _accuracies(rows: Rows, few: int, protocol: str) -> Table:
    body = []
    for arm in (SCRATCH, *ARMS):
        cells = []
        for labels in (few, 0):
            runs = best(rows, arm, labels)
            rate = f" (rate {runs[0]['lr']:g})" if runs else ""
            cells.append(mean_cell([100 * r["accuracy"] for r in runs]) + rate)
        if any(cells):
            each = ", ".join(f"{v:.1f}" for v in points(rows, arm, few).values())
            body.append([arm, *cells, each])
    columns = ["arm", f"{few:,} labels", "all labels", f"each seed, {few:,} labels"]
    return Table("Test accuracy (%)", columns, body, protocol)


def _probe_points(rows: Rows, arm: str, labels: int) -> list[float]:
    """Test accuracy in percent, by seed."""
    found = [r for r in rows if r["what"] == "probe" and (r["arm"], r["labels"]) == (arm, labels)]
    return [100 * r["accuracy"] for r in sorted(found, key=lambda row: row["seed"])]


def _probes(rows: Rows, few: int) -> Table:
    shown = [arm for arm in (SCRATCH, *ARMS) if _probe_points(rows, arm, few)]
    body = [[arm, *(mean_cell(_probe_points(rows, arm, labels)) for labels in (few, 0))] for arm in shown]
    columns = ["arm", f"{few:,} labels", "all labels"]
    return Table("Test accuracy of a linear probe on frozen features (%)", columns, body)


def _pretrainings(rows: Rows, arm: str) -> list[dict[str, Any]]:
    return [r for r in rows if r["what"] == "pre-training" and r["arm"] == arm]


def _final(row: dict[str, Any]) -> float:
    return float(row["losses"][max(row["losses"], key=int)])


def _losses(rows: Rows) -> Table:
    body = []
    for arm in ARMS:
        if runs := _pretrainings(rows, arm):
            first, last = [r["losses"]["0"] for r in runs], [_final(r) for r in runs]
            seconds = statistics.fmean(r["seconds"] for r in runs)
            how = ", ".join(sorted({f"{r['execution'].split()[0]} on {r['device']}" for r in runs}))
            body.append([arm, mean_cell(first, 3), mean_cell(last, 3), f"{seconds:,.0f}", how])
    columns = ["arm", "before", "after", "seconds", "execution"]
    return Table("Loss on hidden cells of held-out images", columns, body)


def _occupancies(rows: Rows) -> Table:
    found = [r for r in rows if r["what"] == "occupancy"]
    layers = list(dict.fromkeys(r["layer"] for r in found))
    share = {(r["arm"], r["layer"]): r["share"] for r in found}
    body = [
        [layer, f"{share['re-masked', layer]:.3f}", f"{share['not re-masked', layer]:.3f}"]
        for layer in layers
    ]
    return Table("Occupancy after each convolution", ["layer", "re-masked", "not re-masked"], body)


def _verdicts(rows: Rows, few: int) -> list[Verdict]:
    out = [_loss_verdict(rows), _every_seed(rows, few)]
    probes = [_probe_points(rows, arm, few) for arm in ("SparK", SCRATCH)]
    learnt = seed_difference(*probes) if all(probes) else None
    claim = "a linear probe on SparK's frozen features is above one on those of fresh weights"
    out.append(judge(claim, BAR, learnt))
    gain, rest = gains(rows, "SparK", SCRATCH, few), gains(rows, "SparK", SCRATCH, 0)
    closing = seed_difference(gain, rest) if gain and len(gain) == len(rest) else None
    out.append(judge("the gain shrinks from few labels to all", BAR, closing))
    out.append(_occupancy_verdict(rows))
    for arm in ("no re-masking", "single scale"):
        found = gains(rows, "SparK", arm, few)
        out.append(
            judge(
                f"SparK is above the ablation '{arm}' at {few:,} labels",
                "above (ablation table)",
                seed_difference(found, [0.0] * len(found)) if found else None,
            )
        )
    return [verdict for verdict in out if verdict.verdict != "not measured"]


def _loss_verdict(rows: Rows) -> Verdict:
    claim = "the loss on hidden cells falls well below 1.0"
    losses = [_final(r) for r in _pretrainings(rows, "SparK")]
    if not losses:
        return Verdict(claim, BAR, "", "not measured")
    outcome: Outcome = "holds" if max(losses) <= WELL_BELOW else "does not hold"
    return Verdict(claim, f"not stated; {BAR}: {WELL_BELOW:g} in every seed", mean_cell(losses, 3), outcome)


def _every_seed(rows: Rows, few: int) -> Verdict:
    claim = f"fine-tuning a SparK network on {few:,} labels is above training from scratch in every seed"
    found = gains(rows, "SparK", SCRATCH, few)
    if not found:
        return Verdict(claim, "", "", "not measured")
    measured = ", ".join(f"{value:+.1f}" for value in found) + " points"
    outcome: Outcome = "holds" if min(found) > 0 else "does not hold"
    return Verdict(claim, "above other pre-training by about a point on ImageNet", measured, outcome)


def _occupancy_verdict(rows: Rows) -> Verdict:
    claim = "without re-masking occupancy grows from layer to layer, with it it stays"
    found = [r for r in rows if r["what"] == "occupancy"]
    kept = [r["share"] for r in found if r["arm"] == "re-masked"]
    grown = [r["share"] for r in found if r["arm"] == "not re-masked"]
    if not kept:
        return Verdict(claim, "", "", "not measured")
    rising = all(b >= a for a, b in zip(grown, grown[1:], strict=False)) and grown[-1] > grown[0]
    # Measured on images of this set: a visible site whose sums are all exactly zero would count as empty.
    steady = max(kept) - min(kept) < 0.01
    measured = f"with: {kept[0]:.2f} to {kept[-1]:.2f}; without: {grown[0]:.2f} to {grown[-1]:.2f}"
    published = "the mask pattern is erased without (section 3.1)"
    return Verdict(claim, published, measured, "holds" if rising and steady else "does not hold")


def _plots(rows: Rows, few: int) -> list[Plot]:
    curves = []
    for arm in ARMS:
        if runs := _pretrainings(rows, arm):
            epochs = sorted(set.intersection(*(set(map(int, r["losses"])) for r in runs)))
            values = [[r["losses"][str(epoch)] for r in runs] for epoch in epochs]
            means, spreads = [statistics.fmean(v) for v in values], [deviation(v) for v in values]
            curves.append(Series(arm, epochs, means, spreads))
    plots = [
        Plot(
            "loss",
            "Loss on hidden cells of held-out images",
            "epoch",
            "loss (1: nothing learnt)",
            curves,
            alt="One falling curve per pre-trained arm, with bands of one standard deviation over seeds.",
        ),
    ]
    bars = []
    for place, arm in enumerate((SCRATCH, *ARMS)):
        reached = list(points(rows, arm, few).values())
        if reached:
            bars.append(
                Series(
                    arm,
                    [place],
                    [statistics.fmean(reached)],
                    [deviation(reached)],
                    kind="points",
                )
            )
    plots.append(
        Plot(
            "accuracy",
            f"Test accuracy with {few:,} labels",
            "arm",
            "test accuracy (%)",
            bars,
            alt="One point per arm with one standard deviation over seeds.",
        )
    )
    shares = []
    for arm in ("re-masked", "not re-masked"):
        found = [r for r in rows if r["what"] == "occupancy" and r["arm"] == arm]
        if found:
            shares.append(Series(arm, [r["depth"] for r in found], [r["share"] for r in found]))
    plots.append(
        Plot(
            "occupancy",
            "Occupancy after each convolution",
            "convolution",
            "share of non-zero sites",
            shares,
            alt="A level line with masks, a rising one without.",
        )
    )
    return plots
