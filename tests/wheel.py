"""`python -m tests.wheel`: the README's `zoo` lines with a wheel, in an empty folder, at 80 columns.

Run by the Python of an environment into which the wheel is installed (`make test-wheel`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
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


def run(line: str, folder: Path) -> str:
    """Run a line on a terminal; what is wrong with what it did, or nothing."""
    screen, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    start = time.perf_counter()
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"ZOO_OFFLINE": "1"}
    command = [sys.executable, "-m", *shlex.split(line, comments=True)]
    done = subprocess.Popen(command, cwd=folder, env=env, stdin=end, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while part := os.read(screen, 1 << 16):
            shown += part
    os.close(screen)
    code, text = done.wait(), re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode("utf-8", "replace"))
    print(f"{time.perf_counter() - start:5.0f} s  exit {code}  {line}", flush=True)
    if code not in (0, OTHERWISE.get(line.split()[1])):
        return f"exit {code}: {text[-400:]}"
    # Sentences are folded by the terminal; tables would be torn.
    rules = [part for part in text.replace("\r", "\n").splitlines() if "───" in part]
    wide = [rule for rule in rules if len(rule) > COLUMNS]
    return f"a table of {len(wide[0])} columns" if wide else ""


def main() -> int:
    """Run all lines that can be; 0 if nothing is wrong with any."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        where = "import zoo; print(zoo.__file__)"
        found = subprocess.check_output([sys.executable, "-c", where], cwd=folder, text=True)
        if not Path(found.strip()).is_relative_to(sys.prefix):
            raise SystemExit(f"{found.strip()} is imported, not a wheel in {sys.prefix}")
        lacking = {name: f"the package {name}" for name in PACKAGES if find_spec(name) is None}
        for line in lines():
            if reason := next((why for what, why in {**NEEDS, **lacking}.items() if what in line), None):
                print(f"         left out, it needs {reason}: {line}")
            elif problem := run(line, Path(folder)):
                wrong += 1
                print(f"         WRONG: {problem}")
    print(f"{wrong} lines went wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
