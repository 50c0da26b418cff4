"""The page of recipes, each tried: `python -m zoo.recipes --check docs/recipes.md [NAME ...]`.

Lines of other recipes stay as they are on the page.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from zoo.recipes import Entry, entries, select
from zoo.recipes.check import tried
from zoo.shared.store.io import atomic_write

HEAD = """# Recipes for models that people know

Made by `python -m zoo.recipes --check docs/recipes.md` from `zoo/recipes/hub.yaml`. `zoo recipes list` shows
them, `zoo make hub/NAME --out DIR` runs one where its base can be had. **None was run on the real weights**
here, where no hub can be reached: "tried" is the recipe's own command on a model of the same configuration
class with random weights at reduced depth and width, written by the library of the base, the result loaded
by it, and the share of zeros (or of parameters gone) in what was pruned.

Minutes are Wanda's on two cores, scaled by the number of weights from the one size that was measured
(`benchmarks/results/llm-large.json`: 1.0 billion weights, 417 s); memory is reckoned from the sizes, not
measured. "streamed" goes block by block. Gated bases ask for a name first (HF_TOKEN).

"""
COLUMNS = (
    "recipe `hub/...`",
    "base",
    "million parameters",
    "method and options",
    "data",
    "minutes",
    "GiB",
    "tried: share, seconds",
)


def line(entry: Entry, outcome: str) -> str:
    """The page's line of a recipe."""
    minutes, gib = entry.minutes(), entry.gib()
    cells = [
        entry.name,
        entry.base + (" (gated)" if entry.gated else ""),
        f"{entry.parameters:,g}",
        " ".join(entry.words()).removeprefix("--method "),
        entry.data(),
        "" if minutes is None else f"{minutes:,.0f}" if minutes >= 1 else "< 1",
        "" if gib is None else f"{gib:,.1f}" + (", streamed" if entry.streamed else ""),
        outcome,
    ]
    return f"| {' | '.join(cells)} |"


def check(path: Path, names: list[str]) -> int:
    """Try these recipes and write the page after each; 1 if one failed."""
    failed = 0
    for entry in select(tuple(names) or ("*",)):
        with tempfile.TemporaryDirectory() as folder:
            result = tried(entry, Path(folder))
        failed += bool(result.note)
        share = result.note if result.zeros is None else f"{result.zeros:.1%}, {result.seconds:.0f} s"
        row = line(entry, share.replace("|", "/"))
        print(row, file=sys.stderr, flush=True)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        rows = {one.split("|")[1].strip(): one for one in text.splitlines() if one.startswith("| ")}
        rows[entry.name] = row
        table = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        page = HEAD + table + "\n".join(rows[name] for name in entries() if name in rows) + "\n"
        atomic_write(path, page.encode())
    return int(failed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=Path, required=True, metavar="PAGE")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    raise SystemExit(check(arguments.check, arguments.names))
