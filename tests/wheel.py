"""`python -m tests.wheel SITE`: the README's `zoo` lines with a wheel, in an empty folder, at 80 columns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
COLUMNS = 80
# What a line needs that an empty folder without a network does not have.
NEEDS = {
    "hf://": "a hub",
    "photos": "the reader's pictures",
    "mine.npz": "the reader's pictures",
    "sparsify mine": "the reader's pictures",
    "--calibrate": "minutes, and writes into the cache of this machine",
    "pretrain": "many minutes",
    "--report": "many minutes",
}
# Exit codes that are not 0 and right: evidence and results lie in the repository, not in a wheel.
PACKAGES = ("onnx", "gguf")
OTHERWISE = {"verify": 3, "reproduce": 2}


def lines() -> list[str]:
    """The `zoo` lines of the README's shell blocks, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    words = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in words if line.startswith("zoo ")]


def run(line: str, site: Path, folder: Path) -> str:
    """Run a line; what is wrong with what it did, or nothing."""
    env = os.environ | {"COLUMNS": str(COLUMNS), "PYTHONPATH": str(site), "ZOO_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        f"{sys.executable} -m {line}", shell=True, cwd=folder, env=env, capture_output=True, text=True
    )
    wide = [text for text in (done.stdout + done.stderr).splitlines() if len(text) > COLUMNS]
    print(f"{time.perf_counter() - start:5.0f} s  exit {done.returncode}  {line}", flush=True)
    if done.returncode not in (0, OTHERWISE.get(line.split()[1])):
        return f"exit {done.returncode}: {(done.stderr or done.stdout)[-400:]}"
    if wide and "--json" not in line:
        return f"{len(wide)} lines are wider than {COLUMNS} columns: {wide[0]}"
    return ""


def main(site: Path) -> int:
    """Run all lines that can be; 0 if nothing is wrong with any."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        where = "import zoo; print(zoo.__file__)"
        env = os.environ | {"PYTHONPATH": str(site)}
        found = subprocess.check_output([sys.executable, "-c", where], cwd=folder, env=env, text=True)
        if not Path(found.strip()).is_relative_to(site):
            raise SystemExit(f"{found.strip()} is imported, not the wheel in {site}")
        lacking = {name: f"the package {name}" for name in PACKAGES if find_spec(name) is None}
        for line in lines():
            if reason := next((why for what, why in {**NEEDS, **lacking}.items() if what in line), None):
                print(f"         left out, it needs {reason}: {line}")
            elif problem := run(line, site, Path(folder)):
                wrong += 1
                print(f"         WRONG: {problem}")
    print(f"{wrong} lines went wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
