"""`zoo bench`: the scripts of `benchmarks/` in a source checkout."""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from zoo.cli import CHECK_FAILED, OK
from zoo.cli.console import note, print_json
from zoo.cli.parsing import Positional, metavar, parse
from zoo.errors import ConfigError, UnknownNameError
from zoo.names import suggestion
from zoo.shared.store.io import read_json


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
    """Print one JSON object of what each benchmark found, by name, the tables on stderr (or list the names as
    JSON)."""

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
    flags = ["--quick"] * options.quick
    if options.threads is not None:
        flags += ["--threads", str(options.threads)]
    failed, results = [], {}
    for name in names:
        note(f"== {name}")
        command = [sys.executable, str(scripts[name]), *flags]
        if options.json:
            code, results[name] = _run_for_results(command)
        else:
            code = subprocess.run(command, check=False).returncode
        if code:
            failed.append(name)
    if options.json:
        print_json(results)
    if failed:
        note(f"missed or broken: {', '.join(failed)}")
    return CHECK_FAILED if failed else OK


def _run_for_results(command: Sequence[str]) -> tuple[int, Any]:
    """Run a script, what it prints on stderr: its exit code and the results that it wrote, None if it wrote
    none."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        done = subprocess.run([*command, "--json", str(file)], stdout=sys.stderr, check=False)
        return done.returncode, read_json(file) if file.is_file() else None


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
