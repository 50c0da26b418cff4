"""`python -m shared.ops.build`: build the native kernels of a source checkout in place, with CMake.

Installing the package does the same by itself; this is for working on the kernels. `--sanitize address` (or
`thread`) builds a library with that sanitizer into build/native-<sanitizer>; it prints how to run the tests
with it.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from shared.ops._native import FOLDER, LEVELS

ROOT = Path(__file__).parents[2]


def build(sanitize: str | None = None, level: str | None = None) -> Path:
    """Configure and compile (all instruction sets by default); returns the folder that holds the
    libraries."""
    source = ROOT / "CMakeLists.txt"
    if not source.exists():
        sys.exit(f"{source} is missing: this is an installed package, not a source checkout")
    folder = ROOT / "build" / (f"native-{sanitize}" if sanitize else "native")
    output = folder / "lib"
    options = [f"-DZOO_OUTPUT_DIR={output}", f"-DZOO_SANITIZE={sanitize or ''}"]
    subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(folder), *options], check=True, stdout=subprocess.DEVNULL
    )
    targets = [f"_zoo_native_{name}" for name in (LEVELS if level is None else {"portable", level})]
    available = [name for name in targets if platform.machine() in ("x86_64", "AMD64") or "portable" in name]
    command = ["cmake", "--build", str(folder), "--parallel", "2", "--target", *available]
    subprocess.run(command, check=True)
    if sanitize:
        return output
    # Put in place by renaming: a running process keeps the library that it has mapped.
    for library in (path for name in available for path in output.glob(f"{name}.*")):
        path = FOLDER / library.name
        fresh = path.with_name(path.name + ".new")
        shutil.copy2(library, fresh)
        fresh.replace(path)
    return FOLDER


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sanitize", choices=["address", "thread"])
    parser.add_argument("--level", choices=LEVELS, help="build this instruction set only")
    options = parser.parse_args()
    folder = build(options.sanitize, options.level)
    print(f"built into {folder}")
    if options.sanitize:
        runtime = {"address": "libasan.so", "thread": "libtsan.so"}[options.sanitize]
        # torch's own runtime leaks by design, and OpenMP's barriers are unknown to the thread sanitizer,
        # which therefore needs the kernels' own threads (ZOO_OWN_THREADS).
        print(
            f"run the tests on it: LD_PRELOAD=$(gcc -print-file-name={runtime}) ASAN_OPTIONS=detect_leaks=0 "
            f"ZOO_OWN_THREADS=1 ZOO_NATIVE_DIR={folder} python -m pytest tests/ops"
        )


if __name__ == "__main__":
    main()
