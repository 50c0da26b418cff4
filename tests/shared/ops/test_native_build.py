"""The native library: found, shared threads, refusals, and life without it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
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


def test_calls_pass_the_arguments_that_the_kernels_take() -> None:
    """ctypes takes arguments beyond a signature, as 32-bit numbers whose other half is left to chance."""
    sources = "".join(path.read_text("utf-8") for path in sorted((ROOT / "native" / "src").glob("*.cpp")))
    kinds = {"*": "p", "double": "d", "int64_t": "i"}
    declared = {
        name: "".join(next(k for mark, k in kinds.items() if mark in each) for each in taken.split(","))
        for name, taken in re.findall(r"ZOO_EXPORT int64_t (zoo_\w+)\(([^)]+)\)", sources)
    }
    code = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "shared").rglob("*.py")))
    called = re.findall(r'_native\.(?:function|value)\(\s*"(zoo_\w+)",\s*([pid"*+\s\d]+?),?\s*\)', code)
    assert len(called) > 40
    part = re.compile(r'"([pid]+)"(?: \* (\d+))?')  # "p" * 13 + "i"
    passed = {
        name: "".join(kind * int(times or 1) for kind, times in part.findall(signature))
        for name, signature in called
    }
    assert passed == {name: declared[name] for name, _ in called}


@needs_native
def test_function_that_the_library_lacks_is_named() -> None:
    with pytest.raises(_native.NativeMissing, match="zoo_no_such_function"):
        _native.function("zoo_no_such_function", "p")


@needs_native
def test_a_thread_that_does_not_run_is_not_waited_for_again_and_again(tmp_path: Path) -> None:
    """A library of its own gets a team whose second thread comes 30 ms late: the next regions go without it,
    for 32 times as long."""
    path = shutil.copy2(_native._path(_native.isa()), tmp_path)
    library, thread, late, teams = ctypes.CDLL(str(path)), [0], [0.03], []

    def parallel(task: Callable[[int], None], data: int, threads: int, flags: int) -> None:
        teams.append(threads)
        for thread[0] in range(threads):
            time.sleep(late[0] if thread[0] else 0)
            task(data)

    task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    whole = ctypes.CFUNCTYPE(None, task, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(parallel)
    number = ctypes.CFUNCTYPE(ctypes.c_int)
    entries = (whole, number(lambda: thread[0]), number(lambda: 2))
    library.zoo_set_openmp(*(ctypes.cast(entry, ctypes.c_void_p) for entry in entries))
    counts = torch.zeros(100, dtype=torch.int64)

    def region() -> None:
        assert (
            library.zoo_selftest_threads(ctypes.c_void_p(counts.data_ptr()), *map(ctypes.c_int64, (100, 2)))
            == 0
        )

    for _ in range(6):
        region()
    assert len(teams) <= 3  # where this machine is busy, a first region may itself take long
    late[0], waited = 0.0, len(teams)
    time.sleep(1.1)
    region()
    assert len(teams) == waited + 1 and counts.eq(7).all()
