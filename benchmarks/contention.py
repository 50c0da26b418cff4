"""A chain of sparse layers on all threads while other processes keep cores busy, against dense layers.

    python benchmarks/contention.py --busy 1 --out benchmarks/results/contention.json

With ZOO_NATIVE_DIR another build of the kernels is measured. A thread that does not run holds its team up:
what is measured is waiting, of which the means tell and the least times do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from zoo.shared import ops
from zoo.shared.ops.modules import SparseLinear

LAYERS, SIDE, KEPT = 24, 768, 0.3


def mean_of(layers: list[torch.nn.Module], seconds: float) -> float:
    """Mean milliseconds of one row of x through all layers."""
    row, calls, start = torch.randn(1, SIDE), 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        x = row
        for layer in layers:
            x = layer(x)
        calls += 1
    return 1e3 * (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy", type=int, default=1, help="processes that keep a core busy each")
    parser.add_argument("--rounds", type=int, default=8, help="turns of half a second of each kind of layer")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    dense: list[torch.nn.Module] = [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
    sparse: list[torch.nn.Module] = [
        SparseLinear(ops.pack(layer.weight, torch.rand(SIDE, SIDE) < KEPT)).requires_grad_(False)
        for layer in dense
        if isinstance(layer, torch.nn.Linear)
    ]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
    try:
        with ops.backend("native"):
            times = [(mean_of(sparse, 0.5), mean_of(dense, 0.5)) for _ in range(options.rounds)]
    finally:
        for process in busy:
            process.kill()
    sparse_ms, dense_ms = zip(*times, strict=True)
    found = {
        "busy": options.busy,
        "threads": torch.get_num_threads(),
        "sparse_ms": sparse_ms,
        "dense_ms": dense_ms,
        "ratio_of_medians": statistics.median(dense_ms) / statistics.median(sparse_ms),
    }
    print(json.dumps(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
