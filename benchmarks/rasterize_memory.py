"""zoo::rasterize of up to a million Gaussians at 800 x 800: memory of drawing, and of drawing with gradients.

Each size runs in a process of its own; what counts is the peak of the process above what it held with the
scene. The cube of Gaussians is the same at each size, of more and finer ones.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from rasterize import random_scene

from zoo.neural3d.cameras import Camera, lens
from zoo.shared.bench import machine
from zoo.shared.bench.processes import in_own_process, peak_of
from zoo.shared.store.io import write_json

SIZES, QUICK, PIXELS = (250_000, 500_000, 1_000_000), (20_000,), 800
MOST = 1 << 30  # bytes that a million Gaussians and their gradients may take


def measure(count: int, backward: bool) -> dict[str, float]:
    """One picture of a scene, and the gradients of its parameters if wanted."""
    scene = random_scene(count)
    with torch.no_grad():
        scene.scales.add_(torch.tensor(3000 / count).log() / 3)
    camera = Camera(torch.eye(4), lens(PIXELS, PIXELS, 0.8), PIXELS, PIXELS)

    def call() -> None:
        with torch.set_grad_enabled(backward):
            colour = scene(camera)
            if backward:
                colour.sum().backward()

    return {"gaussians": count, "backward": backward, **peak_of(call)}


def main() -> int:
    """Print a row per size; exit 1 if the largest takes more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small size only")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--measure", type=int, metavar="GAUSSIANS", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.measure, options.backward)))
        return 0
    rows = []
    print(f"{'gaussians':>10} {'gradients':>9} {'seconds':>8} {'MiB':>7} {'bytes/gaussian':>14}")
    for count in QUICK if options.quick else SIZES:
        for extra in ([], ["--backward"]):
            row = in_own_process(__file__, ["--measure", count, *extra], options.threads)
            rows.append(row)
            print(
                f"{count:>10,} {'yes' if extra else 'no':>9} {row['seconds']:>8.2f} "
                f"{row['bytes'] / 2**20:>7.0f} {row['bytes'] / count:>14.0f}",
                flush=True,
            )
    met = rows[-1]["bytes"] <= MOST
    print(f"The largest within {MOST >> 30} GiB: {'met' if met else 'MISSED'}")
    if options.json:
        report = {"benchmark": "rasterize_memory", "machine": machine(), "threads": options.threads}
        write_json(options.json, {**report, "pixels": PIXELS, "rows": rows, "met": met})
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
