"""The native library: found, shared threads, refusals, and life without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.shared.ops import _native

ROOT = Path(__file__).parents[3]
needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [0, 1, 7, 1000])
def test_team_covers_each_item_once(items: int, threads: int) -> None:
    counts = torch.zeros(items + 1, dtype=torch.int64)
    _native.function("zoo_selftest_threads", "pii")(counts.data_ptr(), items, threads)
    assert counts[:items].eq(1).all() and counts[items] == 0


@needs_native
def test_own_threads_serve_where_openmp_is_absent() -> None:
    code = (
        "import ctypes, torch\n"
        "from zoo.shared.ops import _native\n"
        "library, _ = _native._load()\n"
        "library.zoo_set_openmp(None, None, None)\n"
        "counts = torch.zeros(1000, dtype=torch.int64)\n"
        "for round in range(200):\n"
        "    _native.function('zoo_selftest_threads', 'pii')(counts.data_ptr(), 1000, 1 + round % 4)\n"
        "assert counts.eq(200).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@needs_native
def test_unknown_instruction_set_is_refused() -> None:
    code = "from zoo.shared.ops import _native; print(_native.missing())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "ZOO_ISA": "mmx"},
    )
    assert "ZOO_ISA='mmx'" in done.stdout
    assert done.stderr.count("native kernels are off") == 1


@needs_native
def test_function_that_the_library_lacks_is_named() -> None:
    with pytest.raises(_native.NativeMissing, match="zoo_no_such_function"):
        _native.function("zoo_no_such_function", "p")
