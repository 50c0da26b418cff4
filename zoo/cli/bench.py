"""`zoo bench`: the scripts of `benchmarks/` in a source checkout."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from zoo.cli import CHECK_FAILED, OK
from zoo.cli.console import note, print_json
from zoo.cli.parsing import Positional, metavar, parse
from zoo.errors import ConfigError, UnknownNameError
from zoo.names import suggestion


@dataclass
class Bench:
    """Run benchmarks of a source checkout; without a name, list them. Exit code 1 if a stated goal was
    missed."""

    names: Annotated[tuple[str, ...], Positional, metavar("NAME")] = ()
    """Which to run; `all` for all."""

    quick: bool = False
    """Small sizes, for a first look."""

    threads: int | None = None
    """Threads to use; by default what the script chooses."""

    json: bool = False
    """Let the benchmarks print JSON (or list the names as JSON)."""

    calibrate: bool = False
    """Measure on this machine what the sparse operations choose their back-ends by, and keep it; takes some
    minutes, with one thread and with all of them unless --threads is given."""


def bench_command(argv: Sequence[str]) -> int:
    """`zoo bench`."""
    options = parse(Bench, argv, "bench")
    if options.calibrate:
        return _calibrate(options)
    scripts = find_scripts()
    if not options.names:
        _list_scripts(scripts, options.json)
        return OK
    names = list(scripts) if options.names == ("all",) else list(options.names)
    for name in names:
        if name not in scripts:
            raise UnknownNameError(f"Unknown benchmark {name!r}. {suggestion(name, scripts)}")
    flags = ["--quick"] * options.quick + ["--json"] * options.json
    if options.threads is not None:
        flags += ["--threads", str(options.threads)]
    failed = []
    for name in names:
        note(f"== {name}")
        if subprocess.run([sys.executable, str(scripts[name]), *flags], check=False).returncode:
            failed.append(name)
    if failed:
        note(f"missed or broken: {', '.join(failed)}")
    return CHECK_FAILED if failed else OK


def _calibrate(options: Bench) -> int:
    """Measure the table of `zoo.shared.ops` with each number of threads."""
    if options.names:
        raise ConfigError("--calibrate measures the operations and runs no benchmark: give no names with it")
    import torch

    from zoo.shared import ops
    from zoo.shared.bench import threads

    tables = []
    for count in sorted({1, torch.get_num_threads()} if options.threads is None else {options.threads}):
        with threads(count):
            path = ops.calibrate(quick=options.quick)
        note(f"{count} thread(s): {path}")
        tables.append({"threads": count, "file": str(path)})
    if options.json:
        print_json(tables)
    return OK


def find_scripts() -> dict[str, Path]:
    """Name -> script, from `benchmarks/` beside the packages, else in the working directory.

    Raises:
        ConfigError: neither is a source checkout.
    """
    for root in (Path(__file__).parents[2], Path.cwd()):
        found = sorted((root / "benchmarks").glob("*.py"))
        if found and (root / "pyproject.toml").exists():
            return {path.stem: path for path in found if not path.stem.startswith("_")}
    raise ConfigError("no benchmarks/ here; they are in a source checkout: run `zoo bench` inside one")


def _list_scripts(scripts: dict[str, Path], as_json: bool) -> None:
    """Print each name with the first line of its docstring, read without running the script."""
    summaries = {
        name: (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        for name, path in scripts.items()
    }
    if as_json:
        print_json(summaries)
        return
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        print(f"{name:<{width}}  {summary}")
