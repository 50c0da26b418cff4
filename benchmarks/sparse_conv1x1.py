"""sparse_conv1x1 on the pointwise layers of MobileNet-v1 against the best dense variant of torch, batch
1."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from zoo.shared import ops
from zoo.shared.bench import Bound, Cell, Goal, main
from zoo.shared.ops.sparse_conv1x1 import sparse_conv1x1
from zoo.shared.ops.weights import SparseWeight, pack

# (in channels, out channels, side of the map)
LAYERS = (
    (32, 64, 112),
    (64, 128, 56),
    (128, 128, 56),
    (128, 256, 28),
    (256, 256, 28),
    (256, 512, 14),
    (512, 512, 14),
    (512, 1024, 7),
    (1024, 1024, 7),
)
# zeros -> goal for the geometric mean over the layers
GOALS = {
    "unstructured": {0.7: 1.3, 0.8: 1.8, 0.9: 3.2, 0.95: 4.8},
    "4x1 blocks": {0.7: 2.0, 0.8: 2.8, 0.9: 4.2, 0.95: 6.5},
}


def example(inputs: int, outputs: int, zeros: float, pattern: str) -> SparseWeight:
    if pattern == "unstructured":
        return pack(torch.randn(outputs, inputs), torch.rand(outputs, inputs) >= zeros, "csr")
    mask = (torch.rand(outputs // 4, inputs) >= zeros).repeat_interleave(4, 0)
    return pack(torch.randn(outputs, inputs), mask, "rows4")


def ours(x: Tensor, weight: SparseWeight) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with ops.backend("native"):
            return sparse_conv1x1(x, weight)

    return run


def dense_peers(x: Tensor, matrix: Tensor) -> dict[str, Callable[[], Tensor]]:
    kernel, flat = matrix[:, :, None, None].contiguous(), x[0].flatten(1)
    last = x.to(memory_format=torch.channels_last)
    kernel_last = kernel.to(memory_format=torch.channels_last)
    return {
        "matmul": lambda: matrix @ flat,
        "conv2d": lambda: torch.nn.functional.conv2d(x, kernel),
        "conv2d channels-last": lambda: torch.nn.functional.conv2d(last, kernel_last),
    }


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    for pattern, goals in GOALS.items():
        for zeros in (0.9,) if quick else goals:
            for inputs, outputs, side in LAYERS[1::3] if quick else LAYERS:
                x = torch.randn(1, inputs, side, side)
                weight = example(inputs, outputs, zeros, pattern)
                dense = weight.to_dense()
                expected = torch.nn.functional.conv2d(x, dense[:, :, None, None])
                torch.testing.assert_close(ours(x, weight)(), expected, atol=1e-3, rtol=1e-3)
                moved = weight.nbytes + 4 * side * side * (inputs + outputs)
                yield Cell(
                    {"pattern": pattern, "zeros": f"{zeros:.0%}", "layer": f"{inputs}-{outputs} @{side}"},
                    ours(x, weight),
                    dense_peers(x, dense),
                    Bound(moved, 2 * weight.kept * side * side),
                    group=f"{pattern} {zeros:.0%}",
                )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    groups = {
        f"{pattern} {zeros:.0%}": Goal(goal)
        for pattern, goals in GOALS.items()
        for zeros, goal in goals.items()
    }
    sys.exit(main("sparse pointwise convolutions against dense ones", cells, group_goals=groups))
