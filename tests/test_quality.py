"""The project's own rules: linter, type checker, direction of imports, size of the tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOMAINS = ("graph", "diffusion", "llm", "neural3d", "vision")


def imported_modules(path: Path) -> set[str]:
    """Absolute names of the modules that a source file imports, anywhere in it."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    if package[:1] == ("shared",):  # it is imported as zoo.shared
        package = ("zoo", *package)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return names


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_ruff() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "zoo", "shared", "tests", "benchmarks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_types() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shared_knows_nothing_of_zoo() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("shared")
        for name in imported_modules(path)
        if name == "zoo" or name.startswith("zoo.") and not f"{name}.".startswith("zoo.shared.")
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("domain", DOMAINS)
def test_domains_do_not_know_each_other(domain: str) -> None:
    others = tuple(f"zoo.{other}" for other in DOMAINS if other != domain)
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(f"zoo/{domain}")
        for name in imported_modules(path)
        if name in others or name.startswith(tuple(f"{other}." for other in others))
    ]
    assert not wrong, wrong


def test_zoo_core_does_not_know_the_domains() -> None:
    """Domains are found through the registry; the house itself imports none of them."""
    domain_modules = tuple(f"zoo.{domain}" for domain in DOMAINS)
    core = [p for p in sources("zoo") if p.relative_to(ROOT / "zoo").parts[0] not in DOMAINS]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in core
        for name in imported_modules(path)
        if name in domain_modules or name.startswith(tuple(f"{m}." for m in domain_modules))
    ]
    assert not wrong, wrong


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout (an unpacked source archive): no list of tracked files to check")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def test_mutations_still_apply() -> None:
    """A row of the mutation check names a text that stands once in its file, and tests that exist."""
    for row in yaml.safe_load((ROOT / "tests/mutations.yaml").read_text(encoding="utf-8")):
        assert (ROOT / row["file"]).read_text(encoding="utf-8").count(row["old"]) == 1, row
        assert row["new"] != row["old"], row
        for test in row["tests"].split():
            path, _, name = test.partition("::")
            assert (ROOT / path).exists() and f"def {name.partition('[')[0]}" in (
                (ROOT / path).read_text(encoding="utf-8") if name else "def "
            ), test


def test_tree_is_small() -> None:
    sizes = {path: path.stat().st_size for path in tracked_files()}
    large = [f"{path.relative_to(ROOT)}: {size >> 20} MiB" for path, size in sizes.items() if size > 5 << 20]
    assert not large, large
    assert sum(sizes.values()) < 56 << 20


def test_no_unsafe_loading() -> None:
    """Weights are safetensors and cards are safe YAML: nothing in the packages may run code from a file."""
    calls = {"pickle.load", "pickle.loads", "yaml.load", "eval", "exec"}
    wrong = []
    for path in sources("zoo") + sources("shared"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in calls or (name == "torch.load" and keywords.get("weights_only") != "True"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong, wrong
