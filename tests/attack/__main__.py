"""`python -m tests.attack`: run the parts, each in a process of its own, and print and write the counts."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("readers", "bundles", "hubs", "kills")
COUNTS = ("tried", "refused", "served", "crashed", "wrong", "lost")


def main() -> int:
    """Exit code 1 if anything crashed, was wrong or got lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240, help="for all parts together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where to write the counts as JSON")
    parser.add_argument("--part", choices=PARTS, help="run this one alone, in this process")
    options = parser.parse_args()
    if options.part:
        _run(options.part, options.seconds, options.seed, options.out)
        return 0
    start = time.monotonic()
    results = {part: _in_process(part, options.seconds / len(PARTS), options.seed) for part in PARTS}
    total = {count: sum(result[count] for result in results.values()) for count in COUNTS}
    print(f"{'':10}" + "".join(f"{count:>10}" for count in COUNTS))
    for part, result in {**results, "all": total}.items():
        print(f"{part:10}" + "".join(f"{result[count]:>10,}" for count in COUNTS))
    for result in results.values():
        print("\n".join(result["notes"]), end="\n" if result["notes"] else "")
    if options.out:
        _write(options, results, total, time.monotonic() - start)
    return 1 if total["crashed"] or total["wrong"] or total["lost"] else 0


def _run(part: str, seconds: float, seed: int, out: Path) -> None:
    attack = importlib.import_module(f"tests.attack.{part}").attack
    with tempfile.TemporaryDirectory() as folder:
        attack(seconds, seed, Path(folder), out).write(out)


def _in_process(part: str, seconds: float, seed: int) -> dict:
    """A part's counts; if its process ends otherwise than it should, that is a crash."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tally.json"
        command = [sys.executable, "-m", "tests.attack", "--part", part, "--seconds", str(seconds)]
        command += ["--seed", str(seed), "--out", str(out)]
        try:
            done = subprocess.run(command, timeout=seconds + 300, stderr=subprocess.PIPE, text=True)
            ended, words = done.returncode, done.stderr[-400:]
        except subprocess.TimeoutExpired:
            ended, words = "no end", ""
        tally = json.loads(out.read_text()) if out.exists() else dict.fromkeys(COUNTS, 0) | {"notes": []}
    if ended != 0:
        tally["crashed"] += 1
        tally["notes"].append(f"crashed: the process of {part} ended with {ended}: {words}")
    return tally


def _write(options: argparse.Namespace, results: dict, total: dict, seconds: float) -> None:
    from zoo.harness.records import Environment, now
    from zoo.shared.store.io import write_json

    content = {
        "command": f"python -m tests.attack --seconds {options.seconds:g} --seed {options.seed}",
        "seconds": round(seconds),
        "total": total,
        "parts": results,
        "created": now(),
        "environment": Environment.here().model_dump(),
    }
    write_json(options.out, content)


if __name__ == "__main__":
    sys.exit(main())
