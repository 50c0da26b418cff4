"""torch.compile and torch.export of modules that hold sparse ops: eager, compiled and exported results agree.

The cases run in a process of their own (`python test_tracing.py CASE`): dynamo cannot trace functions wrapped
by the shape checker that the suite installs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


def check(module: nn.Module, *inputs: Tensor) -> None:
    """Outputs and gradients are the same in eager mode, compiled (without graph breaks) and exported."""
    expected = module(*inputs)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    result = torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs)
    result.square().sum().backward()
    torch.testing.assert_close(result, expected)
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch.testing.assert_close(torch.export.export(module, inputs).module()(*inputs), expected)


class GraphNet(nn.Module):
    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.reduce = reduce

    def forward(self, crow: Tensor, col: Tensor, x: Tensor) -> Tensor:
        from shared.ops.spmm import sddmm, spmm

        hidden = self.linear(x)
        return spmm(crow, col, hidden, sddmm(crow, col, hidden, hidden), reduce=self.reduce)


def spmm() -> None:
    crow, col = torch.tensor([0, 3, 3, 5, 9]), torch.tensor([0, 1, 3, 2, 2, 3, 1, 0, 1])
    for reduce in ("mean", "max"):
        check(GraphNet(reduce), crow, col, torch.randn(4, 8))


CASES = {"spmm": spmm}


@pytest.mark.parametrize("name", CASES)
def test_eager_compiled_and_exported_agree(name: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    torch.manual_seed(0)
    CASES[sys.argv[1]]()
