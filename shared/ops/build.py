"""`python -m shared.ops.build`: build the native kernels of a source checkout in place, with CMake.

Installing the package does the same by itself; this is for working on the kernels. `--sanitize address` (or
`thread`) builds a library with that sanitizer into build/native-<sanitizer>; it prints how to run the tests
with it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(sanitize: str | None = None) -> Path:
    """Configure and compile; returns the folder that holds the libraries."""
    source = ROOT / "CMakeLists.txt"
    if not source.exists():
        sys.exit(f"{source} is missing: this is an installed package, not a source checkout")
    folder = ROOT / "build" / (f"native-{sanitize}" if sanitize else "native")
    output = folder / "lib" if sanitize else ROOT / "shared" / "ops"
    options = [f"-DZOO_OUTPUT_DIR={output}", f"-DZOO_SANITIZE={sanitize or ''}"]
    subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(folder), *options], check=True, stdout=subprocess.DEVNULL
    )
    subprocess.run(["cmake", "--build", str(folder), "--parallel", "2"], check=True)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sanitize", choices=["address", "thread"])
    print(f"built into {build(parser.parse_args().sanitize)}")


if __name__ == "__main__":
    main()
