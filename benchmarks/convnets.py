"""Convnets with sparse convolutions against other engines' dense ones, 224 pixels; random weights, norms
folded.

MobileNet-v1 and -v2 and ResNet-50, of which all convolutions but the first and the depthwise ones are
sparse. The peers
run the dense network: onnxruntime and OpenVINO in fp32, where they are installed, torch in its two
layouts. The bound
counts the kept products alone.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator

import torch
from _rivals import rivals
from torch import Tensor, nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from zoo.shared.bench import Bound, Cell, Goal, Later, main
from zoo.shared.measure.account import count
from zoo.shared.ops import SparseConv1x1, SparseConv2d, packing
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.averaging import recalibrate_norms
from zoo.shared.structure.folding import fold_norms
from zoo.vision.mobilenet import MobileNetV1

SIDE = 224
NETWORKS = {
    "MobileNet-v1": MobileNetV1,
    "MobileNet-v2": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(num_labels=1000, tf_padding=False)
    ),
    "ResNet-50": lambda: ResNetForImageClassification(ResNetConfig(num_labels=1000)),
}
GOALS = {("unstructured", 0.8): 1.4, ("unstructured", 0.9): 1.8, ("block4x1", 0.7): 1.3}
RESNET_GOALS = {("unstructured", 0.8): 1.0, ("unstructured", 0.9): 1.0}
CASES = {
    1: [(pattern, zeros) for pattern in ("unstructured", "block4x1") for zeros in (0.7, 0.8, 0.9)],
    8: [("unstructured", 0.8), ("unstructured", 0.9), ("block4x1", 0.7)],
}


class Logits(nn.Module):
    """A network that returns nothing but its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        return y if isinstance(y, Tensor) else y.logits


@functools.cache
def example(network: str) -> nn.Module:
    """An untrained network whose norms have seen a batch: without, outputs all but vanish."""
    torch.manual_seed(0)
    model = Logits(NETWORKS[network]())
    recalibrate_norms(model, [torch.randn(2, 3, SIDE, SIDE)])
    return model.eval().requires_grad_(False)


@functools.lru_cache(maxsize=1)
def peers(network: str, batch: int, threads: int) -> tuple[Tensor, dict]:
    images = torch.randn(batch, 3, SIDE, SIDE)
    folded = fold_norms(copy.deepcopy(example(network)))
    last = copy.deepcopy(folded).to(memory_format=torch.channels_last)
    images_last = images.to(memory_format=torch.channels_last)
    torch_peers = {"torch": lambda: folded(images), "torch channels-last": lambda: last(images_last)}
    return images, rivals(folded, images, threads) | torch_peers


def cells(quick: bool, threads: int) -> Iterator[Later]:
    def build(labels: dict[str, object], network: str, batch: int, pattern: str, zeros: float) -> Cell:
        images, others = peers(network, batch, threads)
        model = copy.deepcopy(example(network))
        names = [name for name, p in model.named_parameters() if p.dim() == 4 and p.shape[1] > 3]
        masks = sparsify(model, sparsity=zeros, pattern=pattern, budget="uniform", names=names)
        account = count(model, (images,), masks)
        expected = model(images)
        packed = packing.pack(model, masks)
        torch.testing.assert_close(packed(images), expected, atol=1e-3, rtol=1e-3)
        sparse = (SparseConv1x1, SparseConv2d)
        labels["layers"] = sum(isinstance(module, sparse) for module in packed.modules())
        bound = Bound(account.total.bytes_sparse, account.total.flops_kept)
        goal = (RESNET_GOALS if network == "ResNet-50" else GOALS).get((pattern, zeros))
        return Cell(labels, lambda: packed(images), others, bound, Goal(goal) if goal else None)

    for network in NETWORKS:
        for batch, cases in CASES.items():
            for pattern, zeros in cases[1:2] if quick else cases:
                labels: dict[str, object] = {"network": network, "batch": batch}
                labels |= {"pattern": pattern, "zeros": f"{zeros:.0%}"}
                yield Later(labels, functools.partial(build, dict(labels), network, batch, pattern, zeros))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("sparse convnets against dense ones", cells, settle=0.01))
