"""OFB: the gate, its sizes and its loss by hand; the method on any traced network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import zoo
from zoo.errors import ConfigError
from zoo.methods.channels import Budget
from zoo.methods.conformance import check_method, images_job, plain_network
from zoo.shared.structure.groups import trace_groups
from zoo.shared.structure.surgery import cut
from zoo.vision.methods.ofb import OFB, BiMask, search_loss


def gate(units: int = 8) -> BiMask:
    torch.manual_seed(0)
    return BiMask((units,))


def decided(found: BiMask, size: int) -> BiMask:
    with torch.no_grad():
        found.choice[:] = torch.where(found.sizes == size, 20.0, 0.0)
    return found


def test_units_are_gated_by_importance_first_and_by_probable_size_later() -> None:
    found = decided(gate(), 4)
    assert found.sizes.tolist() == [2, 3, 4, 5, 6, 7, 8]
    with torch.no_grad():
        found.logits[:] = torch.tensor([0.0, 3, -1, 2, 1, -2, 4, -3])
    assert found.ranks().tolist() == [4, 1, 5, 2, 3, 6, 0, 7]
    torch.testing.assert_close(found.wider().detach(), torch.tensor([1.0] * 4 + [0.0] * 4), atol=1e-5, rtol=0)
    found.share = 0.25
    stays = torch.tensor([0.0, 1, 0, 1, 1, 0, 1, 0])
    wanted = 0.25 * found.logits.sigmoid() + 0.75 * stays
    torch.testing.assert_close(found(), wanted, atol=1e-5, rtol=0)
    assert found.size().item() == pytest.approx(0.5, abs=1e-5)


def test_probabilities_of_sizes_by_hand() -> None:
    found = gate(4)
    assert found.sizes.tolist() == [1, 2, 3, 4]
    with torch.no_grad():
        found.choice[:] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    torch.testing.assert_close(found.wider().detach(), torch.tensor([1.0, 0.6, 0.3, 0.1]))
    assert found.size().item() == pytest.approx((0.4 + 0.6 + 0.6 + 0.4) / 4)
    v = (0.15**2 + 0.05**2 + 0.05**2 + 0.15**2) / 0.75
    entropy = -sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1))
    assert found.undecided().item() == pytest.approx(
        entropy + math.tan(math.pi / 2 - math.pi * v) / 4, rel=1e-4
    )
    with torch.no_grad():
        found.choice[:] = torch.tensor([0.9, 0.06, 0.03, 0.01]).log()
    found.shrink()  # a fifth of a quarter is 0.05
    assert found.live.tolist() == [True, True, False, False]
    assert found.probabilities()[2:].tolist() == [0, 0]


def test_the_search_pays_for_cost_away_from_the_budget() -> None:
    gates = {"a": decided(gate(), 8), "b": decided(gate(), 8)}
    costs = {"a": torch.full((8,), 3.0), "b": torch.full((8,), 1.0)}
    spent, met = search_loss(gates, Budget(costs, 16.0)), search_loss(gates, Budget(costs, 32.0))
    assert (spent - met).item() == pytest.approx(5 * 0.25, rel=1e-3)
    search_loss(gates, Budget(costs, 16.0)).backward()
    assert all(g.choice.grad.abs().max() > 0 for g in gates.values())


@pytest.mark.traced
def test_any_traced_network_is_really_cut() -> None:
    outcome = check_method("ofb", sparse_epochs=1)
    assert outcome.taken, outcome.refusal
    assert sum(p.numel() for p in outcome.made.model.parameters()) < sum(
        p.numel() for p in plain_network(0).parameters()
    )


@pytest.mark.traced
def test_the_controls_share_the_budget() -> None:
    sizes = {}
    for by in ("sizes", "uniform"):
        made = zoo.sparsify(
            plain_network(0), method="ofb", job=images_job(OFB), sparsity=0.5, sparse_epochs=1, by=by
        )
        sizes[by] = [m.out_channels for m in made.model if isinstance(m, nn.Conv2d)]
        assert sum(sizes[by]) == 20
    assert sizes["uniform"] == [4, 8, 8]
    with pytest.raises(ConfigError, match="sparse_epochs must leave an epoch"):
        zoo.sparsify(plain_network(0), method="ofb", job=images_job(OFB), sparse_epochs=2)


class Attention(nn.Module):
    """Two heads whose joint width the module keeps, as timm's does."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.attn_dim = 2, 8
        self.qkv, self.proj = nn.Linear(6, 24), nn.Linear(8, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.attn_dim))


@pytest.mark.traced
def test_the_joint_width_of_heads_follows_a_cut() -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 3, 6)
    (family,) = trace_groups(model, (x,)).values()
    assert dict(family.attributes) == {"num_heads": 1, "attn_dim": 4}
    cut(model, trace_groups(model, (x,)), {family.name: torch.tensor([False, True])}, check=(x,))
    assert (model.num_heads, model.attn_dim) == (1, 4) and model(x).shape == (2, 3, 6)
