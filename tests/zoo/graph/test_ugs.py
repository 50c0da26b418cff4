"""UGS: counts on TEDDY's schedule, rewinding, and the time it accounts for."""

from __future__ import annotations

import pytest
import torch

from zoo.graph.models import GAT, GCN
from zoo.graph.teddy import released_level
from zoo.graph.ugs import UGSConfig, ugs


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
