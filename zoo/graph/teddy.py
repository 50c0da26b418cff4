"""TEDDY (Seo, Yun and Yang, ICLR 2024): edges pruned once, by degree alone, before any training.

For an undirected graph A with degrees d (row sums; self-loops count):

    a_i  = (1 / d_i) sum_{j in N(i)} d_j^(-1/2)     mean inverse root degree of the neighbours
    t_i  = a_i / d_i                                score of a node
    T_ij = t_i t_j                                  score of an edge, high between low-degree nodes

and the int(E p) entries of lowest score are dropped; 1/0 := 0; self-loops have the highest score. One pass
over the
edges for the degrees, one for a, one for the scores: O(E) time, a few vectors of memory.

Differs from the released code in: both directions of an edge are one decision (there, the cut may split a
pair), so an odd number of entries to drop is rounded down to an even one; ties keep the edge of lower
(source, target); the scores are computed once and never again between levels, so that the kept sets of rising
sparsities are nested.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.errors import DataError
from zoo.graph.edges import check_ids, check_undirected, check_weight

Order = Literal["teddy", "reversed", "random"]

# Entries scored at a time: 4 Mi keep the temporary vectors of a pass at 32 MiB each.
_CHUNK = 1 << 22


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Refuse a share of zeros outside [0, 1).

    Raises:
        DataError: 1 or more, below 0, or NaN.
    """
    if not 0.0 <= sparsity < 1.0:  # false for NaN, too
        raise DataError(f"{name} is the share to drop and must lie in [0, 1). Received: {sparsity}.")
    return float(sparsity)


def node_scores(
    edge_index: Int[Tensor, "2 E"], num_nodes: int, edge_weight: Float[Tensor, " E"] | None = None
) -> Float[Tensor, " nodes"]:
    """t_i of every node, float64; 0 for nodes without edges.

    Args:
        edge_index: both directions of every edge, int32 or int64.
        num_nodes: number of nodes.
        edge_weight: entries of A, not negative; 1 where not given.

    Raises:
        DataError: an id out of range, or a weight that is negative, not finite or not the same both ways.
    """
    check_ids(edge_index, num_nodes)
    if edge_weight is not None:
        check_weight(edge_index, edge_weight, num_nodes)
    degree = _row_sums(edge_index, num_nodes, edge_weight, None)
    root = torch.where(degree > 0, degree.clamp(min=1e-300).rsqrt(), 0.0)
    neighbours = _row_sums(edge_index, num_nodes, edge_weight, root)
    return neighbours * root.pow(4)  # (1/d) for the mean, (1/d) for the node score


def edge_scores(
    edge_index: Int[Tensor, "2 E"], num_nodes: int, edge_weight: Float[Tensor, " E"] | None = None
) -> Float[Tensor, " E"]:
    """T_ij = t_i t_j of every entry, float64; infinity for self-loops. See `node_scores` for the
    arguments.
    """
    node = node_scores(edge_index, num_nodes, edge_weight)
    scores = torch.empty(edge_index.shape[1], dtype=torch.float64)
    for piece in _pieces(edge_index.shape[1]):
        row, col = edge_index[0, piece], edge_index[1, piece]
        scores[piece] = node.index_select(0, row) * node.index_select(0, col)
        scores[piece][row == col] = math.inf
    return scores


def random_scores(
    edge_index: Int[Tensor, "2 E"], num_nodes: int, generator: torch.Generator
) -> Float[Tensor, " E"]:
    """One uniform draw per undirected edge, the same for both directions; infinity for self-loops. The
    baseline.
    """
    low, high = edge_index.min(0).values, edge_index.max(0).values
    _, pair = torch.unique(low * num_nodes + high, return_inverse=True)
    scores = torch.rand(edge_index.shape[1], generator=generator, dtype=torch.float64)[pair]
    return scores.masked_fill(low == high, math.inf)


def keep_highest(
    scores: Float[Tensor, " E"], edge_index: Int[Tensor, "2 E"], num_nodes: int, sparsity: float
) -> Bool[Tensor, " E"]:
    """Which entries stay when int(E * sparsity) of lowest score go, both directions of an edge together.

    Args:
        scores: the same for both directions of an edge; infinity for self-loops, which go last.
        edge_index: both directions of every edge, each once, in any order.
        num_nodes: number of nodes.
        sparsity: share of the entries to drop, in [0, 1).

    Returns:
        True for the kept. If int(E * sparsity) is odd, one entry fewer is dropped, unless a self-loop can
        make it up.

    Raises:
        DataError: a sparsity out of range or scores that are NaN.
    """
    check_sparsity(sparsity)
    row, col = edge_index
    drop = int(edge_index.shape[1] * sparsity)
    upper = scores[row < col]
    pairs = min(drop // 2, len(upper))
    keep = torch.ones(edge_index.shape[1], dtype=torch.bool)
    if bool(torch.isnan(upper).any()):
        raise DataError("Edge scores hold NaN; score the edges of a graph with finite weights.")
    if pairs:
        _drop_pairs(keep, scores, upper, edge_index, num_nodes, pairs)
    loops_to_drop = drop - 2 * len(upper)
    if loops_to_drop > 0:
        loops = (row == col).nonzero().flatten()
        last_first = torch.argsort(row[loops], descending=True)
        keep[loops[last_first[:loops_to_drop]]] = False
    return keep


def ticket_mask(
    edge_index: Int[Tensor, "2 E"],
    num_nodes: int,
    sparsity: float,
    *,
    edge_weight: Float[Tensor, " E"] | None = None,
    add_self_loops: bool = False,
    order: Order = "teddy",
    generator: torch.Generator | None = None,
) -> Bool[Tensor, " E"]:
    """The entries of `edge_index` that stay at this sparsity.

    Args:
        edge_index: both directions of every edge.
        num_nodes: number of nodes.
        sparsity: share of the entries (with the added self-loops, if any) to drop.
        edge_weight: entries of A, for TEDDY's score; 1 where not given. Added self-loops have the weight 1.
        add_self_loops: give every node a self-loop first, as TEDDY does for GAT; they count as entries and as
            degrees.
        order: drop by TEDDY's score, by its reverse (highest first), or at random.
        generator: for `order="random"`.

    Raises:
        DataError: a sparsity out of range, a directed graph or one with repeated entries, weights that are
            no degrees' parts, or a sparsity that would drop the added self-loops.
    """
    check_undirected(edge_index, num_nodes)
    entries = edge_index.shape[1]
    full = with_self_loops(edge_index, num_nodes) if add_self_loops else edge_index
    if order == "random":
        scores = random_scores(full, num_nodes, generator or torch.default_generator)
    else:
        if edge_weight is not None:
            edge_weight = torch.cat([edge_weight, edge_weight.new_ones(full.shape[1] - entries)])
        scores = edge_scores(full, num_nodes, edge_weight)
        if order == "reversed":
            scores = torch.where(torch.isinf(scores), scores, -scores)
    keep = keep_highest(scores, full, num_nodes, sparsity)
    if not bool(keep[entries:].all()):
        raise DataError(
            f"Sparsity {sparsity} of {full.shape[1]} entries leaves no edge and drops self-loops, which "
            f"attention needs: ask for less than {entries / full.shape[1]:.3f}."
        )
    return keep[:entries]


def with_self_loops(edge_index: Int[Tensor, "2 E"], num_nodes: int) -> Int[Tensor, "2 F"]:
    """The entries, followed by a self-loop for each node that has none."""
    missing = torch.ones(num_nodes, dtype=torch.bool)
    missing[edge_index[0, edge_index[0] == edge_index[1]].long()] = False
    loops = missing.nonzero().flatten().to(edge_index.dtype)
    return torch.cat([edge_index, loops.expand(2, -1)], dim=1)


def released_level(k: int) -> tuple[float, float]:
    """(p_g, p_w) of level k = 1..20 of the released schedule: 1 - 0.95^k of the edges and 1 - 0.9^k of the
    weights.
    """
    return 1 - 0.95**k, 1 - 0.9**k


def _pieces(entries: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK, entries)) for start in range(0, entries, _CHUNK)]


def _row_sums(
    edge_index: Tensor, num_nodes: int, edge_weight: Tensor | None, factor: Tensor | None
) -> Float[Tensor, " nodes"]:
    """sum_j A_ij factor_j for every i (factor 1 where not given), float64."""
    sums = torch.zeros(num_nodes, dtype=torch.float64)
    for piece in _pieces(edge_index.shape[1]):
        row, col = edge_index[0, piece], edge_index[1, piece]
        value = torch.ones(len(row), dtype=torch.float64) if factor is None else factor.index_select(0, col)
        if edge_weight is not None:
            value = value * edge_weight[piece]
        sums.index_add_(0, row, value)
    return sums


def _drop_pairs(
    keep: Tensor, scores: Tensor, upper: Tensor, edge_index: Tensor, num_nodes: int, pairs: int
) -> None:
    """Clear the `pairs` undirected edges of lowest score in `keep`; of equal scores the highest ids go
    first.
    """
    threshold = float(np.partition(upper.numpy(), pairs - 1)[pairs - 1])
    tied_to_drop = pairs - int((upper < threshold).sum())
    keep &= scores >= threshold
    tied = (scores == threshold).nonzero().flatten()
    low, high = edge_index[:, tied].long().aminmax(dim=0)
    key = low * num_nodes + high
    of_pair = key[edge_index[0, tied] < edge_index[1, tied]].numpy()
    lowest_dropped = int(np.partition(of_pair, len(of_pair) - tied_to_drop)[len(of_pair) - tied_to_drop])
    keep[tied[key >= lowest_dropped]] = False
