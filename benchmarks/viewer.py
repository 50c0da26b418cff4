"""How near a browser's photograph of the viewer page is to this zoo's rendering of the same scene.

Usage: python benchmarks/viewer.py [--out FOLDER]   # needs chromium; files of ZOO_DATA where it is set
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from PIL import Image

from zoo.neural3d.cameras import orbit
from zoo.neural3d.exports import scene_of
from zoo.neural3d.importance import middle_of
from zoo.neural3d.metrics import psnr
from zoo.neural3d.sparsify import save_rows
from zoo.neural3d.viewer import FIELD, write_viewer
from zoo.shared.store.io import write_json

SIZE, GOAL = 400, 40.0  # pixels, dB
SCENES = {
    "shapes": "neural3d/dense-gaussians-shapes",
    "plant": "splat-captures/plant.splat",
    "biker": "splat-playcanvas/biker.spz",
    "playbot": "splat-playcanvas/playbot-lod3/meta.json",
}


def photograph(page: Path, place: str) -> torch.Tensor:
    """What chromium shows of a page, drawn in software: [SIZE, SIZE, 3]."""
    software = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    picture = page.with_suffix(".png")
    subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", *software, "--hide-scrollbars"]
        + [f"--window-size={SIZE},{SIZE}", "--virtual-time-budget=30000", f"--screenshot={picture}"]
        + [f"--user-data-dir={page.parent / 'profile'}", f"file://{page}#bare&{place}"],
        check=True,
        capture_output=True,
    )
    return torch.from_numpy(numpy.array(Image.open(picture).convert("RGB")) / 255).float()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/neural3d"))
    options = parser.parse_args()
    if shutil.which("chromium") is None:
        raise SystemExit("needs chromium")
    found, columns = {}, []
    for name, source in SCENES.items():
        if "/" in source and not source.startswith("neural3d/"):
            if "ZOO_DATA" not in os.environ:
                continue
            source = f"{os.environ['ZOO_DATA']}/{source}"
        scene = scene_of(source)
        centre, reach = middle_of(scene.splats)
        camera = orbit(
            centre, 2.6 * reach, 1, (SIZE, SIZE), field_of_view=FIELD, elevations=(0.35,), start=0.4
        )[0]
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            page = Path(folder) / "page.html"
            size = write_viewer(page, scene, name)
            seen, own = photograph(page, "azimuth=0.4&elevation=0.35"), scene(camera).clamp(0, 1)
        found[name] = {"gaussians": len(scene), "bytes": size, "psnr": psnr(seen, own)}
        columns.append((seen, own))
        print(f"{name}: {len(scene):,} Gaussians, {size / 1e6:.2f} MB, {found[name]['psnr']:.1f} dB")
    version = subprocess.run(["chromium", "--version"], capture_output=True, text=True).stdout.strip()
    write_json(options.out / "viewer.json", {"browser": version, "scenes": found})
    save_rows(options.out / "viewer-chromium-above-ours-below.png", list(zip(*columns, strict=True)))
    return min(one["psnr"] for one in found.values()) < GOAL


if __name__ == "__main__":
    sys.exit(main())
