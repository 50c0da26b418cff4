"""Fixed splits of the nodes for graphs that have no canonical one."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


def split_per_class(
    y: Int[Tensor, " nodes"], *, train: int, val: int, seed: int
) -> tuple[Bool[Tensor, " nodes"], Bool[Tensor, " nodes"], Bool[Tensor, " nodes"]]:
    """Masks with `train` and `val` random nodes of each class; the rest is for testing."""
    generator = np.random.default_rng(seed)
    labels = y.numpy()
    masks = np.zeros((3, len(labels)), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        masks[0, members[:train]] = True
        masks[1, members[train : train + val]] = True
    masks[2] = ~(masks[0] | masks[1])
    first, second, third = torch.from_numpy(masks)
    return first, second, third
