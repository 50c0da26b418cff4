"""Tiled-CSL, the weight format of Flash-LLM (Xia et al., VLDB 2024): load as sparse, compute as dense.

W [M, K] is cut into tiles of 128 x 64, stored row of tiles by row of tiles. Each kept weight is one 32-bit
word: the fp16 value in the low half, its place in the tile in the high half,

    place = row * 64 + (column XOR ((row mod 8) * 8)),

where the XOR spreads the rows of a column over the banks of shared memory. A tile's words are padded to a
multiple of four, for 128-bit loads, with zeros that sit at places of the tile where no weight is kept;
`offsets` counts in fours, and its last entry is repeated, an empty tile for prefetching.

Backend `native` is the paper's load-as-sparse, compute-as-dense (LSCD) product on a CPU: a tile is spread out
into the first-level cache and multiplied there with its zeros. `zoo reproduce flash-llm` compares it with
`sparse_linear`, which multiplies only what is kept and is what packed models run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import FormatError, OpError
from . import _native, dispatch

TILE_ROWS, TILE_COLUMNS = 128, 64
_PLACES = TILE_ROWS * TILE_COLUMNS
_VECTOR = 4  # words per load
# 128 threads hold 32 words each: the released kernel drops what a denser tile holds beyond, unchecked.
KERNEL_CAPACITY = 4096


@dataclass(frozen=True)
class TiledCSL:
    """A packed weight.

    Attributes:
        words: int32 (as bits), all tiles' words one after the other.
        offsets: int32 [tiles + 2], in fours of words.
        shape: (M, K) of the weight before padding to whole tiles.
    """

    words: Int[Tensor, " words"]
    offsets: Int[Tensor, " tiles_and_two"]
    shape: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.shape[0] // TILE_ROWS), -(-self.shape[1] // TILE_COLUMNS)

    @property
    def nbytes(self) -> int:
        """Bytes of words and offsets."""
        return 4 * (self.words.numel() + self.offsets.numel())

    @property
    def fullest_tile(self) -> int:
        """Most words of a tile; the released kernel takes at most `KERNEL_CAPACITY`."""
        return int(self.offsets.diff().max()) * _VECTOR

    def to_dense(self) -> Float[Tensor, "rows columns"]:
        """The weight, fp16, with exact zeros.

        Raises:
            FormatError: offsets that fall or do not end at the last word, or a place beyond the tile.
        """
        counts = self.offsets[:-1].diff().long() * _VECTOR
        tiles = self.grid[0] * self.grid[1]
        total = int(self.offsets[-1]) * _VECTOR
        if len(counts) != tiles or bool((counts < 0).any()) or total != self.words.numel() or self.offsets[0]:
            raise FormatError(
                f"Tiled-CSL offsets do not describe {tiles} tiles of {self.words.numel()} words: pack it anew"
            )
        place = (self.words >> 16) & 0xFFFF
        if bool((place >= _PLACES).any()):
            raise FormatError(
                f"a word's place {int(place.max())} lies outside its tile of {_PLACES}: pack it anew"
            )
        row = place // TILE_COLUMNS
        column = (place % TILE_COLUMNS) ^ ((row % 8) * 8)
        tile = torch.repeat_interleave(torch.arange(tiles, device=counts.device), counts)
        values = (self.words & 0xFFFF).to(torch.int16).view(torch.float16)
        dense = values.new_zeros(tiles, TILE_ROWS, TILE_COLUMNS)
        filled = values != 0  # padding words are zeros at free places; a kept zero is one, too
        dense[tile[filled], row[filled].long(), column[filled].long()] = values[filled]
        down, across = self.grid
        whole = dense.view(down, across, TILE_ROWS, TILE_COLUMNS).transpose(1, 2)
        return whole.reshape(down * TILE_ROWS, -1)[: self.shape[0], : self.shape[1]].contiguous()


def pack_tiled_csl(
    weight: Float[Tensor, "rows columns"], mask: Bool[Tensor, "*shape"] | None = None
) -> TiledCSL:
    """Pack the kept entries of a weight, rounded to fp16.

    Args:
        weight: of any shape; it is padded to whole tiles with zeros.
        mask: True where kept; by default `weight != 0` after rounding. -0 counts as zero.

    Raises:
        OpError: a weight that is NaN or beyond fp16, a mask of another shape, or a tile so full that its
            padding has no free place (any tile with one, two or three places free of which too few are left).
    """
    if mask is not None and mask.shape != weight.shape:
        raise OpError(f"the mask is {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
    half = weight.detach().half()
    if not bool(torch.isfinite(half).all()):
        raise OpError("Tiled-CSL holds finite fp16 values; the weight has NaN, infinite or larger ones")
    kept = half != 0 if mask is None else mask
    rows, columns = weight.shape
    tiled_values, tiled_kept = _tiles(torch.where(kept, half, 0)), _tiles(kept)
    counts = tiled_kept.flatten(1).sum(1)
    padding = -counts % _VECTOR
    free = _PLACES - counts
    if bool((padding > free).any()):
        raise OpError("a tile has too few zeros to pad its words to a multiple of four")
    # The first free places host the padding: a running count of the free places of each tile says which.
    spare = ~tiled_kept.flatten(1)
    chosen = tiled_kept.flatten(1) | (spare & (spare.cumsum(1) <= padding[:, None]))
    place = torch.arange(_PLACES, device=weight.device)
    row = place // TILE_COLUMNS
    swizzled = row * TILE_COLUMNS + ((place % TILE_COLUMNS) ^ ((row % 8) * 8))
    tile, where = chosen.nonzero(as_tuple=True)
    bits = tiled_values.flatten(1)[tile, where].view(torch.int16).int() & 0xFFFF
    words = (swizzled[where].int() << 16) | bits
    offsets = torch.zeros(len(counts) + 2, dtype=torch.int32, device=weight.device)
    offsets[1:-1] = ((counts + padding) // _VECTOR).cumsum(0)
    offsets[-1] = offsets[-2]
    return TiledCSL(words, offsets, (rows, columns))


def _tiles(matrix: Tensor) -> Tensor:
    """[rows, columns] as [tiles, 128, 64], padded with zeros."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    grid = padded.unflatten(0, (-1, TILE_ROWS)).unflatten(2, (-1, TILE_COLUMNS))
    return grid.transpose(1, 2).reshape(-1, TILE_ROWS, TILE_COLUMNS)


def tiled_bytes(rows: int, columns: int, kept: int) -> tuple[int, int]:
    """Least and greatest bytes of a packed weight: 4 per kept weight, up to 12 of padding per tile, and 4
    for each of tiles + 2 offsets."""
    tiles = math.ceil(rows / TILE_ROWS) * math.ceil(columns / TILE_COLUMNS)
    least = 4 * kept + 4 * (tiles + 2)
    return least, least + 12 * tiles


def tiled_linear(x: Float[Tensor, "*batch columns"], weight: TiledCSL) -> Float[Tensor, "*batch rows"]:
    """y = x W^T: loaded as sparse, computed as dense (Flash-LLM, Section 4).

    Args:
        x: floating point. Its infinities and NaNs meet the zeros of W, too, as in a dense product.

    Sums are in fp32 (fp64 for fp64) and do not depend on the number of threads. Gradients reach x.

    Raises:
        OpError: x is not floating point, lies elsewhere, or does not end in the weight's columns; a damaged
            weight.
    """
    if dispatch.direct(x, weight.words):
        return _forward(x, weight)
    return _tiled_linear(x, weight.words, weight.offsets, *weight.shape)


def reference(x: Float[Tensor, "*batch columns"], weight: TiledCSL) -> Float[Tensor, "*batch rows"]:
    """The definition of `tiled_linear`: all tiles expanded, then one dense product."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.nn.functional.linear(x.to(wide), weight.to_dense().to(wide)).to(x.dtype)


def plan(x: Float[Tensor, "*batch columns"], weight: TiledCSL) -> dispatch.Plan:
    """The backend that `tiled_linear` would run these arguments on."""
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise OpError(f"x {tuple(x.shape)} does not end in the {weight.shape[1]} columns of the weight")
    if not x.dtype.is_floating_point or x.device != weight.words.device:
        raise OpError(f"x must be floating point on {weight.words.device}, received {x.dtype} on {x.device}")
    native = x.device.type == "cpu" and x.dtype != torch.float64
    offered = ("native", "reference") if native else ("reference",)
    return dispatch.choose("tiled_linear", x.device, offered, "float16", (float(max(1, x.numel())),))


@dispatch.in_own_precision
def _forward(x: Tensor, weight: TiledCSL) -> Tensor:
    if plan(x, weight).backend != "native" or not x.numel() or not weight.shape[0]:
        return reference(x, weight)
    flat = _native.plain(x.reshape(-1, weight.shape[1]))
    y = torch.empty(len(flat), weight.shape[0])
    words, ends = weight.words.contiguous(), weight.offsets.contiguous()
    if len(ends) != math.prod(weight.grid) + 2:
        raise OpError(f"Tiled-CSL offsets do not describe {math.prod(weight.grid)} tiles: pack it anew")
    _native.function("zoo_tiled_csl", "ppippiiii")(
        flat.data_ptr(),
        words.data_ptr(),
        words.numel(),
        ends.data_ptr(),
        y.data_ptr(),
        len(flat),
        weight.shape[1],
        weight.shape[0],
        _native.threads(),
    )
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op(
    "zoo::tiled_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor words, Tensor offsets, int rows, int columns) -> Tensor",
)
def _tiled_linear(x: Tensor, words: Tensor, offsets: Tensor, rows: int, columns: int) -> Tensor:
    return _forward(x, TiledCSL(words, offsets, (rows, columns)))


@_tiled_linear.register_fake
def _(x: Tensor, words: Tensor, offsets: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, words, offsets, *shape = inputs
    ctx.save_for_backward(words, offsets)
    ctx.shape = tuple(shape)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, offsets = ctx.saved_tensors
    weight = TiledCSL(words, offsets, ctx.shape)
    return grad @ weight.to_dense().to(grad.dtype), None, None, None, None


_tiled_linear.register_autograd(_backward, setup_context=_setup)


def _examples() -> Iterator[dispatch.Example]:
    for shape, batch in (((130, 70), 9), ((64, 64), 1), ((300, 33), 3)):
        weight = torch.randn(shape) * (torch.rand(shape) < 0.3)
        call = partial(tiled_linear, weight=pack_tiled_csl(weight))
        yield dispatch.Example(call, (torch.randn(batch, shape[1]),), tolerance=1e-4)


dispatch.register("tiled_linear", plan=plan, examples=_examples)
