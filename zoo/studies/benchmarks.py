"""Claims about speed, read from the committed results of the benchmark scripts.

A study of this kind measures nothing itself: its rows are those of `benchmarks/results/NAME.json`, which the
script of that name writes, with the range of the ratio over rounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.errors import DataError
from zoo.shared.store.io import read_json
from zoo.studies.cells import CellCache
from zoo.studies.options import StudyOptions
from zoo.studies.study import Arm, Study
from zoo.studies.tables import Outcome, Table, Verdict
from zoo.studies.view import Row, View

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def rows_of(name: str, folder: Path = RESULTS) -> list[Row]:
    """What a benchmark measured: labels in words, the best peer, the ratio and its range.

    Raises:
        DataError: the file is not there, or no result of a benchmark.
    """
    file = folder / f"{name}.json"
    script = name.rpartition("-")[0]
    if not file.is_file():
        raise DataError(
            f"{file} is not there: run benchmarks/{script}.py in a checkout, and keep its JSON there"
        )
    content: Any = read_json(file)
    if not isinstance(content, dict) or "rows" not in content or "threads" not in content:
        raise DataError(f"{file} is no result of a benchmark; it has no rows and threads")
    words = {1: "one thread", 2: "two threads"}
    threads = words.get(content["threads"], f"{content['threads']} threads")
    return [
        {
            "level": ", ".join([*(str(v) for k, v in row["labels"].items() if k in SHOWN), threads]),
            "labels": row["labels"],
            "peer": row["best_peer"],
            **row["ratio"],
        }
        for row in content["rows"]
    ]


SHOWN = ("graph", "accumulator", "columns", "pattern", "zeros", "layer")


def measure(make: Any, options: StudyOptions, case: Row, cells: CellCache) -> list[Row]:
    """The rows of the file that the arm names."""
    return rows_of(make)


def outcome(low: float, high: float, bar: float = 1.0) -> Outcome:
    """The verdict on a ratio by its range over rounds."""
    return "holds" if low > bar else "does not hold" if high < bar else "cannot be told"


def faster(published: str, note: str = "") -> Any:
    """Facts: that each row is faster than its best peer."""

    def facts(view: View) -> list[Verdict]:
        return [
            Verdict(
                f"{row['level']}: faster than the best peer",
                published,
                f"{row['value']:.2f} times {row['peer']} [{row['low']:.2f}, {row['high']:.2f}]",
                outcome(row["low"], row["high"]),
                note=note,
                paper=view.study.papers,
            )
            for row in view.rows
        ]

    return facts


def benchmark_study(
    name: str, title: str, paper: str, number: int, files: tuple[str, ...], published: str, ran: str = ""
) -> Study:
    """A study of committed benchmarks; `ran` says which algorithm ran, where it is not the paper's."""

    def table(view: View) -> Table:
        body = [
            [r["level"], r["peer"], f"{r['value']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}"]
            for r in view.rows
        ]
        return Table("Times the best peer's speed", ["what", "best peer", "times", "over rounds"], body)

    return Study(
        name,
        title,
        paper,
        StudyOptions,
        {file: Arm(file, once=True) for file in files},
        lambda options: ({"arm": file, "level": file, "seed": 0} for file in files),
        measure,
        papers=(number,),
        varies=("seeds",),
        data=lambda options, case: [rows_of(file) for file in files],
        facts=faster(published, ran),
        tables=[table],
        notes=lambda options: [
            "Nothing is measured here: the rows are those of "
            + ", ".join(f"benchmarks/results/{file}.json" for file in files)
            + ". A claim is judged by the range of the ratio over the rounds of the benchmark."
        ],
    )
