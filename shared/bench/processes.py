"""A measurement in a process of its own, whose peak of memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def in_own_process(script: str | Path, arguments: Sequence[object], threads: int) -> dict[str, float]:
    """Run a script of `benchmarks/` in a fresh interpreter and read the JSON that it prints.

    Args:
        script: the file; the folder above its own is put on the module path.
        arguments: of its command line; `--threads` is added.
        threads: processor threads, for OpenMP too.

    Raises:
        subprocess.CalledProcessError: the script failed.
    """
    command = [sys.executable, str(script), *map(str, arguments), "--threads", str(threads)]
    path = [str(Path(script).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found
