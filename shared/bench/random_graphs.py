"""Random graphs with a power-law degree distribution, for tests and benchmarks of graph operations."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

# Edges drawn at a time: the dozen arrays of one draw stay in the second-level cache.
_DRAW = 1 << 15
_ROUNDS = 100


def rmat(
    nodes: int,
    edges: int,
    *,
    seed: int = 0,
    probabilities: tuple[float, float, float] = (0.57, 0.19, 0.19),
    undirected: bool = False,
    self_loops: bool = True,
    shuffle: bool = True,
) -> Int64[Tensor, "2 edges"]:
    """R-MAT graph (Chakrabarti, Zhan and Faloutsos 2004) with exactly `edges` distinct entries.

    Every entry walks down the quadrants of the adjacency matrix, choosing (0, 0), (0, 1), (1, 0) or (1, 1)
    with probabilities a, b, c and 1 - a - b - c at each level. Repeated entries are drawn again, so the count
    is exact.

    Args:
        nodes: number of nodes; need not be a power of two.
        edges: number of directed entries (an undirected edge counts as two, so it must then be even).
        seed: the same arguments give the same graph on every machine.
        probabilities: (a, b, c); the defaults are Graph500's.
        undirected: mirror every entry; implies no self-loops.
        self_loops: allow entries (i, i).
        shuffle: relabel the nodes at random; otherwise low ids have the high degrees.

    Returns:
        (source, target), sorted by source, then by target.

    Raises:
        ValueError: impossible sizes or probabilities, or more entries than such a skewed graph yields.
    """
    self_loops = self_loops and not undirected
    a, b, c = probabilities
    if nodes < 0 or edges < 0 or edges > nodes * nodes - (0 if self_loops else nodes):
        raise ValueError(f"{nodes} nodes cannot have {edges} distinct entries.")
    if min(a, b, c) < 0 or a + b + c > 1:
        raise ValueError(f"R-MAT needs a, b, c >= 0 with a + b + c <= 1. Received: {probabilities}.")
    if undirected and edges % 2:
        raise ValueError(f"An undirected graph has an even number of entries. Received: {edges}.")

    generator = np.random.Generator(np.random.SFC64(seed))
    wanted = edges // 2 if undirected else edges
    keys = np.empty(0, dtype=np.int64)
    for _ in range(_ROUNDS):
        missing = wanted - len(keys)
        if missing <= 0:
            break
        fresh = [keys]
        for start in range(0, missing + missing // 8, _DRAW):
            draw = min(_DRAW, missing + missing // 8 - start)
            fresh.append(_draw(generator, nodes, draw, (a, b, c), undirected, self_loops))
        keys = _sorted_unique(np.concatenate(fresh))
    if len(keys) < wanted:
        raise ValueError(
            f"R-MAT with {probabilities} found only {len(keys)} of {wanted} distinct edges on {nodes} nodes: "
            "ask for fewer edges or for more equal probabilities."
        )
    surplus = generator.choice(len(keys), len(keys) - wanted, replace=False, shuffle=False)
    return _finish(np.delete(keys, surplus), nodes, generator, undirected, shuffle)


def _draw(
    generator: np.random.Generator,
    nodes: int,
    count: int,
    probabilities: tuple[float, float, float],
    undirected: bool,
    self_loops: bool,
) -> np.ndarray:
    """Keys source * nodes + target of up to `count` entries (those outside the graph are dropped)."""
    a, b, c = probabilities
    source = np.zeros(count, dtype=np.int64)
    target = np.zeros(count, dtype=np.int64)
    for _ in range((nodes - 1).bit_length()):
        quadrant = generator.random(count, dtype=np.float32)
        lower = quadrant >= a + b
        right = (quadrant >= a) ^ lower | (quadrant >= a + b + c)
        source = source * 2 + lower
        target = target * 2 + right
    valid = (source < nodes) & (target < nodes)
    if not self_loops:
        valid &= source != target
    if undirected:
        source, target = np.minimum(source, target), np.maximum(source, target)
    return (source * nodes + target)[valid]


def _sorted_unique(keys: np.ndarray) -> np.ndarray:
    keys.sort()
    first = np.empty(len(keys), dtype=bool)
    first[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return keys[first]


def _finish(
    keys: np.ndarray, nodes: int, generator: np.random.Generator, undirected: bool, shuffle: bool
) -> Int64[Tensor, "2 edges"]:
    source, target = np.divmod(keys, max(nodes, 1))
    if shuffle:
        label = generator.permutation(nodes)
        source, target = label[source], label[target]
    if undirected:
        source, target = np.concatenate([source, target]), np.concatenate([target, source])
    if shuffle or undirected:
        keys = source * nodes + target
        keys.sort()
        source, target = np.divmod(keys, max(nodes, 1))
    return torch.from_numpy(np.stack([source, target]))
