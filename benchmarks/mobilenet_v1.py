"""MobileNet-v1 end to end, 1x1 convolutions run by sparse_conv1x1, against the dense network, batch 1.

Batch norms are folded into the convolutions on both sides. The weights are random: a sparse product's time
depends on where zeros are, not on what the others are worth.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shared.bench import Cell, Goal, main
from shared.packing import pack
from shared.sparsifier import sparsify
from zoo.vision.mobilenet import norms_folded, pointwise_weights, random_example

SIDE = 224
# zeros of the 1x1 convolutions -> how much faster than the best dense variant
GOALS = {
    "unstructured": {0.7: None, 0.8: 1.0, 0.9: 1.8, 0.95: 2.2},
    "block4x1": {0.7: 1.0, 0.8: 1.6, 0.9: 2.2, 0.95: 2.5},
}


def dense_peers(model: Any, image: Tensor) -> dict[str, Callable[[], Tensor]]:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    image_last = image.to(memory_format=torch.channels_last)
    return {"conv2d": lambda: model(image), "conv2d channels-last": lambda: last(image_last)}


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    original, image = random_example(SIDE)
    folded = norms_folded(original)
    names = pointwise_weights(folded)
    for pattern, goals in GOALS.items():
        for zeros, goal in goals.items():
            if quick and zeros != 0.9:
                continue
            masked = copy.deepcopy(folded)
            masks = sparsify(masked, sparsity=zeros, pattern=pattern, budget="uniform", names=names)
            expected = masked(image)
            packed = pack(copy.deepcopy(masked), masks)
            torch.testing.assert_close(packed(image), expected, atol=1e-3, rtol=1e-3)
            yield Cell(
                {"pattern": pattern, "zeros": f"{zeros:.0%}"},
                lambda packed=packed: packed(image),
                dense_peers(masked, image),
                goal=None if goal is None else Goal(goal),
            )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("sparse MobileNet-v1 is faster than the dense one at 224 pixels", cells))
