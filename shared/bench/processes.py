"""A measurement in a process of its own, whose peak of memory is its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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


def peak_of(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of this process that a call takes, and the bytes of its peak above those held before (Linux).

    The peak is the process's, so that what it did before must have needed less.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before, start = pages * resource.getpagesize(), time.process_time()
    call()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return {"seconds": seconds, "bytes": float(peak - before)}
