"""R-MAT graphs: exact counts, no repeats, power-law degrees, repeatable."""

from __future__ import annotations

import pytest
import torch

from zoo.shared.bench.random_graphs import rmat


@pytest.mark.parametrize("nodes, edges", [(0, 0), (1, 1), (2, 3), (100, 900), (1000, 8000), (4096, 1 << 16)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_exact_distinct_sorted(nodes: int, edges: int, shuffle: bool) -> None:
    graph = rmat(nodes, edges, shuffle=shuffle)
    assert graph.shape == (2, edges)
    key = graph[0] * nodes + graph[1]
    assert (key.diff() > 0).all()
    if edges:
        assert graph.min() >= 0 and graph.max() < nodes


def test_undirected_is_symmetric_without_loops() -> None:
    graph = rmat(500, 4000, undirected=True)
    dense = torch.zeros(500, 500, dtype=torch.bool)
    dense[graph[0], graph[1]] = True
    assert dense.sum() == 4000 and torch.equal(dense, dense.T) and not dense.diagonal().any()


def test_no_self_loops() -> None:
    graph = rmat(64, 600, self_loops=False)
    assert graph.shape == (2, 600) and (graph[0] != graph[1]).all()


def test_same_seed_same_graph() -> None:
    assert torch.equal(rmat(300, 2000, seed=3), rmat(300, 2000, seed=3))
    assert not torch.equal(rmat(300, 2000, seed=3), rmat(300, 2000, seed=4))


def test_quadrants_follow_the_probabilities() -> None:
    """Without relabelling, the share of entries in each half is that of one level of the walk."""
    graph = rmat(1 << 14, 1 << 15, shuffle=False, probabilities=(0.4, 0.3, 0.1))
    lower, right = graph >= 1 << 13
    share = [(x & y).float().mean().item() for x, y in [(~lower, ~right), (~lower, right), (lower, ~right)]]
    assert share == pytest.approx([0.4, 0.3, 0.1], abs=0.02)


def test_degrees_are_skewed() -> None:
    degree = rmat(1 << 14, 1 << 17)[0].bincount(minlength=1 << 14)
    assert degree.max() > 40 * degree.float().mean()


@pytest.mark.parametrize(
    "nodes, edges, options, message",
    [
        (3, 10, {}, "cannot have 10"),
        (3, 7, {"self_loops": False}, "cannot have 7"),
        (9, 3, {"undirected": True}, "even number"),
        (9, 3, {"probabilities": (0.9, 0.2, 0.1)}, "a \\+ b \\+ c"),
        (64, 4096, {"probabilities": (0.9, 0.05, 0.05)}, "found only"),
    ],
)
def test_impossible_requests_are_refused(nodes: int, edges: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rmat(nodes, edges, **options)
