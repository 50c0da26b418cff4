"""DSVT's backbone on up to 200,000 voxels: memory grows with the voxels and with nothing else.

Each size runs in a process of its own; what counts is the peak of the process above what it held with the
model and the voxels before the first forward pass.
"""

from __future__ import annotations

import argparse
import json
import math
import sys

import torch

from zoo.shared.bench import machine
from zoo.shared.bench.processes import in_own_process, peak_of
from zoo.shared.store.io import write_json
from zoo.vision.lidar.dsvt import DSVT, DSVTConfig

SIZES, QUICK = (25_000, 50_000, 100_000, 200_000), (10_000, 40_000)
SIDE, WIDTH = 900, 64  # voxels of the grid along x and y, so that 200,000 fill a quarter
MOST = 1.1  # the exponent of growth that counts as linear


def measure(count: int) -> dict[str, float]:
    """One forward pass: seconds and bytes above those held before."""
    torch.manual_seed(0)
    config = DSVTConfig(
        (SIDE, SIDE, 1),
        ((12, 12, 1),),
        ((36, 4),),
        (WIDTH,),
        (8,),
        (2 * WIDTH,),
        shifts_list=(((0, 0, 0), (6, 6, 0)),),
    )
    model = DSVT(config).eval()
    cells = torch.randperm(SIDE * SIDE)[:count]
    zero = torch.zeros_like(cells)
    coords, x = torch.stack([zero, zero, cells // SIDE, cells % SIDE], 1), torch.randn(count, WIDTH)
    with torch.no_grad():
        model(x[:100], coords[:100], 1)  # libraries allocate their own buffers once
        return {"voxels": count, **peak_of(lambda: model(x, coords, 1))}


def main() -> int:
    """Print a row per size and the growth; exit 1 if it is not linear."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--measure", type=int, metavar="VOXELS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.measure)))
        return 0
    rows = []
    print(f"{'voxels':>9} {'seconds':>8} {'MiB':>7} {'KiB/voxel':>10}")
    for count in QUICK if options.quick else SIZES:
        row = in_own_process(__file__, ["--measure", count], options.threads)
        rows.append(row)
        print(
            f"{count:>9,} {row['seconds']:>8.2f} {row['bytes'] / 2**20:>7.0f} "
            f"{row['bytes'] / 2**10 / count:>10.2f}",
            flush=True,
        )
    first, last = rows[0], rows[-1]
    slope = math.log(last["bytes"] / first["bytes"]) / math.log(last["voxels"] / first["voxels"])
    met = slope <= MOST
    print(f"Memory grows as voxels^{slope:.2f}; linear (at most {MOST:g}): {'met' if met else 'MISSED'}")
    if options.json:
        write_json(
            options.json,
            {
                "benchmark": "dsvt_memory",
                "machine": machine(),
                "threads": options.threads,
                "width": WIDTH,
                "rows": rows,
                "slope": slope,
                "met": met,
            },
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
