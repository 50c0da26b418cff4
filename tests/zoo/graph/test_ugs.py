"""UGS: counts on TEDDY's schedule, rewinding, and the time it accounts for."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.graph.models import GAT, GCN
from zoo.graph.teddy import released_level
from zoo.graph.train import WholeGraph, graph_job
from zoo.graph.ugs import UGS, UGSConfig, _keep_weights, _Masked, _rewind, ugs
from zoo.shared.train import Job, Recipe


@pytest.fixture
def run(graph):
    torch.manual_seed(0)
    model = GCN(12, 16, 3)
    return model, ugs(model, graph, UGSConfig(epochs=4), (1, 3)), graph


def test_levels_have_teddys_counts_and_tied_directions(run):
    model, levels, graph = run
    total = sum(p.numel() for p in model.parameters())
    entries = graph.edge_index.shape[1]
    for k, level in levels.items():
        p_g, p_w = released_level(k)
        dropped = int(entries * p_g)
        assert entries - int(level.keep.sum()) == dropped - dropped % 2
        kept = sum(int(mask.sum()) for mask in level.best.masks.values())
        assert kept == total - -int(-total * p_w // 1)
        pairs = {tuple(e) for e in graph.edge_index[:, level.keep].t().tolist()}
        assert all((j, i) in pairs for i, j in pairs)


def test_levels_are_nested_and_time_adds_up(run):
    _, levels, _ = run
    assert not bool((levels[3].keep & ~levels[1].keep).any())
    for name, mask in levels[3].best.masks.items():
        assert not bool((mask & ~levels[1].best.masks[name]).any())
    assert 0 < levels[1].seconds < levels[3].seconds


def test_settings_are_the_released_ones():
    assert UGSConfig.released("cora") == UGSConfig(200, 0.008, 8e-5, 1e-2, 1e-2)
    assert UGSConfig.released("citeseer").weight_decay == 5e-4


def test_attention_keeps_its_self_loops(graph):
    torch.manual_seed(0)
    level = ugs(GAT(12, 4, 3, heads=2), graph, UGSConfig(epochs=2), (2,), self_loops_count=True)[2]
    entries = graph.edge_index.shape[1]
    dropped = int((entries + 60) * released_level(2)[0])
    assert entries - int(level.keep.sum()) == dropped - dropped % 2


def test_the_l1_subgradient_pulls_masks_to_zero_from_either_side(graph):
    """d/dm (s1 |m|) = s1 sign(m): 0.1 (1, -1, 0) for edge masks (2, -3, 0), 0.5 likewise for weights."""
    model = GCN(12, 16, 3)
    whole = WholeGraph.of(model, graph)
    left = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    masked = _Masked(model, whole.graph, 60, left, noise=0.0)
    first = next(iter(masked.weight_mask.values()))
    with torch.no_grad():
        masked.edge_mask[:3] = torch.tensor([2.0, -3.0, 0.0])
        first[0, :3] = torch.tensor([-2.0, 3.0, 0.0])
    weights = sum(mask.numel() for mask in masked.weight_mask.values())
    loss = masked.l1(0.1, 0.5)
    expected = 0.1 * (5 + len(masked.edge_mask) - 3) + 0.5 * (5 + weights - 3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(masked.edge_mask.grad[:4], torch.tensor([0.1, -0.1, 0.0, 0.1]))
    torch.testing.assert_close(first.grad[0, :4], torch.tensor([-0.5, 0.5, 0.0, 0.5]))


def test_the_smallest_masks_go_and_the_rest_is_rewound():
    masks = {"first": torch.tensor([True, True, False]), "second": torch.tensor([[True]])}
    score = {"first": torch.tensor([0.9, 0.1, -1.0]), "second": torch.tensor([[0.5]])}
    kept = _keep_weights(score, masks, 0.5)
    assert kept["first"].tolist() == [True, False, False] and kept["second"].tolist() == [[True]]
    model = GCN(2, 1, 1)  # weights [1, 2] and [1, 1]
    half, all_ = torch.tensor([[True, False]]), torch.tensor([[True]])
    initial = {"conv1.lin.weight": torch.tensor([[1.0, 2.0]]), "conv2.lin.weight": torch.tensor([[4.0]])}
    _rewind(model, initial, {"conv1.lin.weight": half, "conv2.lin.weight": all_})
    assert model.conv1.lin.weight.tolist() == [[1.0, 0.0]] and model.conv2.lin.weight.item() == 4.0


def test_a_closed_mask_is_the_removal_of_its_edge_and_of_no_loop(graph):
    torch.manual_seed(0)
    model = GCN(12, 16, 3).eval()
    whole = WholeGraph.of(model, graph)
    left = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    masked = _Masked(model, whole.graph, 60, left, noise=0.0).eval()
    with torch.no_grad():
        masked.edge_mask.zero_()
        alone = masked(whole.features, whole.graph)
        masked.edge_mask.fill_(1.0)
        together = masked(whole.features, whole.graph)
    none = WholeGraph.of(model, graph, torch.zeros(graph.edge_index.shape[1], dtype=torch.bool))
    torch.testing.assert_close(together, model(whole.features, whole.graph))
    torch.testing.assert_close(alone, model(none.features, none.graph))
    assert not torch.allclose(alone, together)


def test_the_method_makes_the_ticket_of_its_level(graph):
    torch.manual_seed(0)
    model = GCN(12, 16, 3)
    job = graph_job(model, graph, Recipe(epochs=2, lr=0.01, batch=1, optimizer="adam"), seed=5)
    made = UGS(level=2).sparsify(model, job)
    entries = graph.edge_index.shape[1]
    dropped = int(entries * released_level(2)[0])
    assert int(made.extras["edges/keep"].sum()) == entries - (dropped - dropped % 2)
    total = sum(p.numel() for p in model.parameters())
    assert sum(mask.kept for mask in made.masks.values()) == total - -int(-total * released_level(2)[1] // 1)
    assert not made.masks.lost_zeros(made.model) and made.hyperparameters["seed"] == 5
    assert made.model(graph.x, graph.edge_index).shape == (60, 3)
    for wrong, message in ((Job([(graph.x, graph.y)]), "whole graph"), (None, "job")):
        with pytest.raises(ConfigError, match=message):
            UGS().sparsify(model, wrong)
    with pytest.raises(ConfigError, match="at least 1"):
        UGS(level=0).sparsify(model, job)
