"""The reader printed in docs/format.md, run as it stands: NumPy and the standard library, nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.shared.masks import Mask
from zoo.shared.masks.patterns import NM, Block, Group, Pattern, Unstructured
from zoo.shared.store.formats import save_packed

DOC = Path(__file__).parents[2] / "docs" / "format.md"
EXAMPLE = "".join(re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL))


@pytest.fixture(scope="module")
def read():
    namespace: dict = {}
    exec(compile(EXAMPLE, str(DOC), "exec"), namespace)
    return namespace["read"]


def test_example_imports_numpy_and_the_standard_library_only() -> None:
    imported = {
        alias.name
        for node in ast.walk(ast.parse(EXAMPLE))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported == {"itertools", "json", "struct", "numpy"}
    assert "ImportFrom" not in ast.dump(ast.parse(EXAMPLE))


CASES: dict[str, tuple[tuple[int, ...], Pattern, float]] = {
    "bitmap": ((33, 17), Unstructured(), 0.4),
    "gaps8": ((64, 64), Unstructured(), 0.02),
    "gaps16": ((300, 300), Unstructured(), 0.0005),
    "nm": ((8, 3, 16), NM(2, 4), 0.5),
    "nm_middle": ((5, 8, 3, 2), NM(3, 8, dim=1), 0.375),
    "blocks": ((8, 6, 4), Block(4, 2), 0.5),
    "few_blocks": ((64, 128), Block(1, 8), 0.03),
    "slices": ((6, 40, 3), Group(1), 0.5),
    "last_slices": ((6, 7, 50), Group(-1), 0.04),
    "full": ((3, 4), Unstructured(), 1.0),
    "empty": ((3, 4), Unstructured(), 0.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_example_reads_every_code(tmp_path, read, dtype) -> None:
    tensors: dict[str, torch.Tensor] = {}
    masks, codes = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, (shape, pattern, density) in CASES.items():
        score = torch.rand(shape, generator=generator)
        numel = score.numel()
        masks[name] = Mask(pattern.keep(score, pattern.feasible(shape, int(density * numel))), pattern)
        tensors[name] = (torch.randn(shape, generator=generator) * masks[name].keep).to(dtype)
    tensors["plain"] = torch.randn(3, 5).to(dtype)
    tensors["tied"] = tensors["nm"]
    tensors["counter"] = torch.tensor(7)
    edges = torch.rand(101, generator=generator) < 0.5
    report = save_packed(tmp_path / "f", tensors, masks, {"edges": edges, "thresholds": torch.arange(3.0)})
    codes = {entry.encoding for entry in report.tensors.values()}
    assert codes == {"dense", "same"} | {f"sparse/{c}" for c in ("bitmap", "gaps", "nm", "full", "empty")}

    got = read(tmp_path / "f")

    assert set(got) == {*tensors, "edges", "thresholds"}
    for name, tensor in tensors.items():
        expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(got[name], expected.numpy(), err_msg=name)
    np.testing.assert_array_equal(got["edges"], edges.numpy())
    np.testing.assert_array_equal(got["thresholds"], [0, 1, 2])
