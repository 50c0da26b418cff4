"""TEDDY on graphs of up to 60 million directed entries: time and memory grow with the edges and with nothing
else.

Each size runs in a process of its own, so that its peak memory is its own. The graphs are R-MAT (skewed
degrees, labels shuffled, so that accesses are as scattered as in a real graph); making them is not timed.
Three steps are: checking that the graph is undirected and holds each edge once, scoring, and selecting the
kept edges.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time

import torch

from zoo.graph.edges import check_undirected
from zoo.graph.teddy import edge_scores, keep_highest
from zoo.shared.bench import machine
from zoo.shared.bench.processes import in_own_process
from zoo.shared.bench.random_graphs import rmat
from zoo.shared.store.io import write_json

# (nodes, directed entries), each four times the last but one; the largest is the one that is promised.
SIZES = ((125_000, 3_750_000), (500_000, 15_000_000), (2_000_000, 60_000_000))
QUICK = ((10_000, 300_000), (40_000, 1_200_000))
SPARSITY = 0.3
LIMIT_SECONDS, LIMIT_GIB = 60.0, 8.0


def measure(nodes: int, entries: int) -> dict[str, float]:
    """Score and prune one graph; seconds of each step and the process's peak memory in GiB."""
    edge_index = rmat(nodes, entries, undirected=True)
    seconds = {}
    processor = time.process_time()
    start = time.perf_counter()
    check_undirected(edge_index, nodes)
    seconds["check"] = time.perf_counter() - start
    start = time.perf_counter()
    scores = edge_scores(edge_index, nodes)
    seconds["score"] = time.perf_counter() - start
    start = time.perf_counter()
    keep = keep_highest(scores, edge_index, nodes, SPARSITY)
    seconds["select"] = time.perf_counter() - start
    processor = time.process_time() - processor  # what other programs on the machine disturb least
    dropped = int(entries * SPARSITY)
    if entries - int(keep.sum()) != dropped - dropped % 2:
        raise SystemExit(f"{entries - int(keep.sum())} entries dropped instead of {dropped - dropped % 2}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    return {
        "nodes": nodes,
        "entries": entries,
        **seconds,
        "total": sum(seconds.values()),
        "processor": processor,
        "peak_gib": peak,
    }


def main() -> int:
    """Print a row per size and the growth; exit 1 if a limit or linearity is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small graphs only")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write the figures as JSON (or print them)"
    )
    parser.add_argument("--measure", type=int, nargs=2, metavar=("NODES", "ENTRIES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(*options.measure)))
        return 0
    print(
        f"TEDDY at sparsity {SPARSITY}, {options.threads} threads; seconds, and peak memory with the graph "
        f"itself"
    )
    print(
        f"{'nodes':>10} {'entries':>11} {'check':>7} {'score':>7} {'select':>7} {'total':>7} {'cpu':>7} "
        f"{'ns/entry':>9} {'GiB':>6}"
    )
    rows = []
    for nodes, entries in QUICK if options.quick else SIZES:
        row = in_own_process(__file__, ["--measure", nodes, entries], options.threads)
        rows.append(row)
        print(
            f"{nodes:>10,} {entries:>11,} {row['check']:>7.2f} {row['score']:>7.2f} {row['select']:>7.2f} "
            f"{row['total']:>7.2f} {row['processor']:>7.2f} {1e9 * row['processor'] / entries:>9.0f} "
            f"{row['peak_gib']:>6.2f}",
            flush=True,
        )
    slope = math.log(rows[-1]["processor"] / rows[0]["processor"]) / math.log(
        rows[-1]["entries"] / rows[0]["entries"]
    )
    # Processor time bounds the elapsed time of an idle machine from above; that of a busy one says nothing.
    within = rows[-1]["processor"] < LIMIT_SECONDS and rows[-1]["peak_gib"] < LIMIT_GIB
    print(
        f"Processor time grows as entries^{slope:.2f}; scattered access to a table that outgrows the caches "
        f"costs the rest."
    )
    print(f"Limits of {LIMIT_SECONDS:.0f} s and {LIMIT_GIB:.0f} GiB: {'met' if within else 'MISSED'}")
    if options.json is not None:
        figures = {
            "benchmark": "teddy_scale",
            "machine": machine(),
            "threads": options.threads,
            "sparsity": SPARSITY,
            "rows": rows,
            "slope": slope,
            "met": within,
        }
        if options.json:
            write_json(options.json, figures)
        else:
            print(json.dumps(figures))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
