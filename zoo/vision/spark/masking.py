"""Which cells of an image the encoder may see, at every resolution of the network.

An image is cut into square cells, each hidden or visible as a whole. A cell is a whole number of sites at
every resolution, so one drawing decides which sites of each feature map are visible.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from zoo.errors import ConfigError
from zoo.shared.ops.rulebook import Rulebook, conv_rulebook_onto, geometry, submanifold_rulebook
from zoo.shared.ops.sparse_tensor import SparseConvTensor

#: How an encoder computes: `masked`, the definition, runs dense layers and zeroes what is hidden after each;
#: `pairs` keeps the rows of visible sites only, with convolutions over pairs of sites; `grid` keeps the same
#: rows, with dense convolutions in between; `mixed` decides for each convolution; `plain` does not mask at
#: all, for the ablation.
Mode = Literal["masked", "pairs", "grid", "mixed", "plain"]


class Choice(NamedTuple):
    """A way of computing: the mode, and in mode `mixed` the names of the convolutions over pairs."""

    mode: Mode
    pairs: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return " ".join((self.mode, *sorted(self.pairs)))

    @classmethod
    def parse(cls, text: str) -> Choice:
        """The inverse of `str`."""
        mode, *pairs = text.split()
        return cls(cast(Mode, mode), frozenset(pairs))


def kept_cells(cells: int, ratio: float) -> int:
    """How many of an image's cells stay visible: round(cells * (1 - ratio)).

    Raises:
        ConfigError: a ratio outside (0, 1), or one that hides no cell or all of them.
    """
    if not 0 < ratio < 1:
        raise ConfigError(f"the mask ratio lies between 0 and 1, both excluded; received {ratio}")
    kept = round(cells * (1 - ratio))
    if kept in (0, cells):
        every = "every cell" if kept == 0 else "no cell"
        raise ConfigError(
            f"a mask ratio of {ratio} hides {every} of {cells}; take one from {0.5 / cells:.3f} to "
            f"{1 - 0.5 / cells:.3f}, or larger images"
        )
    return kept


def draw_cells(
    batch: int, grid: tuple[int, int], ratio: float, generator: torch.Generator | None = None
) -> Bool[Tensor, "B f g"]:
    """Visible cells of each image: the same number in each, which ones by a random permutation.

    Raises:
        ConfigError: see `kept_cells`.
    """
    cells = grid[0] * grid[1]
    kept = kept_cells(cells, ratio)
    order = torch.rand(batch, cells, generator=generator).argsort(1)
    visible = torch.zeros(batch, cells, dtype=torch.bool)
    return visible.scatter_(1, order[:, :kept], True).view(batch, *grid)


class Sites(NamedTuple):
    """The visible sites of one resolution, in row-major order over the batch.

    Attributes:
        indices: (image, y, x) of each.
        flat: number of each in the whole map [B, h, w].
        shape: h and w.
    """

    indices: Int32[Tensor, "sites 3"]
    flat: Int64[Tensor, " sites"]
    shape: tuple[int, int]


class Visible:
    """The visible cells of a batch, and what follows from them at each resolution; one for a forward pass.

    Args:
        cells: True where the encoder may see.
        mode: how the encoder computes.
        pairs: in mode `mixed`, the convolutions over pairs.
    """

    def __init__(
        self, cells: Bool[Tensor, "B f g"], mode: Mode = "masked", pairs: frozenset[str] = frozenset()
    ) -> None:
        self.cells, self.mode, self._pairs = cells, mode, pairs
        self._planes: dict[tuple[int, int], Tensor] = {}
        self._sites: dict[tuple[int, int], Sites] = {}

    @property
    def rows(self) -> bool:
        """Whether features are rows of visible sites, [sites, C, 1, 1], instead of maps [B, C, h, w]."""
        return self.mode in ("pairs", "grid", "mixed")

    def over_pairs(self, layer: str) -> bool:
        """Whether the convolution of that name computes over pairs of sites."""
        return self.mode == "pairs" or (self.mode == "mixed" and layer in self._pairs)

    @cached_property
    def count(self) -> int:
        """Visible cells of the whole batch.

        Raises:
            ConfigError: there is none.
        """
        count = int(self.cells.sum())
        if count == 0:
            raise ConfigError("no cell of the batch is visible; lower the mask ratio")
        return count

    def plane(self, height: int, width: int) -> Bool[Tensor, "B 1 h w"]:
        """The visible sites of a map, each cell repeated over its sites.

        Raises:
            ConfigError: the map does not divide into the cells.
        """
        if (height, width) not in self._planes:
            factor = self._factor(height, width)
            plane = self.cells.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            self._planes[height, width] = plane[:, None]
        return self._planes[height, width]

    def sites(self, height: int, width: int) -> Sites:
        """The visible sites of a map.

        Raises:
            ConfigError: see `plane`.
        """
        if (height, width) not in self._sites:
            plane = self.plane(height, width)[:, 0]
            places = plane.nonzero()
            flat = (places[:, 0] * height + places[:, 1]) * width + places[:, 2]
            self._sites[height, width] = Sites(places.int(), flat, (height, width))
        return self._sites[height, width]

    def sites_of(self, x: Float[Tensor, "sites C 1 1"]) -> Sites:
        """The sites that rows belong to, known by their number: each resolution has its own.

        Raises:
            ConfigError: no resolution has so many.
        """
        per_cell, rest = divmod(x.shape[0], self.count)
        factor = math.isqrt(per_cell)
        if rest or factor * factor != per_cell or factor == 0:
            raise ConfigError(f"{x.shape[0]} rows are no resolution of {self.count} visible cells")
        return self.sites(self.cells.shape[1] * factor, self.cells.shape[2] * factor)

    def _factor(self, height: int, width: int) -> int:
        _, rows, columns = self.cells.shape
        factor, rest = divmod(height, rows)
        if rest or factor < 1 or width != factor * columns:
            raise ConfigError(
                f"a feature map of {height}x{width} does not divide into {rows}x{columns} cells: the image's "
                "sides must be multiples of the cell, and the cell one of the network's stride"
            )
        return factor

    def gather(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "sites C 1 1"]:
        """The visible sites of a map as rows."""
        sites = self.sites(x.shape[2], x.shape[3])
        return as_rows(_Gather.apply(x.permute(0, 2, 3, 1).flatten(0, 2), sites.flat))

    def scatter(self, x: Float[Tensor, "sites C 1 1"]) -> Float[Tensor, "B C h w"]:
        """Rows back in their map, zero where hidden."""
        sites = self.sites_of(x)
        batch, (height, width) = self.cells.shape[0], sites.shape
        grid = _Scatter.apply(x.flatten(1), sites.flat, batch * height * width)
        return grid.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def strided(self, x: Float[Tensor, "sites C 1 1"], stride: int) -> Float[Tensor, "fewer C 1 1"]:
        """The rows of every `stride`-th site in both directions.

        Raises:
            ConfigError: the map does not divide by the stride.
        """
        fine = self.sites_of(x)
        coarse = self.sites(fine.shape[0] // stride, fine.shape[1] // stride)
        image, y, x_ = coarse.indices.long().unbind(1)
        wanted = (image * fine.shape[0] + y * stride) * fine.shape[1] + x_ * stride
        rows = torch.searchsorted(fine.flat, wanted)
        return as_rows(_Gather.apply(x.flatten(1), rows))

    def tensor(self, x: Float[Tensor, "sites C 1 1"]) -> SparseConvTensor:
        """Rows as the sparse operations take them."""
        sites = self.sites_of(x)
        return SparseConvTensor(x.flatten(1), sites.indices, sites.shape, self.cells.shape[0])

    def rulebook(self, sites: Sites, layer: Any) -> Rulebook:
        """The pairs of a convolution or pooling layer from these visible sites to those of its output."""
        kernel, stride, padding, dilation = (
            _pair(value) for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        batch = self.cells.shape[0]
        centred = all(2 * p == d * (k - 1) for k, p, d in zip(kernel, padding, dilation, strict=True))
        if stride == (1, 1) and centred:
            return submanifold_rulebook(sites.indices, sites.shape, batch, kernel, dilation)
        out = geometry(2, kernel, stride, padding, dilation).out_shape(sites.shape)
        onto = self.sites(out[0], out[1]).indices
        return conv_rulebook_onto(sites.indices, sites.shape, batch, onto, kernel, stride, padding, dilation)


def as_rows(matrix: Float[Tensor, "sites C"]) -> Float[Tensor, "sites C 1 1"]:
    """Every site as a picture of 1x1."""
    return matrix[:, :, None, None]


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class _Gather(torch.autograd.Function):
    """Rows of a matrix, none of them twice, so that the gradient is a copy and not a sum."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = matrix.shape[0]
        return matrix.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, grad.shape[1]).index_copy_(0, rows, grad), None


class _Scatter(torch.autograd.Function):
    """The inverse: a matrix of `count` rows, zero but for those that are given."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(rows)
        return matrix.new_zeros(count, matrix.shape[1]).index_copy_(0, rows, matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return grad.contiguous().index_select(0, rows), None, None


class MaskContext:
    """Carries the visible cells to the layers of one encoder while it runs, for each thread apart."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def visible(self) -> Visible:
        """What the encoder of this context is looking at.

        Raises:
            ConfigError: it is not running.
        """
        visible = getattr(self._local, "visible", None)
        if visible is None:
            raise ConfigError(
                "this layer belongs to a SparK encoder and was called outside of one: call the encoder with "
                "images and visible cells, or export its weights into the plain model"
            )
        return visible

    @contextmanager
    def looking_at(self, visible: Visible) -> Iterator[Visible]:
        """Let the layers see these cells inside the block."""
        before = getattr(self._local, "visible", None)
        self._local.visible = visible
        try:
            yield visible
        finally:
            self._local.visible = before

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskContext:
        return MaskContext()

    def __reduce__(self) -> tuple[type[MaskContext], tuple[()]]:
        return MaskContext, ()
