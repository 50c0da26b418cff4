"""Lines of code of Python files, without docstrings, comments and blank lines: `code_lines.py FILE...`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path


def code_lines(text: str) -> int:
    """How many lines of a module are neither blank nor a comment nor part of a string that stands alone."""
    alone: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            alone |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return sum(bool(line) and not line.startswith("#") and number not in alone for number, line in lines)


def main(*names: str) -> None:
    """Print a row per file."""
    for name in names:
        print(f"{code_lines(Path(name).read_text()):6} {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
