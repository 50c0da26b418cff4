"""Submanifold convolution against the dense one, gather-multiply-scatter and, if installed, spconv."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zoo.shared import ops
from zoo.shared.bench import Bound, Cell, Goal, Later, main
from zoo.shared.ops.rulebook import submanifold_rulebook
from zoo.shared.ops.sparse_conv import subm_conv
from zoo.shared.ops.sparse_tensor import SparseConvTensor

CONV = {2: functional.conv2d, 3: functional.conv3d}
SPCONV = importlib.util.find_spec("spconv") is not None
# Its CPU build, with the pairs of sites cached and made in each call, is right on one thread only.
VERSION = importlib.metadata.version("spconv") if SPCONV else ""
PEERS = (f"spconv {VERSION}, 1 thread", f"spconv {VERSION} with pairs, 1 thread")


def random_sites(shape: tuple[int, ...], share: float) -> Tensor:
    return (torch.rand(1, *shape) < share).nonzero().int().contiguous()


def block_sites(shape: tuple[int, ...], share: float) -> Tensor:
    """Patches of 8 cells a side, as masked-image pre-training leaves them."""
    patches = torch.rand(1, *(n // 8 for n in shape))
    most = patches.flatten().kthvalue(max(1, round(share * patches.numel()))).values
    coarse = (patches <= most).float()[:, None]
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
    """spconv with cached pairs, and making them in each call."""
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
        PEERS[0]: lambda: run(cached, lambda: kept),
        PEERS[1]: lambda: run(fresh, tensor),
    }


def training(forward: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Callable[[], None]:
    leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())

    def run() -> None:
        out = forward(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


class Problem:
    """A convolution C -> C on a set of sites, and everybody who can compute it."""

    def __init__(self, indices: Tensor, shape: tuple[int, ...], channels: int) -> None:
        dims, sites = len(shape), len(indices)
        self.x = SparseConvTensor(torch.randn(sites, channels), indices, shape, 1)
        self.weight = torch.randn(channels, *(3,) * dims, channels) / (channels * 3**dims) ** 0.5
        grid, kernel = self.x.dense(), self.weight.movedim(-1, 1).contiguous()
        last = torch.channels_last if dims == 2 else torch.channels_last_3d
        self.dense = {
            "dense": (grid, kernel),
            "dense channels last": (grid.to(memory_format=last), kernel.to(memory_format=last)),
        }
        pairs = submanifold_rulebook(indices, shape, 1, 3).forward.source.numel()
        self.bound = Bound(4 * (2 * self.x.features.numel() + self.weight.numel()), 2 * pairs * channels**2)
        expected = self.conv(grid, kernel).movedim(1, -1)[tuple(indices.long().unbind(1))]
        torch.testing.assert_close(self.ours(), expected, atol=1e-3, rtol=1e-3)
        self.spconv = spconv_peers(self.x, self.weight, expected) if SPCONV else {}

    def conv(self, grid: Tensor, kernel: Tensor) -> Tensor:
        return CONV[grid.dim() - 2](grid, kernel, padding=1)

    def ours(self) -> Tensor:
        with torch.no_grad():
            return subm_conv(self.x, self.weight).features

    def ours_with_pairs(self) -> Tensor:
        fresh = SparseConvTensor(self.x.features, self.x.indices.clone(), self.x.spatial_shape, 1)
        with torch.no_grad():
            return subm_conv(fresh, self.weight).features

    def scatter(self) -> Tensor:
        with ops.backend("reference"):
            return self.ours()

    def trained(self, features: Tensor, weight: Tensor) -> Tensor:
        return subm_conv(self.x.replace_feature(features), weight).features

    def cell(self, labels: Mapping[str, object], goal: Goal | None) -> Cell:
        """The cell that labels["what"] names. Dense programs are the same with and without pairs."""
        dense = {name: functools.partial(self.conv, *both) for name, both in self.dense.items()}
        if labels["what"] == "training":
            forward = {name: training(self.conv, *both) for name, both in self.dense.items()}
            bound = Bound(3 * self.bound.bytes, 3 * self.bound.flops)
            return Cell(labels, training(self.trained, self.x.features, self.weight), forward, bound, goal)
        if labels["what"] == "forward":
            peers = {**dense, "gather-mm-scatter": self.scatter}
            peers.update({name: run for name, run in self.spconv.items() if name == PEERS[0]})
            return Cell(labels, self.ours, peers, self.bound, goal)
        peers = self.spconv and {PEERS[1]: self.spconv[PEERS[1]]}
        peers["dense channels last"] = dense["dense channels last"]
        return Cell(labels, self.ours_with_pairs, peers, self.bound, goal)


def cells(quick: bool, threads: int) -> Iterator[Later]:
    torch.manual_seed(0)
    for name, shape, make, shares, widths in QUICK if quick else FULL:
        for share in shares:
            indices = make(shape, share)
            occupied = f"{len(indices) / math.prod(shape):.0%}"
            for channels in widths:
                problem = functools.cache(functools.partial(Problem, indices, shape, channels))
                labels = {"sites": name, "occupied": occupied, "channels": channels}
                faster = 1 if threads == 1 else 1.7  # than spconv, which has one thread
                goals = {
                    "forward": Goal(faster, over=PEERS[:1]) if SPCONV else None,
                    "forward with pairs": Goal(faster, over=PEERS[1:]) if SPCONV else None,
                }
                if share in (0.2, 0.4) and channels == 64:
                    goals["training"] = Goal(4 if share == 0.2 else 2)
                for what, goal in goals.items():
                    full = {**labels, "what": what}
                    yield Later(full, lambda p=problem, f=full, g=goal: p().cell(f, g))


if __name__ == "__main__":
    if not SPCONV:
        print("spconv is not installed: it is left out, with the goals that are about it", file=sys.stderr)
    sys.exit(main("submanifold convolution against dense and spconv, also in training", cells))
