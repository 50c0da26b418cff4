"""Pages of the documentation site, copied to one folder: `python docs/stage.py FOLDER`, as `make docs` does.

The tree keeps its shape, so that links between pages hold on the site as they do in the repository. Files
that pages point at come along; the pages of papers are the results of their studies; the reference is made
from docstrings.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 1 << 20  # bytes of a file that a page points at
#: Packages whose modules are in the reference.
REFERENCE = (
    *("zoo", "zoo/bundles", "zoo/harness", "zoo/methods", "zoo/studies", "zoo/training"),
    *(f"shared/{part}" for part in ("masks", "pruning", "learned", "structure", "measure", "train", "ops")),
)


def pages() -> list[Path]:
    """Markdown files of the site, relative to the repository."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for pattern in (
        "docs/**/*.md",
        "zoo/*/README.md",
        "zoo/*/studies/README.md",
        "benchmarks/results/**/*.md",
    ):
        found += sorted(ROOT.glob(pattern))
    return [page.relative_to(ROOT) for page in found]


def targets(page: Path) -> list[Path]:
    """Files of the repository that a page points at."""
    found = []
    for place in re.findall(r"\]\(([^)#:\s]+)", (ROOT / page).read_text(encoding="utf-8")):
        target = ((ROOT / page).parent / place).resolve()
        if target.is_file() and ROOT in target.parents and target.stat().st_size <= LARGEST:
            found.append(target.relative_to(ROOT))
    return found


def reference(folder: Path) -> None:
    """A page of docstrings for each module of the packages in the reference."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in REFERENCE:
        name = package.replace("/", ".").replace("shared.", "zoo.shared.", 1)
        modules = [path.stem for path in sorted((ROOT / package).glob("[a-z]*.py"))]
        blocks = [f"# {name}", f"::: {name}", *(f"::: {name}.{module}" for module in modules)]
        (folder / f"{name}.md").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def stage(folder: Path) -> int:
    """Copy all pages and what they point at; returns how many pages there are."""
    shutil.rmtree(folder, ignore_errors=True)
    for page in pages():
        for file in (page, *targets(page)):
            place = folder / ("index.md" if file == Path("README.md") else file)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, place)
        text = (ROOT / page).read_text(encoding="utf-8")
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            source = (ROOT / page).parent / picture
            if not source.is_file():
                raise SystemExit(f"{page}: the picture {picture} is not there")
    reference(folder / "reference")
    return len(pages())


if __name__ == "__main__":
    print(f"{stage(Path(sys.argv[1]))} pages")
