"""Projection on the l0 ball and masked steps over a model's weights against torch and numpy."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from zoo.shared.bench import Bound, Cell, Goal, main
from zoo.shared.ops.select import apply_mask_, keep_largest_, threshold_and_ties

# Entries in all: TEDDY's GCN on Cora (0.74 M), a ResNet-50 (25 M), twice that.
SIZES = (740_000, 25_000_000, 50_000_000)
KEPT = 0.1


def layers(total: int) -> list[Tensor]:
    """Tensors of unequal size and scale, as the layers of a network are."""
    sizes = [total // 2, total // 4, total // 8, total - total // 2 - total // 4 - total // 8]
    return [torch.randn(size) * scale for size, scale in zip(sizes, (0.02, 0.05, 0.1, 0.3), strict=True)]


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    for total in SIZES[:1] if quick else SIZES:
        tensors = layers(total)
        kept = int(KEPT * total)
        label = {"entries": total, "kept": f"{KEPT:.0%}"}

        def joined(tensors: list[Tensor] = tensors) -> Tensor:
            return torch.cat([tensor.reshape(-1) for tensor in tensors]).abs_()

        def partition(total: int = total, kept: int = kept) -> float:
            values = joined().numpy()
            values.partition(total - kept)
            return float(values[total - kept])

        threshold = threshold_and_ties(tensors, kept).value
        if threshold != partition():
            raise AssertionError(f"{threshold} is not the {kept}-th largest magnitude, {partition()}")
        yield Cell(
            label | {"what": "threshold"},
            lambda t=tensors, k=kept: threshold_and_ties(t, k),
            {
                "torch.topk": lambda k=kept: torch.topk(joined(), k, sorted=False),
                "torch.kthvalue": lambda n=total, k=kept: torch.kthvalue(joined(), n - k + 1),
                "numpy partition": partition,
            },
            Bound(4 * total),
            # Over fewer entries the sample that brackets the rank is a good part of the work.
            Goal(10 if total >= 10_000_000 else 5, over=("torch.topk",)),
        )

        # Projected tensors would be full of ties at zero: the projection is timed on fresh copies.
        work = [tensor.clone() for tensor in tensors]

        def refresh(work: list[Tensor] = work, tensors: list[Tensor] = tensors) -> None:
            for to, tensor in zip(work, tensors, strict=True):
                to.copy_(tensor)

        def ours(work: list[Tensor] = work, kept: int = kept) -> None:
            refresh()
            keep_largest_(work, kept)

        def by_numpy(work: list[Tensor] = work) -> None:
            refresh()
            value = partition()
            for tensor in work:
                array = tensor.numpy()
                array[np.abs(array) < value] = 0

        def by_topk(work: list[Tensor] = work, kept: int = kept) -> None:
            refresh()
            value = torch.topk(joined(), kept, sorted=False).values.min()
            for tensor in work:
                tensor.masked_fill_(tensor.abs() < value, 0)

        yield Cell(
            label | {"what": "copy and project"},
            ours,
            {"numpy": by_numpy, "torch.topk": by_topk},
            Bound((8 + 4 + 8) * total),
            Goal(1, over=("numpy",)),
        )

        masks = [torch.rand(tensor.shape) < KEPT for tensor in tensors]
        moments = [(torch.randn_like(tensor), torch.rand_like(tensor)) for tensor in tensors]
        groups = [(w, *m) for w, m in zip(work, moments, strict=True)]

        def ours_masked(groups: list[tuple[Tensor, ...]] = groups, masks: list[Tensor] = masks) -> None:
            for group, mask in zip(groups, masks, strict=True):
                apply_mask_(group, mask)

        def multiplied(groups: list[tuple[Tensor, ...]] = groups, masks: list[Tensor] = masks) -> None:
            for group, mask in zip(groups, masks, strict=True):
                for tensor in group:
                    tensor.mul_(mask)

        def filled(groups: list[tuple[Tensor, ...]] = groups, masks: list[Tensor] = masks) -> None:
            for group, mask in zip(groups, masks, strict=True):
                for tensor in group:
                    tensor.masked_fill_(~mask, 0)

        yield Cell(
            label | {"what": "mask weight and two moments"},
            ours_masked,
            {"mul_": multiplied, "masked_fill_": filled},
            Bound((1 + 3 * 8) * total),
            Goal(1),
        )


if __name__ == "__main__":
    sys.exit(main("selection over all weights against torch", cells))
