"""What it costs that each call looks at the weight: the same calls here and in an older checkout, in turns.

    git worktree add /tmp/before COMMIT && (cd /tmp/before && python -m zoo.shared.ops.build)
    python benchmarks/call_memory.py --against /tmp/before --out benchmarks/results/call_memory.json

Each turn is a process of its own; a line shows the least CPU times, their ratio, and the ratios of the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def calls() -> dict[str, Callable[[], object]]:
    """Calls of each kind: small ones, which Python's share decides, and large ones, which memory does."""
    import torch

    from zoo.shared import ops
    from zoo.shared.ops.modules import SparseConv1x1, SparseLinear
    from zoo.shared.ops.sparse_conv import subm_conv
    from zoo.shared.ops.sparse_tensor import SparseConvTensor
    from zoo.shared.ops.spmm import spmm

    torch.manual_seed(0)
    found: dict[str, Callable[[], object]] = {}

    def add(name: str, module: torch.nn.Module, *size: int) -> None:
        x = torch.randn(*size)
        module.requires_grad_(False)
        found[name] = lambda: module(x)

    for side, kept in ((64, 0.1), (64, 0.5), (256, 0.5), (1024, 0.1), (1024, 0.5)):
        weight = ops.pack(torch.randn(side, side), torch.rand(side, side) < kept)
        for rows in (1, 8, 64):
            add(f"linear {side}, {kept:.0%} kept, {rows} rows", SparseLinear(weight), rows, side)
    pointwise = ops.pack(torch.randn(256, 256), torch.rand(256, 256) < 0.2)
    add("1x1 convolution 256, 20% kept, 14 x 14", SparseConv1x1(pointwise), 1, 256, 14, 14)
    groups = ops.quantise_groups(torch.randn(1024, 1024), torch.rand(1024, 64) < 0.5)
    for rows in (1, 64):
        x = torch.randn(rows, 1024)
        found[f"four-bit groups 1024, {rows} rows"] = lambda x=x: ops.quant_sparse_linear(x, groups)
    col = torch.randint(0, 2708, (13264,), dtype=torch.int32)
    crow = torch.linspace(0, 13264, 2709).int()
    for features in (16, 64):
        x = torch.randn(2708, features)
        found[f"spmm 2708 nodes, 13264 edges, {features} features"] = lambda x=x: spmm(crow, col, x)
    sites = (torch.rand(1, 40, 40) < 0.1).nonzero().int()
    grid, kernel = (
        SparseConvTensor(torch.randn(len(sites), 16), sites, (40, 40), 1),
        torch.randn(16, 3, 3, 16),
    )
    found["submanifold convolution 160 sites, 16 channels"] = lambda: subm_conv(grid, kernel)
    return found


def measure(seconds: float) -> dict[str, float]:
    """Seconds of CPU per call, the least of short blocks."""
    import torch

    torch.set_num_threads(1)
    times = {}
    with torch.no_grad():
        for name, call in calls().items():
            call(), call(), call()
            blocks = []
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                start = time.process_time()
                for _ in range(10):
                    call()
                blocks.append((time.process_time() - start) / 10)
            times[name] = min(blocks)
    return times


def run(checkout: Path, seconds: float) -> dict[str, float]:
    """The times of another checkout, measured there by this file."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Inplace' not in type(f).__name__]; "
        f"sys.path.insert(0, {str(checkout)!r}); sys.path.insert(1, {str(ROOT / 'benchmarks')!r}); "
        f"import json, call_memory; print(json.dumps(call_memory.measure({seconds})))"
    )
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--against", type=Path, required=True, help="folder of the older checkout, with its kernels"
    )
    parser.add_argument("--turns", type=int, default=5, help="processes of each checkout")
    parser.add_argument("--seconds", type=float, default=0.1, help="time for each call in each turn")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    turns = [
        (run(options.against, options.seconds), run(ROOT, options.seconds)) for _ in range(options.turns)
    ]
    rows = []
    for name in turns[0][0]:
        ratios = [new[name] / old[name] for old, new in turns]
        before, after = (min(turn[side][name] for turn in turns) for side in (0, 1))
        row = {"call": name, "before_us": before * 1e6, "now_us": after * 1e6, "ratio": after / before}
        rows.append({**row, "least": min(ratios), "most": max(ratios)})
        print(
            f"{name:50} {before * 1e6:9.1f} {after * 1e6:9.1f} us {row['ratio']:6.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if options.out:
        options.out.write_text(
            json.dumps({"turns": options.turns, "threads": 1, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
