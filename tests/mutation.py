"""Mutation check: defining steps of methods and core, each changed in a copy of the tree, must fail a test.

    python tests/mutation.py --out benchmarks/results/mutation.json          # all rows of mutations.yaml
    python tests/mutation.py --only zoo/methods                              # those of files that begin so

With --out a run goes on where another one ended: a row is not tried again while its file, its tests and the
row itself are those of the outcome in the file.

A row names a file, a text that stands there once, what replaces it, and the tests that know the step. It is
caught if these tests fail with it, survives if they pass; before, they have to pass without it. Where the
file is one of the kernels' sources, they are built anew in the copy.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml

from zoo.shared.store.io import write_json

ROOT = Path(__file__).resolve().parents[1]
ROWS = Path(__file__).with_name("mutations.yaml")
_LEAST = 0.95  # share that must be caught
_SECONDS = 900.0  # of a row's tests; a mutation that hangs is caught


def passes(tree: Path, tests: list[str]) -> bool:
    """Whether tests of a tree pass, in a fork of this process, which has imported what takes long."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        sys.path[0] = str(tree)
        for name in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
            del sys.modules[name]  # what this script imported is that of its own tree
        if not importlib.import_module("zoo").__file__.startswith(str(tree)):
            os._exit(1)  # a mutation that is not imported would survive
        sys.dont_write_bytecode = True
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        torch.set_num_threads(1)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
    until = time.monotonic() + _SECONDS
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.2)


def caught(tree: Path, row: dict[str, str]) -> bool:
    """Whether the row's tests fail with its mutation.

    Raises:
        SystemExit: what it replaces does not stand in the file exactly once.
    """
    path = tree / row["file"]
    source = path.read_text()
    if source.count(row["old"]) != 1:
        sys.exit(f"{row['file']} has {row['old']!r} {source.count(row['old'])} times, not once: mend the row")
    path.write_text(source.replace(row["old"], row["new"]))
    native = row["file"].startswith("native/")
    kernels = {kept: kept.read_bytes() for kept in (tree / "shared/ops").glob("_zoo_native_*") if native}
    try:
        if native:
            build(tree)
        return not passes(tree, row["tests"].split())
    finally:
        path.write_text(source)
        for kept, content in kernels.items():
            kept.write_bytes(content)


def build(tree: Path) -> None:
    """Build the kernels of a tree in place."""
    command = [sys.executable, "-m", "zoo.shared.ops.build"]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)


def digest(row: dict[str, str]) -> str:
    """Of a row, its file and the files of its tests."""
    places = [row["file"], *sorted({test.partition("::")[0] for test in row["tests"].split()})]
    files = [f for place in places for f in (sorted((ROOT / place).rglob("*.py")) or [ROOT / place])]
    known = [row[name] for name in ("file", "old", "new", "tests")]
    return hashlib.sha256(
        b"\0".join([*map(str.encode, known), *(f.read_bytes() for f in files)])
    ).hexdigest()[:16]


def outcomes(path: Path | None) -> dict[str, str]:
    """Outcome by digest of a file that was written before; survivors are tried again."""
    rows = json.loads(path.read_text())["rows"] if path is not None and path.is_file() else []
    return {row["digest"]: row["outcome"] for row in rows if row["outcome"] == "caught"}


def write(path: Path | None, rows: list[dict[str, str]]) -> None:
    """Keep the outcomes so far."""
    if path is not None:
        found = sum(row["outcome"] == "caught" for row in rows)
        write_json(path, {"caught": found, "mutations": len(rows), "rows": rows})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows of files whose path begins so")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows = [row for row in yaml.safe_load(ROWS.read_text()) if row["file"].startswith(options.only)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        left_out = shutil.ignore_patterns(".git", "build", "__pycache__", ".*_cache", ".venv")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=left_out)
        sound: set[str] = set()  # tests that pass without a mutation
        known = outcomes(options.out)
        for row in rows:
            row["digest"] = digest(row)
            if row["digest"] in known:
                row["outcome"] = known[row["digest"]]
                continue
            if row["tests"] not in sound and not passes(tree, row["tests"].split()):
                sys.exit(f"{row['tests']} fails without any mutation (or has no test): mend it first")
            sound.add(row["tests"])
            row["outcome"] = "caught" if caught(tree, row) else "survived"
            print(
                f"{row['outcome']:9} {row['file']}: {row['old'].strip()!r} -> {row['new'].strip()!r}",
                flush=True,
            )
            write(options.out, [one for one in rows if "outcome" in one])
    found = sum(row["outcome"] == "caught" for row in rows)
    print(f"{found} of {len(rows)} caught")
    write(options.out, rows)
    return int(found < _LEAST * len(rows))


if __name__ == "__main__":
    sys.exit(main())
