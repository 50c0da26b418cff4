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
        from zoo.shared.ops.spmm import sddmm, spmm

        hidden = self.linear(x)
        return spmm(crow, col, hidden, sddmm(crow, col, hidden, hidden), reduce=self.reduce)


def spmm() -> None:
    crow, col = torch.tensor([0, 3, 3, 5, 9]), torch.tensor([0, 1, 3, 2, 2, 3, 1, 0, 1])
    for reduce in ("mean", "max"):
        check(GraphNet(reduce), crow, col, torch.randn(4, 8))


class VoxelNet(nn.Module):
    """A submanifold and a strided convolution, pooling, and the way back, on fixed sites."""

    def __init__(self) -> None:
        super().__init__()
        from zoo.shared.ops.rulebook import conv_rulebook, submanifold_rulebook

        sites = (torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.5).nonzero().int()
        self.register_buffer("sites", sites)
        self.same = submanifold_rulebook(sites, (5, 6), 2, 3)
        self.down = conv_rulebook(sites, (5, 6), 2, 3, 2, 1)
        self.first = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.deep = nn.Parameter(torch.randn(4, 3, 3, 1))
        self.strided = nn.Parameter(torch.randn(5, 3, 3, 4))

    def forward(self, features: Tensor) -> Tensor:
        from zoo.shared.ops.sparse_conv import sparse_conv, sparse_max_pool, subm_conv
        from zoo.shared.ops.sparse_tensor import SparseConvTensor

        x = SparseConvTensor(features, self.sites, (5, 6), 2)
        x = subm_conv(x, self.first, rulebook=self.same)
        x = subm_conv(x, self.deep, groups=4, rulebook=self.same)
        pooled = sparse_max_pool(x, 3, stride=2, padding=1, rulebook=self.down)
        x = sparse_conv(x, self.strided, stride=2, padding=1, rulebook=self.down)
        return torch.cat([x.features, pooled.features], 1)


def sparse_conv() -> None:
    net = VoxelNet()
    check(net, torch.randn(len(net.sites), 3))


class GraphPower(nn.Module):
    """Two steps of a graph as one, with edge weights that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.rand(5))

    def forward(self, crow: Tensor, col: Tensor, x: Tensor) -> Tensor:
        from zoo.shared.ops.spgemm import CSR, spgemm

        a = CSR(crow, col, self.values, 4)
        square = spgemm(a, a)
        return square.values.sum() * x


def spgemm() -> None:
    check(GraphPower(), torch.tensor([0, 2, 3, 3, 5]), torch.tensor([0, 1, 3, 2, 3]), torch.randn(3))


def without_a_test_of_their_own() -> None:
    """Ops that no other test compiles: the value of the eager call, whether or not the graph breaks."""
    from zoo.shared.ops import depthwise_conv, dispatch, hash_encode, nm_linear  # noqa: F401

    grid = hash_encode.HashGrid(2, 2, 6, 2, 4)
    inputs = torch.rand(9, 3), torch.randn(grid.entries, 2)
    examples = [dispatch.Example(lambda points, table: hash_encode.hash_encode(points, table, grid), inputs)]
    examples += [dispatch.examples(name)[0] for name in ("depthwise_conv", "nm_linear")]
    for example in examples:
        compiled = torch.compile(example.call, backend="eager")
        torch.testing.assert_close(compiled(*example.inputs), example.run())


class Block(nn.Module):
    """A 1x1, a depthwise and a 1x1 convolution, which packing joins."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(8, 24, 1)
        self.deepen = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.project = nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(nn.functional.relu6(self.deepen(nn.functional.relu6(self.expand(x)))))


def packed_convolutions() -> None:
    """A packed network that has not run before it is compiled."""
    from zoo.shared.masks import MaskSet
    from zoo.shared.ops import packing

    net = Block().eval().requires_grad_(False)
    masks = MaskSet(
        {
            f"{name}.weight": torch.rand(getattr(net, name).weight.shape) < 0.3
            for name in ("expand", "project")
        }
    )
    masks.apply_(net)
    x = torch.randn(2, 8, 12, 12)
    expected = net(x)
    packed = packing.pack(net, masks)
    assert packed.project.before is not None
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)


CASES = {"spmm": spmm, "spgemm": spgemm, "sparse_conv": sparse_conv}
CASES["convolutions"] = packed_convolutions
CASES["others"] = without_a_test_of_their_own


@pytest.mark.parametrize("name", CASES)
def test_eager_compiled_and_exported_agree(name: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    torch.manual_seed(0)
    CASES[sys.argv[1]]()
