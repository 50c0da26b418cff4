"""The embedded graph: 1,797 handwritten digits joined to their nearest neighbours."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch_geometric.data import Data

from zoo.graph.splits import split_per_class

NEIGHBOURS = 8


def digits_graph(neighbours: int = NEIGHBOURS) -> Data:
    """The k-nearest-neighbour graph over scikit-learn's digits.

    Each image is joined to the `neighbours` others of smallest Euclidean distance, and the graph is made
    undirected (an edge stays if either end chose it). Pixels are whole numbers from 0 to 16, so the squared
    distances are exact and the graph is the same on every machine; equal distances go to the lower index. The
    split has 20 training and 30 validation images per class, drawn once with a fixed seed, and the rest for
    testing.

    Returns:
        x [1797, 64] (pixels / 16), edge_index in canonical order, y, train_mask, val_mask, test_mask.
    """
    bunch = load_digits()
    pixels = bunch.data  # whole numbers in float64, whose products and sums are exact
    squares = (pixels**2).sum(1)
    distance = squares[:, None] + squares[None, :] - 2 * pixels @ pixels.T
    np.fill_diagonal(distance, np.inf)
    ranked = distance * len(pixels) + np.arange(len(pixels))  # equal distances differ by the index
    nearest = np.argpartition(ranked, neighbours, axis=1)[:, :neighbours]
    joined = np.zeros(distance.shape, dtype=bool)
    np.put_along_axis(joined, nearest, True, axis=1)
    edge_index = torch.from_numpy(np.stack((joined | joined.T).nonzero()))
    y = torch.from_numpy(bunch.target.astype(np.int64))
    train, val, test = split_per_class(y, train=20, val=30, seed=0)
    x = torch.from_numpy(bunch.data.astype(np.float32) / 16)
    return Data(x=x, edge_index=edge_index, y=y, train_mask=train, val_mask=val, test_mask=test)
