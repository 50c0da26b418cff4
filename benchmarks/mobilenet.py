"""MobileNet-v1 at 224 pixels, one image: dense against sparse 1x1 convolutions; random weights, norms folded.

Only the 1x1 convolutions are sparse, and each runs on what `auto` picks for it. The dense network is the best
of torch's channel-major, channels-last and oneDNN layouts. The bound counts the kept products alone: the
depthwise and the first convolution, which stay dense, are part of the time and of the FLOPs.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils import mkldnn

from zoo.shared.bench import Bound, Cell, Goal, Later, main
from zoo.shared.measure.account import count
from zoo.shared.ops import SparseConv1x1, packing
from zoo.shared.pruning.inventory import pointwise_weights
from zoo.shared.pruning.sparsifier import sparsify
from zoo.vision.mobilenet import norms_folded, random_example

SIDE = 224
GOALS = {("unstructured", 0.8): 1.3, ("block4x1", 0.7): 1.6}


class OneDnn(nn.Module):
    """The network with its convolutions in oneDNN's own layout from end to end."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.features, self.linear = mkldnn.to_mkldnn(copy.deepcopy(model.features)), model.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x.to_mkldnn()).to_dense().mean((2, 3)))


def dense_peers(model: nn.Module, image: Tensor) -> dict[str, Callable[[], object]]:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    image_last, blocked = image.to(memory_format=torch.channels_last), OneDnn(model)
    return {
        "torch": lambda: model(image),
        "torch channels-last": lambda: last(image_last),
        "torch oneDNN": lambda: blocked(image),
    }


def cells(quick: bool, threads: int) -> Iterator[Later]:
    example, image = random_example(SIDE)
    peers = dense_peers(norms_folded(example), image)

    def build(labels: dict[str, object], pattern: str, zeros: float) -> Cell:
        model = norms_folded(example)
        names = pointwise_weights(model)
        masks = sparsify(model, sparsity=zeros, pattern=pattern, budget="uniform", names=names)
        account = count(model, (image,), masks)
        expected = model(image)
        packed = packing.pack(model, masks)
        torch.testing.assert_close(packed(image), expected, atol=1e-3, rtol=1e-3)
        labels["layers"] = sum(isinstance(module, SparseConv1x1) for module in packed.modules())
        bound = Bound(account.total.bytes_sparse, account.total.flops_kept)
        goal = GOALS.get((pattern, zeros))
        return Cell(labels, lambda: packed(image), peers, bound, Goal(goal) if goal else None)

    for pattern in ("unstructured", "block4x1"):
        for zeros in (0.7, 0.8) if quick else (0.5, 0.7, 0.8, 0.9):
            labels: dict[str, object] = {"pattern": pattern, "zeros": f"{zeros:.0%}"}
            yield Later(labels, functools.partial(build, dict(labels), pattern, zeros))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("MobileNet-v1 with sparse 1x1 convolutions against dense", cells))
