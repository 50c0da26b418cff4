"""`python -m zoo.shared.ops.build`: build the native kernels of a source checkout in place, with CMake.

Installing a wheel or `make setup` does the same; this is for working on the kernels. `--sanitize address` (or
`thread`) builds a library with that sanitizer into build/native-<sanitizer>; `--test` then runs the tests of
the ops on it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ._native import FOLDER

ROOT = Path(__file__).resolve().parents[2]  # not through the link zoo/shared


def build(sanitize: str | None = None, levels: str = "host") -> Path:
    """Configure and compile the kernels; returns the folder that holds the libraries.

    Args:
        sanitize: "address" or "thread".
        levels: "host" for the best instruction set of this machine, "all" for every one.
    """
    source = ROOT / "CMakeLists.txt"
    if not source.exists():
        sys.exit(f"{source} is missing: this is an installed package, not a source checkout")
    folder = ROOT / "build" / (f"native-{sanitize}" if sanitize else "native")
    output = folder / "lib"
    options = [f"-DZOO_OUTPUT_DIR={output}", f"-DZOO_SANITIZE={sanitize or ''}", f"-DZOO_LEVELS={levels}"]
    subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(folder), *options], check=True, stdout=subprocess.DEVNULL
    )
    subprocess.run(["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], check=True)
    if sanitize:
        return output
    # Put in place by renaming: a running process keeps the library that it has mapped.
    for library in output.glob("_zoo_native_*"):
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
    parser.add_argument("--levels", choices=["host", "all"], default="host", help="instruction sets to build")
    parser.add_argument(
        "--test", dest="tests", nargs="*", metavar="PATH", help="run tests (all of the ops) on it"
    )
    options = parser.parse_args()
    if options.tests is not None and not options.sanitize:
        parser.error("--test runs the tests under a sanitizer: name one with --sanitize")
    folder = build(options.sanitize, options.levels)
    print(f"built into {folder}")
    if not options.sanitize:
        return
    environment = under_sanitizer(options.sanitize, folder)
    # Compiled models are left out: their code comes from a compiler that the sanitizer does not know.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not traced",
        *(options.tests or ["tests/shared/ops"]),
    ]
    if options.tests is None:
        settings = " ".join(f"{name}='{value}'" for name, value in environment.items())
        print(f"run the tests on it: {settings} {' '.join(command)}")
        return
    sys.exit(subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode)


def under_sanitizer(sanitize: str, folder: Path) -> dict[str, str]:
    """The variables with which a Python process runs the library in `folder`, built with that sanitizer."""
    # With the C++ library beside it: the address sanitizer looks up __cxa_throw when the process starts, and
    # Python itself does not load that library.
    runtimes = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so",)}[sanitize]
    found = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in runtimes
    ]
    return {
        "LD_PRELOAD": " ".join(found),
        "ZOO_NATIVE_DIR": str(folder),
        # Python and torch keep much until they end; a test asks for more memory than there is.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        # The kernels get threads of their own: OpenMP's barriers are unknown to the thread sanitizer. What
        # torch does inside is not compiled for it either, and looks like a race to it.
        "ZOO_OWN_THREADS": "1",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=0 exitcode=66",
    }


if __name__ == "__main__":
    main()
