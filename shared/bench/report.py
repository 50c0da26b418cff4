"""`python -m zoo.shared.bench.report FILES`: the JSON results of benchmark scripts as Markdown tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..store.io import read_json
from .runner import heading, verdict


def markdown(results: Mapping[str, Any]) -> str:
    """One benchmark run: its heading, the machine, a row per cell, the goals.

    Args:
        results: what a script wrote with --json.
    """
    limits, machine = results["limits"], results["machine"]
    groups = [group["met"] for group in results["groups"].values()]
    text = [f"## {heading(results['subject'], results['rows'], groups)}", ""]
    text.append(
        f"{machine['cpu']}, {results['threads']} thread(s), torch {machine['torch']}; measured "
        f"{limits['bytes_per_second'] / 1e9:.1f} GB/s and {limits['flops_per_second'] / 1e9:.0f} GFLOP/s"
        + ("; other programs ran meanwhile" if results["under_load"] else "")
        + ("; not all cells were measured" if results["left"] else "")
        + "."
    )
    labels = list(dict.fromkeys(key for row in results["rows"] for key in row["labels"]))
    head = [*labels, "ours ms", "best peer", "its ms", "ratio", "bound ms", "of bound", "goal"]
    text += ["", _line(head), _line(["---"] * len(head))]
    for row in results["rows"]:
        goal, bound = row.get("goal"), row.get("bound")
        over = goal["over"] if goal else row["best_peer"]
        reached = goal["reached"] if goal else row["ratio"]["value"]
        text.append(
            _line(
                [
                    *(str(row["labels"].get(key, "")) for key in labels),
                    f"{1e3 * row['seconds']['ours']['median']:.3f}",
                    over,
                    f"{1e3 * row['seconds'][over]['median']:.3f}",
                    f"{reached:.2f}x",
                    f"{1e3 * bound['seconds']:.3f}" if bound else "",
                    f"{bound['share']:.0%}" if bound else "",
                    verdict(goal),
                ]
            )
        )
    if results["groups"]:
        text += ["", _line(["geometric mean over", "ratio", "goal"]), _line(["---"] * 3)]
        for name, group in results["groups"].items():
            goal = {"ratio": group["goal"], "met": group["met"]}
            text.append(_line([name, f"{group['ratio']:.2f}x", verdict(goal)]))
    return "\n".join([*text, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(files: Sequence[Path]) -> str:
    """The tables of some files below a line that tells how to make them again."""
    command = f"python -m zoo.shared.bench.report {' '.join(file.as_posix() for file in files)}"
    tables = [markdown(read_json(file)) for file in files]
    return "\n".join(["# Results of the benchmark scripts", "", f"Made by `{command}`.", "", *tables])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of all files that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="what scripts of benchmarks/ wrote with --json")
    print(page(parser.parse_args(argv).files))


if __name__ == "__main__":
    main()
