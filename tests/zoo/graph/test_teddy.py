"""TEDDY's score, the exact counts, ties, nesting, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import DataError
from zoo.graph.edges import check_undirected
from zoo.graph.teddy import (
    edge_scores,
    keep_highest,
    node_scores,
    random_scores,
    released_level,
    ticket_mask,
    with_self_loops,
)
from zoo.shared.bench.random_graphs import rmat


def undirected(*pairs: tuple[int, int]) -> torch.Tensor:
    entries = sorted({(i, j) for i, j in pairs} | {(j, i) for i, j in pairs})
    return torch.tensor(entries, dtype=torch.int64).t().contiguous()


def brute_scores(edge_index: torch.Tensor, nodes: int) -> torch.Tensor:
    """The definition, node by node, on a dense matrix."""
    adjacency = torch.zeros(nodes, nodes, dtype=torch.float64)
    adjacency[tuple(edge_index)] = 1.0
    degree = adjacency.sum(1)
    t = torch.zeros(nodes, dtype=torch.float64)
    for i in range(nodes):
        if degree[i] > 0:
            neighbours = adjacency[i].nonzero().flatten()
            t[i] = sum(float(degree[j]) ** -0.5 for j in neighbours) / degree[i] / degree[i]
    scores = t[edge_index[0]] * t[edge_index[1]]
    return scores.masked_fill(edge_index[0] == edge_index[1], math.inf)


def test_scores_of_a_path_by_hand():
    # 0 - 1 - 2: degrees 1, 2, 1; a = 1/sqrt 2, 1, 1/sqrt 2; t = 1/sqrt 2, 1/2, 1/sqrt 2
    nodes = node_scores(undirected((0, 1), (1, 2)), 3)
    assert torch.allclose(nodes, torch.tensor([0.5**0.5, 0.5, 0.5**0.5], dtype=torch.float64))


def test_edges_between_hubs_go_first():
    # two stars joined by the edge between their centres 0 and 5
    star = [(0, i) for i in range(1, 5)] + [(5, i) for i in range(6, 10)]
    edges = undirected(*star, (0, 5))
    keep = keep_highest(edge_scores(edges, 10), edges, 10, 2 / edges.shape[1])
    assert {tuple(e) for e in edges[:, ~keep].t().tolist()} == {(0, 5), (5, 0)}


@pytest.mark.parametrize("loops", [False, True])
def test_scores_equal_the_definition(graph, loops):
    edges = with_self_loops(graph.edge_index, 60) if loops else graph.edge_index
    assert torch.allclose(edge_scores(edges, 60), brute_scores(edges, 60), rtol=1e-12)
    assert torch.allclose(edge_scores(edges.int(), 60), brute_scores(edges, 60), rtol=1e-12)


def test_scores_do_not_depend_on_the_chunk_size(graph, monkeypatch):
    whole = edge_scores(graph.edge_index, 60)
    monkeypatch.setattr("zoo.graph.teddy._CHUNK", 7)
    assert torch.allclose(edge_scores(graph.edge_index, 60), whole, rtol=1e-14)


def test_weights_are_the_entries_of_a(graph):
    half = torch.full((graph.edge_index.shape[1],), 0.25)
    # degrees scale by c, so that t scales by c * c^-1/2 / c^2
    expected = node_scores(graph.edge_index, 60) * 0.25**-1.5
    assert torch.allclose(node_scores(graph.edge_index, 60, half), expected, rtol=1e-12)


def test_isolated_nodes_score_zero(graph):
    assert (node_scores(graph.edge_index, 60)[-4:] == 0).all()
    assert torch.isfinite(node_scores(torch.empty(2, 0, dtype=torch.int64), 3)).all()


def test_all_ties_keep_the_lower_ids():
    ring = undirected(*[(i, (i + 1) % 6) for i in range(6)])  # all edges alike
    keep = keep_highest(edge_scores(ring, 6), ring, 6, 0.5)
    kept = {tuple(sorted(e)) for e in ring[:, keep].t().tolist()}
    assert kept == {(0, 1), (0, 5), (1, 2)}  # the lowest three of (0,1) (0,5) (1,2) (2,3) (3,4) (4,5)


@settings(max_examples=60, deadline=None)
@given(
    nodes=st.integers(2, 24),
    density=st.floats(0, 1),
    loops=st.booleans(),
    sparsity=st.floats(0, 1, exclude_max=True),
    order=st.sampled_from(["teddy", "reversed", "random"]),
    seed=st.integers(0, 1000),
)
def test_counts_are_exact_and_directions_tied(nodes, density, loops, sparsity, order, seed):
    generator = torch.Generator().manual_seed(seed)
    upper = torch.triu(torch.rand(nodes, nodes, generator=generator) < density, diagonal=1)
    adjacency = upper | upper.t()
    if loops:
        adjacency |= torch.eye(nodes, dtype=torch.bool)
    edges = adjacency.nonzero().t()
    edges = edges[:, torch.randperm(edges.shape[1], generator=generator)]
    if order == "random":
        scores = (
            random_scores(edges, nodes, generator) if edges.shape[1] else torch.empty(0, dtype=torch.float64)
        )
    else:
        scores = edge_scores(edges, nodes) * (1 if order == "teddy" else -1)
        scores = torch.where(edges[0] == edges[1], math.inf, scores)
    keep = keep_highest(scores, edges, nodes, sparsity)
    drop = int(edges.shape[1] * sparsity)
    pairs = int((edges[0] < edges[1]).sum())
    expected = 2 * (drop // 2) if drop <= 2 * pairs else drop
    assert int((~keep).sum()) == expected
    kept = {tuple(e) for e in edges[:, keep].t().tolist()}
    assert all((j, i) in kept for i, j in kept)
    between = edges[0] != edges[1]
    if bool((~keep)[between].any()) and bool(keep[between].any()):
        assert scores[between & ~keep].max() <= scores[between & keep].min()
    if bool(keep[between].any()):
        assert keep[~between].all()  # self-loops go last


def test_levels_are_nested(graph):
    before = torch.ones(graph.edge_index.shape[1], dtype=torch.bool)
    for k in range(1, 21):
        keep = ticket_mask(graph.edge_index, 60, released_level(k)[0])
        assert not bool((keep & ~before).any())
        before = keep


def test_released_schedule_ends_where_the_paper_does():
    p_g, p_w = released_level(20)
    assert (round(100 * p_g, 1), round(100 * p_w, 1)) == (64.2, 87.8)


def test_attention_counts_self_loops_and_keeps_them(graph):
    entries = graph.edge_index.shape[1]
    keep = ticket_mask(graph.edge_index, 60, 0.3, add_self_loops=True)
    drop = int((entries + 60) * 0.3)
    assert entries - int(keep.sum()) == drop - drop % 2
    with pytest.raises(DataError, match="drops self-loops.*ask for less than"):
        ticket_mask(graph.edge_index, 60, 0.99, add_self_loops=True)


def test_reversed_drops_what_teddy_keeps_longest(graph):
    teddy = ticket_mask(graph.edge_index, 60, 0.5)
    reverse = ticket_mask(graph.edge_index, 60, 0.5, order="reversed")
    assert int((teddy & reverse).sum()) <= graph.edge_index.shape[1] % 4
    assert int(teddy.sum()) == int(reverse.sum())


def test_random_draws_follow_the_generator(graph):
    masks = [
        ticket_mask(graph.edge_index, 60, 0.5, order="random", generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_fewer_nodes_are_isolated_than_by_random_dropping():
    edges = rmat(2000, 16000, undirected=True, seed=3)

    def isolated(keep: torch.Tensor) -> int:
        return 2000 - len(torch.unique(edges[:, keep]))

    assert isolated(ticket_mask(edges, 2000, 0.5)) < isolated(ticket_mask(edges, 2000, 0.5, order="random"))


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), float("inf"), 1.5])
def test_impossible_sparsities_are_refused(graph, sparsity):
    with pytest.raises(DataError, match=r"must lie in \[0, 1\)"):
        ticket_mask(graph.edge_index, 60, sparsity)


def test_scores_that_are_nan_are_refused(graph):
    scores = torch.full((graph.edge_index.shape[1],), math.nan, dtype=torch.float64)
    with pytest.raises(DataError, match="NaN"):
        keep_highest(scores, graph.edge_index, 60, 0.5)


def test_graphs_that_are_not_undirected_are_refused(graph):
    edges = graph.edge_index
    check_undirected(edges, 60)
    with pytest.raises(DataError, match="directed: it has the edge"):
        check_undirected(edges[:, 1:], 60)
    with pytest.raises(DataError, match="1 repeated entries"):
        check_undirected(torch.cat([edges, edges[:, :1]], dim=1), 60)
    with pytest.raises(DataError, match="names node 60"):
        check_undirected(torch.cat([edges, torch.tensor([[60], [0]])], dim=1), 60)
    with pytest.raises(DataError, match=r"shape \[2, E\]"):
        check_undirected(edges.t(), 60)
    with pytest.raises(DataError, match="integers"):
        check_undirected(edges.float(), 60)
