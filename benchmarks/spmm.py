"""spmm and its gradients against torch's CSR product, embedding_bag and gather-scatter, on graphs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from _graphs import named, torch_csr
from torch import Tensor
from torch.nn import functional

from zoo.shared import ops
from zoo.shared.bench import Bound, Cell, Goal, main
from zoo.shared.ops.csr import entry_rows
from zoo.shared.ops.spmm import spmm

GRAPHS = ("cora", "citeseer", "rmat-14-250000", "rmat-18-4000000")
WIDTHS = (16, 64, 128, 512)
# Gather-scatter is not run where its messages take more bytes: they would fill a small machine's memory.
MESSAGES = 2 << 30


def both_ways(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Forward and backward, the gradient for x being that of the sum of all outputs."""
    leaf = x.clone().requires_grad_()

    def run() -> Tensor:
        leaf.grad = None
        out = forward(leaf)
        out.backward(torch.ones_like(out))
        assert leaf.grad is not None
        return leaf.grad

    return run


def once(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: forward(x)


def weight_gradients(
    forward: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor
) -> Callable[[], None]:
    """Forward and backward for features and edge weights."""
    leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())

    def run() -> None:
        out = forward(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    for name, nodes, crow, col in named(*(GRAPHS[:3] if quick else GRAPHS)):
        weight = torch.rand(col.numel()) + 0.1
        csr32, csr64 = (torch_csr(crow, col, weight, nodes, kind) for kind in (torch.int32, torch.int64))
        rows, cols = entry_rows(crow), col.long()

        def ours(x: Tensor, w: Tensor = weight, crow: Tensor = crow, col: Tensor = col) -> Tensor:
            with ops.backend("native"):
                return spmm(crow, col, x, w)

        def gather_scatter(
            x: Tensor, w: Tensor = weight, rows: Tensor = rows, cols: Tensor = cols, nodes: int = nodes
        ) -> Tensor:
            messages = x[cols] * w[:, None]
            return x.new_zeros(nodes, x.shape[1]).scatter_add(0, rows[:, None].expand_as(messages), messages)

        def bag(x: Tensor, w: Tensor = weight, crow: Tensor = crow, col: Tensor = col) -> Tensor:
            return functional.embedding_bag(
                col, x, crow, mode="sum", per_sample_weights=w, include_last_offset=True
            )

        for width in WIDTHS[1:3] if quick else WIDTHS:
            x = torch.randn(nodes, width)
            torch.testing.assert_close(ours(x), csr64 @ x, atol=1e-3, rtol=1e-3)
            least = Bound(col.numel() * 8 + 2 * x.nbytes, 2 * col.numel() * width)
            for way, timed in (("forward", once), ("forward+backward", both_ways)):
                labels = {"graph": name, "features": width, "pass": way}
                bound = least if way == "forward" else Bound(2 * least.bytes, 2 * least.flops)
                yield Cell(
                    {**labels, "against": "torch"},
                    timed(ours, x),
                    {
                        "torch csr int32": timed(lambda x, a=csr32: a @ x, x),
                        "torch csr int64": timed(lambda x, a=csr64: a @ x, x),
                        "embedding_bag": timed(bag, x),
                    },
                    bound,
                    Goal(1.2, over=("torch csr int32", "torch csr int64")),
                )
                if col.numel() * width * 4 <= MESSAGES:
                    yield Cell(
                        {**labels, "against": "gather-scatter"},
                        timed(ours, x),
                        {"gather-scatter": timed(gather_scatter, x)},
                        bound,
                        Goal(3),
                    )
            if col.numel() * width * 4 <= MESSAGES // 4:
                yield Cell(
                    {**labels, "pass": "edge weights too", "against": "gather-scatter"},
                    weight_gradients(ours, x, weight),
                    {"gather-scatter": weight_gradients(gather_scatter, x, weight)},
                    Bound(3 * least.bytes, 3 * least.flops),
                    Goal(3),
                )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Sparse")
    sys.exit(main("spmm against torch's CSR product and gather-scatter", cells))
