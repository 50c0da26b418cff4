"""LAPTOP-Diff's choice by a measured table of latencies beside its choice by parameters.

Both remove whole layers of the text-to-image denoiser with the least sum of output losses, until a share of
its time, or of its parameters, is gone. A row of a parameter budget is compared with the fastest choice by
latency whose output is no farther from the dense network's; losses are measured on 64 noisy images, the time
of a call on one image or more (`--images`), interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zoo.bundles.store import load
from zoo.diffusion.domain import make_job
from zoo.diffusion.methods.laptop import Laptop, output_loss, removable_layers
from zoo.diffusion.plan import Plan
from zoo.diffusion.prompting import noisy_images, outputs_on
from zoo.shared.bench import machine
from zoo.shared.store.io import write_json

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
GOAL = 1.15  # times the parameter budget's speed at no more drift


def interleaved(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median milliseconds of each call, taken in turns."""
    seen: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, seen, strict=True):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in seen]


def measure(name: str, images: int, rounds: int) -> list[dict[str, Any]]:
    """A row for every budget and share."""
    model: Any = load(name)
    job = make_job(name.rpartition("-")[2], model=model)
    removable = removable_layers(model.unet)
    costs = Laptop(images=64).costs(model, removable, job)
    inputs = noisy_images(model, job, 64)
    some = [values[:images] for values in inputs]
    rows: list[dict[str, Any]] = []
    calls: list[Callable[[], object]] = [lambda: model(*some)]
    for budget in ("parameters", "latency"):
        method = Laptop(budget=budget, timed=images, allow_unconditional=True)
        freed, total = method.freed(model, removable, job)
        for share in SHARES:
            if share * total > sum(freed):
                continue
            method.remove = share
            dropped = [layer.name for layer in method.choose(removable, costs, freed, total)]
            drift = output_loss(model.unet, dropped, lambda: outputs_on(model, inputs))
            rows.append({"budget": budget, "share": share, "dropped": dropped, "drift": drift})
            cut: Any = load(name)
            cut.cut(Plan(dropped=tuple(dropped)))
            calls.append(lambda cut=cut: cut(*some))  # type: ignore[misc]
    dense, *times = interleaved(calls, rounds)
    return [row | {"ms": ms, "dense_ms": dense} for row, ms in zip(rows, times, strict=True)]


def main() -> int:
    """Print a row per parameter budget; exit 1 if the median of the ratios misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--model", default="diffusion/dense-t2i-digits", help="a text-to-image model")
    parser.add_argument("--images", type=int, default=1, help="in a call that is timed")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        rows = measure(options.model, options.images, 5 if options.quick else 41)
    ratios = []
    print(f"{'parameters':>10} {'drift':>8} {'ms':>7} {'by latency: drift':>17} {'ms':>7} {'times':>6}")
    timed = [row for row in rows if row["budget"] == "latency"]
    for row in rows:
        near = [one for one in timed if one["drift"] <= row["drift"]]
        if row["budget"] != "parameters" or not near:
            continue
        best = min(near, key=lambda one: one["ms"])
        ratios.append(row["ms"] / best["ms"])
        print(
            f"{row['share']:>10.0%} {row['drift']:>8.4f} {row['ms']:>7.2f} {best['drift']:>17.4f} "
            f"{best['ms']:>7.2f} {ratios[-1]:>5.2f}x"
        )
    middle = statistics.median(ratios) if ratios else float("nan")
    met = middle >= GOAL
    print(f"Median {middle:.2f}x at no more drift; goal {GOAL}x: {'met' if met else 'MISSED'}")
    if options.json:
        report = {"benchmark": "diffusion_latency", "machine": machine(), "threads": options.threads}
        report |= {"model": options.model, "images": options.images}
        write_json(options.json, {**report, "rows": rows, "ratios": ratios, "median": middle, "met": met})
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
