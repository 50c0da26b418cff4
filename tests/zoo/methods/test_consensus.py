"""Consensus: gates, penalties and their signs by hand, blocks that go, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.methods.consensus import (
    Consensus,
    Gated,
    blocks_of,
    disagreement,
    excess,
    polarised,
    pooled,
    unwrap_gates,
    wrap,
)
from zoo.shared.errors import GroupError
from zoo.shared.train import Job, Recipe


def test_the_penalties_by_hand():
    shares = torch.tensor([0.5, 1.0, 0.0, 0.75], requires_grad=True)
    assert disagreement(shares).item() == pytest.approx((0.25 + 0.1875) / 4)
    assert excess(shares, 0.5).item() == pytest.approx(0.0625**2)
    (disagreement(shares) * 4).backward()
    assert shares.grad.tolist() == pytest.approx([0.0, -1.0, 1.0, -0.5])  # descent: to the nearer end
    assert polarised([0.5, 1.0, 0.0, 0.75]) == 0.5


def test_a_shut_gate_leaves_its_block_out_for_that_input():
    gate = Gated(nn.Linear(2, 2, bias=False), 2)
    nn.init.constant_(gate.block.weight, 1.0)
    with torch.no_grad():
        gate.gate.weight.copy_(torch.tensor([[1.0, 0.0]]))
        gate.gate.bias.fill_(0.0)
    x = torch.tensor([[1.0, 2.0], [-1.0, 2.0]])
    assert gate(x).tolist() == [[3.0, 3.0], [-1.0, 2.0]] and gate.share.item() == 0.5
    gate.share.backward()
    # sigmoid'(1) at the pooled input 1, at -1 the same, over two samples: they cancel for the weight
    slope = 0.19661
    assert gate.gate.bias.grad.item() == pytest.approx(slope, abs=1e-4)
    assert gate.gate.weight.grad[0].tolist() == pytest.approx([0.0, 2 * slope], abs=1e-4)
    assert pooled(torch.ones(2, 3, 4, 4)).shape == (2, 3) and pooled(torch.ones(2, 5, 3)).shape == (2, 3)


class Block(nn.Module):
    """x + f(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return x + self.layer(x)


def residual() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *(Block(8) for _ in range(4)), nn.Linear(8, 2))


@pytest.fixture
def rows() -> Job:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    batches = [(part, (part[:, 0] > 0).long()) for part in x.split(16)]
    return Job(batches, recipe=Recipe(epochs=12, lr=0.1, batch=16))


def test_blocks_that_gates_agree_to_shut_are_removed():
    model = residual()
    x = torch.randn(3, 4)
    expected = nn.Sequential(model[0], model[1], model[4], model[5])(x)
    for name in ("1", "2", "3", "4"):
        wrap(model, name, 8)
    assert unwrap_gates(model, {"1": 0.9, "2": 0.1, "3": 0.5, "4": 1.0}) == ["2", "3"]
    assert torch.equal(model(x), expected) and len(model) == 4
    shut = residual()
    wrap(shut, "1", 8), wrap(shut, "2", 8)
    assert unwrap_gates(shut, {"1": 0.1, "2": 0.3}) == ["1"]  # one stays


def test_half_of_the_blocks_go_in_one_training(rows):
    model = residual()
    made = Consensus(sparsity=0.5, pressure=4.0).sparsify(model, rows)
    assert int(made.extras["blocks/keep"].sum()) == 2 and len(made.model) == 4 and len(model) == 6
    assert made.model(torch.randn(2, 4)).shape == (2, 2)
    free = Consensus(sparsity=0.5, polarise=0.0, pressure=0.0).sparsify(model, rows)
    assert int(free.extras["blocks/keep"].sum()) > 2


def test_blocks_are_those_that_keep_their_shape(rows):
    assert blocks_of(residual(), rows.sample(1)[0], rows) == dict.fromkeys("1234", 8)
    with pytest.raises(GroupError, match="no block that keeps"):
        blocks_of(nn.Sequential(nn.Linear(4, 2)), rows.sample(1)[0], rows)
    with pytest.raises(ConfigError, match="larger batches"):
        Consensus().sparsify(residual(), Job([(torch.ones(1, 4), torch.zeros(1).long())]))
