"""What every script in benchmarks/ shares: flags, table, goals, JSON, exit code.

def cells(quick: bool, threads: int) -> Iterator[Cell]:
    for sparsity in (0.5, 0.9):
        ...
        yield Cell({"zeros": f"{sparsity:.0%}"}, ours, {"torch": dense, "mkl": csr}, Bound(nbytes, flops),
                   Goal(1.6, over=("torch",)))

if __name__ == "__main__":
    sys.exit(main("sparse_linear is faster than dense from 50 % zeros", cells))
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..store.io import read_json, write_json
from .machine import Bound, Limits, limits, machine, others_busy
from .timing import Clock, Ratio, Timing, compare, ratio, threads


@dataclass(frozen=True)
class Goal:
    """A promised speed: at least `ratio` times that of the best of the peers `over` (of all if empty)."""

    ratio: float | int
    over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One line of a table.

    Attributes:
        labels: what the line is about, such as {"zeros": "90%", "batch": 8}.
        ours: the function that the benchmark is about.
        peers: name -> another program doing the same job; at least one.
        bound: work that nobody can avoid.
        goal: what `ours` must reach in this cell.
        group: name of a set of cells that has a goal for its geometric mean.
    """

    labels: Mapping[str, object]
    ours: Callable[[], object]
    peers: Mapping[str, Callable[[], object]]
    bound: Bound | None = None
    goal: Goal | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if not self.peers or "ours" in self.peers:
            raise ValueError(
                f"cell {dict(self.labels)}: needs peers, none of them named 'ours'; "
                f"received {list(self.peers)}"
            )
        unknown = set(self.goal.over if self.goal else ()) - set(self.peers)
        if unknown:
            raise ValueError(
                f"cell {dict(self.labels)}: the goal names {sorted(unknown)}, the peers are "
                f"{list(self.peers)}"
            )


@dataclass(frozen=True)
class Later:
    """A cell that is built only if it is measured: its data may take longer to make than its time to take."""

    labels: Mapping[str, object]
    build: Callable[[], Cell]


@dataclass(frozen=True)
class Row:
    """A measured cell."""

    cell: Cell
    timings: dict[str, Timing]
    limits: Limits

    def best(self, names: Sequence[str] = ()) -> str:
        """The fastest of the named peers, of all peers if none is named."""
        return min(names or self.cell.peers, key=lambda name: self.timings[name].median)

    def against(self, names: Sequence[str] = ()) -> Ratio:
        """How much faster ours is than the best of the named peers."""
        return ratio(self.timings[self.best(names)], self.timings["ours"])

    @property
    def met(self) -> bool | None:
        """Whether the cell's goal is met, None without a goal."""
        goal = self.cell.goal
        return None if goal is None else self.against(goal.over).value >= goal.ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; times in seconds."""
        cell, goal = self.cell, self.cell.goal
        result: dict[str, Any] = {
            "labels": _plain(cell.labels),
            "seconds": {
                name: {"median": t.median, "p10": t.p10, "p90": t.p90, "samples": len(t.samples)}
                for name, t in self.timings.items()
            },
            "best_peer": self.best(),
            "ratio": asdict(self.against()),
            "group": cell.group,
        }
        if cell.bound is not None:
            seconds = cell.bound.seconds(self.limits)
            result["bound"] = {
                "bytes": cell.bound.bytes,
                "flops": cell.bound.flops,
                "seconds": seconds,
                "kind": cell.bound.kind(self.limits),
                "share": seconds / self.timings["ours"].median,
            }
        if goal is not None:
            over = self.best(goal.over)
            result["goal"] = {
                "ratio": goal.ratio,
                "over": over,
                "reached": self.against(goal.over).value,
                "met": self.met,
            }
            if cell.bound is not None and not self.met:
                most = self.timings[over].median / cell.bound.seconds(self.limits)
                result["goal"] |= {"most": most, "bounded": most < goal.ratio}
        return result


def _plain(labels: Mapping[str, object]) -> dict[str, int | float | str]:
    return {key: value if isinstance(value, int | float) else str(value) for key, value in labels.items()}


def heading(subject: str, rows: Sequence[Mapping[str, Any]], groups: Sequence[bool] = ()) -> str:
    """What was measured against what, by which factors it is faster, and how many of its goals are met.

    Args:
        subject: what against what.
        rows: as `Row.to_dict` makes them.
        groups: whether the goal of each group is met.
    """
    factors = [row["goal"]["reached"] if "goal" in row else row["ratio"]["value"] for row in rows]
    goals = [row["goal"]["met"] for row in rows if "goal" in row] + list(groups)
    text = f"{subject[0].upper()}{subject[1:]}"
    if factors:
        few = len({f"{factor:.2f}" for factor in factors}) == 1
        text += f": {min(factors):.2f}" + ("x" if few else f" to {max(factors):.2f}x")
    if goals:
        text += f", {sum(goals)} of {len(goals)} goals met"
    return text


def verdict(goal: Mapping[str, Any] | None) -> str:
    """What a goal of a record came to: met, missed, or bounded where the measured bound rules it out."""
    if goal is None:
        return ""
    if goal["met"]:
        return f">= {goal['ratio']:g}x met"
    if goal.get("bounded"):
        return f">= {goal['ratio']:g}x bounded: the bound allows {goal['most']:.2f}x"
    return f">= {goal['ratio']:g}x MISSED"


@dataclass
class Table:
    """All rows of a benchmark, with the goals of its groups; earlier rows as `Row.to_dict` made them."""

    subject: str
    group_goals: Mapping[str, Goal] = field(default_factory=dict)
    rows: list[Row | dict[str, Any]] = field(default_factory=list)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The rows as plain values."""
        return [row.to_dict() if isinstance(row, Row) else row for row in self.rows]

    def group_results(self) -> dict[str, tuple[float, bool]]:
        """Group -> (geometric mean of the ratios over its cells, whether the goal is met)."""
        results = {}
        for name, goal in self.group_goals.items():
            ratios = [_reached(row, goal.over) for row in self.records if row["group"] == name]
            if ratios:  # a quick run may leave a group out
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                results[name] = (mean, mean >= goal.ratio)
        return results

    @property
    def missed(self) -> int:
        """Number of goals that were not met although the bound would allow it."""
        goals = [row["goal"] for row in self.records if "goal" in row]
        cells = sum(not goal["met"] and not goal.get("bounded", False) for goal in goals)
        return cells + sum(not met for _, met in self.group_results().values())

    @property
    def heading(self) -> str:
        """The subject and what came of it."""
        return heading(self.subject, self.records, [met for _, met in self.group_results().values()])

    def __str__(self) -> str:
        records = self.records
        names = dict.fromkeys(name for row in records for name in row["seconds"])
        peers = [name for name in names if name != "ours"]
        labels = list(dict.fromkeys(key for row in records for key in row["labels"]))
        lines = [
            [
                *labels,
                "ours ms",
                *(f"{name} ms" for name in peers),
                "bound ms",
                "of bound",
                "ratio",
                "best peer",
                "goal",
            ]
        ]
        for row in records:
            bound, goal = row.get("bound"), row.get("goal")
            times = {name: f"{timing['median'] * 1e3:.3f}" for name, timing in row["seconds"].items()}
            over = row["best_peer"] if goal is None else goal["over"]
            reached = str(Ratio(**row["ratio"]))
            if goal is not None and over != row["best_peer"]:
                reached = f"{goal['reached']:.2f}x"
            lines.append(
                [
                    *(str(row["labels"].get(key, "")) for key in labels),
                    *(times.get(name, "") for name in ("ours", *peers)),
                    "" if bound is None else f"{bound['seconds'] * 1e3:.3f}",
                    "" if bound is None else f"{bound['share']:.0%}",
                    reached,
                    over,
                    verdict(goal),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [self.heading]
        text += ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
        for name, (mean, met) in self.group_results().items():
            goal = self.group_goals[name]
            said = "met" if met else "MISSED"
            text.append(f"geometric mean, {name}: {mean:.2f}x, goal >= {goal.ratio:g}x {said}")
        return "\n".join(text)


def _reached(row: Mapping[str, Any], over: Sequence[str]) -> float:
    """How much faster ours was than the best of the named peers, of all peers if none is named."""
    names = over or [name for name in row["seconds"] if name != "ours"]
    best: float = min(row["seconds"][name]["median"] for name in names)
    return best / row["seconds"]["ours"]["median"]


def _arguments(subject: str, argv: Sequence[str] | None) -> argparse.Namespace:
    def count(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
        return int(text)

    parser = argparse.ArgumentParser(description=subject)
    parser.add_argument("--quick", action="store_true", help="fewer cells and shorter blocks")
    parser.add_argument("--threads", type=count, default=1, help="threads of every program (default 1)")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="also write the results and the machine they are from (or print them)",
    )
    parser.add_argument(
        "--only",
        metavar="TEXT",
        action="append",
        default=[],
        help="only cells whose labels, as 'name value, name value', hold this; repeatable",
    )
    parser.add_argument("--resume", action="store_true", help="keep the cells that FILE of --json has")
    parser.add_argument("--seconds", type=count, help="begin no cell after this time; go on with --resume")
    options = parser.parse_args(argv)
    if options.resume and options.json in (None, "-"):
        parser.error("--resume needs the --json FILE to go on with")
    return options


def main(
    subject: str,
    cells: Callable[[bool, int], Iterable[Cell | Later]],
    *,
    group_goals: Mapping[str, Goal] | None = None,
    argv: Sequence[str] | None = None,
    clock: Clock | None = None,
    block_seconds: float = 0.02,
    settle: float = 0.0,
) -> int:
    """Run a benchmark script: measure each cell, print the table, write JSON; 0 if every goal is met, else 1.

    A goal that the measured bound rules out is marked "bounded" and does not count as missed. One thread is
    timed in CPU time of the process, which other programs on the machine disturb least; more threads in wall
    time.

    Args:
        subject: what is measured against what, for the heading, which adds what came of it.
        cells: (quick, threads) -> cells, best as a generator, so that the data of one cell is freed before
            the next; `Later` where data take long to make.
        group_goals: goals for geometric means over the cells of a group.
        argv: command line, by default the process's own.
        clock: another clock.
        block_seconds: about how long one program runs in one of the 30 rounds (fewer for long calls). Short
            ones, as others slow a shared machine down for tenths of a second.
        settle: seconds of rest before each block where there are several threads, see `compare`.
    """
    options = _arguments(subject, argv)
    tick = clock or (time.process_time if options.threads == 1 else time.perf_counter)
    before, busy, start = machine(), others_busy(), time.perf_counter()
    earlier = read_json(options.json) if options.resume and Path(options.json).exists() else {"rows": []}
    table = Table(subject, group_goals or {}, list(earlier["rows"]))
    done, left = [row["labels"] for row in earlier["rows"]], 0

    def report(left: int) -> dict[str, Any]:
        others = (others_busy() - busy) / (time.perf_counter() - start)
        return {
            "subject": subject,
            "machine": before,
            "threads": options.threads,
            "quick": options.quick,
            "clock": getattr(tick, "__name__", "custom"),
            "limits": asdict(ceiling),
            "others_busy": others,
            "under_load": others > 0.1 or earlier.get("under_load", False),
            "rows": table.records,
            "groups": {
                name: {"ratio": mean, "goal": table.group_goals[name].ratio, "met": met}
                for name, (mean, met) in table.group_results().items()
            },
            "missed": table.missed,
            "left": left,
        }

    with threads(options.threads):
        ceiling = limits(options.threads, clock=tick, seconds=0.1 if options.quick else 0.5)
        for cell in cells(options.quick, options.threads):
            shown = ", ".join(f"{key} {value}" for key, value in cell.labels.items())
            # A measured cell may have labels that only building it told, such as a choice.
            if any(_plain(cell.labels).items() <= labels.items() for labels in done):
                continue
            if any(text not in shown for text in options.only):
                continue
            if options.seconds and time.perf_counter() - start > options.seconds:
                left += 1
                continue
            if isinstance(cell, Later):
                cell = cell.build()
            timings = compare(
                {"ours": cell.ours, **cell.peers},
                rounds=3 if options.quick else 30,
                block_seconds=0.03 if options.quick else block_seconds,
                clock=tick,
                settle=settle if options.threads > 1 else 0.0,
            )
            row = Row(cell, timings, ceiling)
            table.rows.append(row)
            print(f"{shown}: {row.against()}", file=sys.stderr, flush=True)
            if options.resume:  # what a kill would cost is one cell
                write_json(options.json, report(left=1))
    print(table)
    final = report(left)
    print(
        f"{before['cpu']}, {options.threads} thread(s); {ceiling.bytes_per_second / 1e9:.1f} GB/s, "
        f"{ceiling.flops_per_second / 1e9:.0f} GFLOP/s measured; other programs used "
        f"{final['others_busy']:.2f} cores"
        + (", UNDER LOAD: repeat on an idle machine" if final["under_load"] else "")
        + (f"; {left} cells left for --resume" if left else "")
    )
    if options.json == "-":
        print(json.dumps(final))
    elif options.json:
        write_json(options.json, final)
    if table.missed:
        print(f"{table.missed} goal(s) missed", file=sys.stderr)
    return 1 if table.missed or left else 0
