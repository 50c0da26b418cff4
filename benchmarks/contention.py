"""Sparse layers, and tokens of sparse language models, on all threads while other processes keep cores busy,
against the dense ones.

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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import DynamicCache

import zoo
from zoo.shared import ops
from zoo.shared.ops.modules import SparseLinear
from zoo.shared.store.io import write_json

LAYERS, SIDE, KEPT = 24, 768, 0.3
MODELS = ("wanda-50-stories", "chess-50-stories", "gqsa-w4s50-stories")
CONTEXT = 40


def chain() -> tuple[Callable[[], object], Callable[[], object]]:
    """One row of x through sparse layers, and through dense ones."""
    dense = [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
    weights = [ops.pack(layer.weight, torch.rand(SIDE, SIDE) < KEPT) for layer in dense]
    row = torch.randn(1, SIDE)
    sparse = torch.nn.Sequential(*(SparseLinear(weight).requires_grad_(False) for weight in weights))

    def run() -> None:
        with ops.backend("native"):
            sparse(row)

    plain = torch.nn.Sequential(*dense)
    return run, lambda: plain(row)


def token(name: str, execution: str) -> Callable[[], object]:
    """A token after a context, again and again."""
    model = zoo.load(f"llm/{name}", execution=execution)
    ids, cache = torch.randint(0, 100, (1, CONTEXT)), DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache)

    def run() -> None:
        model(ids[:, -1:], past_key_values=cache)
        cache.crop(-1)

    return run


def cases() -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Names, what is sparse and its dense twin."""
    yield f"{LAYERS} layers of {SIDE} x {SIDE}, 70 % zeros", *chain()
    for name in MODELS:
        yield f"a token of llm/{name}", token(name, "packed"), token("dense-stories", "masked")


def mean_of(run: Callable[[], object], seconds: float) -> float:
    """Mean milliseconds of a call."""
    calls, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        run()
        calls += 1
    return 1e3 * (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy", type=int, default=1, help="processes that keep a core busy each")
    parser.add_argument("--rounds", type=int, default=8, help="turns of half a second of each kind")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    rows = []
    for name, sparse, dense in cases():
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
        try:
            times = [(mean_of(sparse, 0.5), mean_of(dense, 0.5)) for _ in range(options.rounds)]
        finally:
            for process in busy:
                process.kill()
        sparse_ms, dense_ms = zip(*times, strict=True)
        ratio = statistics.median(dense_ms) / statistics.median(sparse_ms)
        rows.append({"what": name, "sparse_ms": sparse_ms, "dense_ms": dense_ms, "ratio_of_medians": ratio})
        print(f"{name}: {ratio:.2f} times the dense one's speed", flush=True)
    found = {"busy": options.busy, "threads": torch.get_num_threads(), "rows": rows}
    if options.out:
        write_json(options.out, found)
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
