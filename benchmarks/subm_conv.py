"""Submanifold convolution against the dense one, gather-multiply-scatter and, if installed, spconv."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shared import ops
from shared.bench import Bound, Cell, Goal, main
from shared.ops.rulebook import submanifold_rulebook
from shared.ops.sparse_conv import subm_conv
from shared.ops.sparse_tensor import SparseConvTensor

CONV = {2: functional.conv2d, 3: functional.conv3d}
SPCONV = importlib.util.find_spec("spconv") is not None


def random_sites(shape: tuple[int, ...], share: float) -> Tensor:
    return (torch.rand(1, *shape) < share).nonzero().int().contiguous()


def block_sites(shape: tuple[int, ...], share: float) -> Tensor:
    """Patches of 8 cells a side, as masked-image pre-training leaves them."""
    coarse = (torch.rand(1, *(n // 8 for n in shape)) < share).float()[:, None]
    return functional.interpolate(coarse, scale_factor=8)[:, 0].nonzero().int().contiguous()


def surface_sites(shape: tuple[int, ...], share: float) -> Tensor:
    """Sheets one cell thick, as a scanner sees the world; `share` fixes their number."""
    grid = torch.zeros(1, *shape, dtype=torch.bool)
    y, x = torch.meshgrid(torch.arange(shape[1]), torch.arange(shape[2]), indexing="ij")
    for _ in range(max(1, round(share * shape[0]))):
        slope, base = (torch.rand(2) - 0.5), torch.randint(shape[0], ())
        height = (base + slope[0] * y + slope[1] * x).long() % shape[0]
        grid[0, height, y, x] = True
    return grid.nonzero().int().contiguous()


# (name, shape, sites, occupied shares, channels)
QUICK = [("3D random", (48, 48, 48), random_sites, (0.05, 0.2), (16, 64))]
FULL = [
    ("3D random", (48, 48, 48), random_sites, (0.01, 0.05, 0.1, 0.2, 0.4), (16, 32, 64)),
    ("3D block", (40, 40, 40), block_sites, (0.05, 0.2, 0.4), (16, 32, 64, 128)),
    ("3D surface", (40, 40, 40), surface_sites, (0.06, 0.21), (16, 32, 64, 128)),
    ("2D random", (128, 128), random_sites, (0.05, 0.2, 0.4), (16, 32, 64, 128)),
    ("2D block", (128, 128), block_sites, (0.05, 0.2, 0.4), (16, 32, 64, 128)),
]


def spconv_peers(x: SparseConvTensor, weight: Tensor, expected: Tensor) -> dict[str, Callable[[], Any]]:
    """spconv on one thread, all that its CPU build does correctly: pairs cached, and made in each call."""
    import spconv.pytorch as spconv

    dims, channels = len(x.spatial_shape), weight.shape[-1]
    kind = {2: spconv.SubMConv2d, 3: spconv.SubMConv3d}[dims]
    out = weight.shape[0]
    cached, fresh = (kind(channels, out, 3, bias=False, indice_key=key) for key in ("pairs", None))
    with torch.no_grad():
        for layer in (cached, fresh):
            layer.weight.copy_(weight)

    def tensor() -> Any:
        return spconv.SparseConvTensor(x.features, x.indices, list(x.spatial_shape), 1)

    kept = tensor()

    def run(layer: Callable[[Any], Any], make: Callable[[], Any]) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                return layer(make())
        finally:
            torch.set_num_threads(before)

    torch.testing.assert_close(run(cached, lambda: kept).features, expected, atol=1e-3, rtol=1e-3)
    return {
        "spconv, 1 thread": lambda: run(cached, lambda: kept),
        "spconv with pairs, 1 thread": lambda: run(fresh, tensor),
    }


def training(forward: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Callable[[], None]:
    leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())

    def run() -> None:
        out = forward(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def cells(quick: bool, threads: int) -> Iterator[Cell]:
    torch.manual_seed(0)
    for name, shape, make, shares, widths in QUICK if quick else FULL:
        for share in shares:
            indices = make(shape, share)
            dims, sites = len(shape), len(indices)
            book = submanifold_rulebook(indices, shape, 1, 3)
            pairs = book.forward.source.numel()
            for channels in widths:
                x = SparseConvTensor(torch.randn(sites, channels), indices, shape, 1)
                weight = torch.randn(channels, *(3,) * dims, channels) / (channels * 3**dims) ** 0.5
                kernel, grid = weight.movedim(-1, 1).contiguous(), x.dense()
                last = torch.channels_last if dims == 2 else torch.channels_last_3d
                kernel_last, grid_last = kernel.to(memory_format=last), grid.to(memory_format=last)

                def ours(x: SparseConvTensor = x, weight: Tensor = weight) -> Tensor:
                    with torch.no_grad():
                        return subm_conv(x, weight).features

                def with_pairs(x: SparseConvTensor = x, weight: Tensor = weight) -> Tensor:
                    fresh = SparseConvTensor(x.features, x.indices.clone(), x.spatial_shape, 1)
                    with torch.no_grad():
                        return subm_conv(fresh, weight).features

                def scatter(x: SparseConvTensor = x, weight: Tensor = weight) -> Tensor:
                    with torch.no_grad(), ops.backend("reference"):
                        return subm_conv(x, weight).features

                def conv(grid: Tensor, kernel: Tensor, dims: int = dims) -> Tensor:
                    return CONV[dims](grid, kernel, padding=1)

                def trained(features: Tensor, kernel: Tensor, x: SparseConvTensor = x) -> Tensor:
                    return subm_conv(x.replace_feature(features), kernel).features

                dense = {
                    "dense": functools.partial(conv, grid, kernel),
                    "dense channels last": functools.partial(conv, grid_last, kernel_last),
                }
                index = tuple(indices.long().unbind(1))
                expected = dense["dense"]().movedim(1, -1)[index]
                torch.testing.assert_close(ours(), expected, atol=1e-3, rtol=1e-3)
                peers = spconv_peers(x, weight, expected) if SPCONV else {}
                occupied = f"{sites / grid[0, 0].numel():.0%}"
                labels = {"sites": name, "occupied": occupied, "channels": channels}
                bound = Bound(4 * (2 * x.features.numel() + weight.numel()), 2 * pairs * channels**2)
                for what, function, over in (
                    ("forward", ours, "spconv, 1 thread"),
                    ("forward with pairs", with_pairs, "spconv with pairs, 1 thread"),
                ):
                    goal = Goal(1 if threads == 1 else 1.7, over=(over,)) if SPCONV else None
                    own = {key: peer for key, peer in peers.items() if key == over}
                    extra = {"gather-mm-scatter": scatter} if what == "forward" else {}
                    yield Cell(labels | {"what": what}, function, {**dense, **extra, **own}, bound, goal)
                if share in (0.2, 0.4) and channels == 64:
                    yield Cell(
                        labels | {"what": "training"},
                        training(trained, x.features, weight),
                        {
                            "dense": training(conv, grid, kernel),
                            "dense channels last": training(conv, grid_last, kernel_last),
                        },
                        Bound(3 * bound.bytes, 3 * bound.flops), Goal(4 if share == 0.2 else 2),
                    )


if __name__ == "__main__":
    if not SPCONV:
        print("spconv is not installed: it is left out, with the goals that are about it", file=sys.stderr)
    sys.exit(main("submanifold convolution is faster than dense and than spconv, also in training", cells))
