"""The tutorials run as a reader would type them: each page in an empty folder, first line to last."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.registry import METHODS, TASKS

PAGES = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))
_NEEDS = {
    "graph": "torch_geometric",
    "diffusion": "diffusers",
    "language": "transformers",
    "task": "torch_geometric",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip(_NEEDS.get(page.stem, "torch"))
    monkeypatch.chdir(tmp_path)
    for registry in (METHODS, TASKS):  # what a page registers is gone after it
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    module = types.ModuleType("tutorial")
    monkeypatch.setitem(sys.modules, "tutorial", module)
    space = vars(module)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    for kind, text in blocks:
        if kind == "python":
            exec(text, space)
            continue
        for line in text.splitlines():
            command, *words = shlex.split(line, comments=True)
            assert command == "zoo"
            assert main(words) == 0, (line, capsys.readouterr().err)
