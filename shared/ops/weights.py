"""The packed weight of `sparse_linear` and `sparse_conv1x1`.

Layouts of W [out, in], whose columns are cut into panels (so that a 16-bit column number is enough, and so
that the part of x that a panel meets stays in the cache). A segment is one row (or block of four rows) in
one panel; segments are stored panel after panel, row after row, and `pointer[s]` is the first entry (block)
of segment s.

- `bitmask`: a bit per weight, kept values packed; for low sparsity, where it is the smallest;
- `csr`: a 16-bit column per kept value; for high sparsity;
- `rows4`: blocks of 4 rows x 1 column, for `Block(4, 1)`; one column number and one load of x serve four
rows;
- `columns`: blocks of 1 row x 4, 8 or 16 columns, for `Block(1, C)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from ..errors import OpError
from .cache import Calls, Derived, Run
from .dense_linear import prepack, prepacks
from .layout import (
    BLOCK_WIDTHS,
    LAYOUTS,
    OVERREAD,
    PANEL,
    STORED_TYPES,
    check_weight,
    columns_of_bits,
    coordinates,
    dense_of,
    pack_bits,
    used_bits,
)
from .memory import on_huge_pages

# Above this share of zeros 16-bit columns are faster than bits at batch 1 (benchmarks/sparse_linear.py): bits
# cost the same work however few are set. Values of 16 bits are spread with fewer instructions.
BITMASK_LIMIT = 0.68
BITMASK_LIMIT_HALF = 0.73


_dense, _prepacked, _columns = (Derived[Tensor](1024) for _ in range(3))


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A packed weight W [out, in].

    Attributes:
        values: kept weights in stored order, fp32, bf16 or fp16 (fp64 for gradient checks), followed by
            `OVERREAD` zeros that are read and never used. Gradients arrive here, zero in the tail.
        index: mask bits, uint8 [segments, panel / 8]; or columns in the panel, int16 [entries + OVERREAD].
        pointer: int32 [segments + 1].
        layout: "bitmask", "csr", "rows4" or "columns".
        shape: (out, in).
        width: columns per block of "columns"; for "bitmask", 2 or 4 says that each eight columns keep just so
            many (an N:M pattern); 1 otherwise.
        calls: how calls seen before ran, see `cache.py`.
    """

    values: Float[Tensor, " stored"]
    index: Integer[Tensor, ...]
    pointer: Integer[Tensor, " segments_and_end"]
    layout: str
    shape: tuple[int, int]
    width: int = 1
    calls: Calls = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", Calls())  # not by a default factory, which dynamo cannot trace
        self.check()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy starts without what this object remembers of its calls."""
        return SparseWeight, (self.values, self.index, self.pointer, self.layout, self.shape, self.width)

    def check(self) -> None:
        """Raise OpError if the parts do not fit each other. The index is read in every call."""
        check_weight(self.values, self.index, self.pointer, self.layout, self.shape, self.width)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The stored tensors."""
        return self.values, self.index, self.pointer

    @property
    def content(self) -> tuple[Tensor, Tensor, Tensor]:
        """What of the parts counts for the dense matrix: sources of what is derived from it."""
        bits = used_bits(self.index, self.shape[1]) if self.layout == "bitmask" else self.index
        return self.values, bits, self.pointer

    @property
    def kept(self) -> int:
        """Stored weights (a partly empty block counts whole)."""
        return self.values.numel() - OVERREAD

    @property
    def density(self) -> float:
        """Stored weights over all weights; 0 for an empty shape."""
        return self.kept / max(1, self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that a product has to read."""
        tensors = (self.index, self.pointer)
        return self.kept * self.values.element_size() + sum(t.numel() * t.element_size() for t in tensors)

    def coordinates(self) -> tuple[Integer[Tensor, " kept"], Integer[Tensor, " kept"]]:
        """Row and column of each stored value, in stored order."""
        return coordinates(self.index, self.pointer, self.layout, self.shape, self.width)

    def to_dense(self) -> Float[Tensor, "out in"]:
        """The weight with its zeros; differentiable in `values`.

        Raises:
            OpError: the index does not fit (any more).
        """
        self.check()
        return dense_of(self.values, self.index, self.pointer, self.layout, self.shape, self.width)

    def expanded(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weight with its zeros, in `dtype`, without gradient; kept while nothing trains."""
        return _dense.get(self.content, lambda: self._expand(dtype), dtype)

    def expanded_run(self, x: Tensor, make: Callable[[SparseWeight, Tensor], Run]) -> Run:
        """`make(weight, expanded(x.dtype))`, for `calls`, prepacked where that is best for x: see
        `Derived.run`."""
        dtype, rows = x.dtype, x.numel() // max(1, x.shape[-1])
        if prepacks(rows, self.shape, dtype, x.device):
            return _prepacked.run(self, self.content, lambda weight: prepack(weight._expand(dtype)), make)
        return _dense.run(self, self.content, lambda weight: weight._expand(dtype), make, dtype)

    def _expand(self, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            return on_huge_pages(self.to_dense().to(dtype))

    def by_columns(self) -> tuple[str, Tensor]:
        """Layout and index of the weight for kernels without a bitmask loop; the values keep their order."""
        if self.layout != "bitmask":
            return self.layout, self.index
        _, bits, pointer = self.content
        return "csr", _columns.get((bits, pointer), self._columns_of_bits)

    def by_columns_run(self, make: Callable[[SparseWeight, Tensor], Run]) -> Run:
        """`make(weight, index by columns)` of a bitmask, for `calls`: see `Derived.run`."""
        return _columns.run(self, self.content[1:], SparseWeight._columns_of_bits, make)

    def _columns_of_bits(self) -> Tensor:
        self.check()
        return columns_of_bits(self.index)

    def to(self, target: torch.device | torch.dtype | str) -> SparseWeight:
        """A copy on another device, or with values of another dtype."""
        if isinstance(target, torch.dtype):
            return replace(self, values=on_huge_pages(self.values.to(target)))
        return replace(
            self, values=self.values.to(target), index=self.index.to(target), pointer=self.pointer.to(target)
        )


def pack(
    weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None = None, layout: str = "auto"
) -> SparseWeight:
    """Pack the kept entries of a weight.

    Args:
        weight: fp32, bf16 or fp16.
        mask: True where kept; `weight != 0` by default. Kept zeros are stored.
        layout: one of `LAYOUTS`, "columns4", "columns8" or "columns16", or "auto": blocks where the mask
        consists of
            them, else bitmask up to `BITMASK_LIMIT` zeros and csr above. A block layout stores each block
            of which any entry is kept, its other entries as zeros.

    Raises:
        OpError: wrong dtype, shape or layout; or columns that the block width does not divide.
    """
    if weight.dim() != 2 or weight.dtype not in STORED_TYPES:
        raise OpError(
            f"pack needs a 2-D floating-point weight, received {weight.dtype} {tuple(weight.shape)}"
        )
    weight = weight.detach()
    mask = weight != 0 if mask is None else mask.to(weight.device)
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise OpError(f"the mask is {mask.dtype} {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
    layout = auto_layout(weight, mask) if layout == "auto" else layout
    width = 1
    if layout.startswith("columns"):
        width = int(layout.removeprefix("columns") or 8)
        layout = "columns"
        if width not in BLOCK_WIDTHS or weight.shape[1] % width:
            raise OpError(
                f"1x{width} blocks do not fit {weight.shape[1]} columns: widths are {BLOCK_WIDTHS}, and must "
                "divide the columns (use layout='csr' otherwise)"
            )
    if layout not in LAYOUTS:
        raise OpError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}, or 'auto'")
    kept = torch.where(mask, weight, 0)
    panel, rows = PANEL, weight.shape[0]
    block = (4, 1) if layout == "rows4" else (1, width)
    # [panels, block rows, blocks in the panel, entries of a block]
    blocks = _blocks(kept, panel, block)
    held = _blocks(mask, panel, block).any(-1)
    counts = held.sum(-1).flatten()
    pointer = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(counts, 0, out=pointer[1:])
    if int(pointer[-1]) * blocks.shape[-1] >= 2**31:
        raise OpError(
            f"a packed weight holds fewer than 2^31 values, this one {int(pointer[-1])}: split its rows"
        )
    values = torch.cat([blocks[held].flatten(), weight.new_zeros(OVERREAD)])
    if layout == "bitmask":
        index = pack_bits(held.reshape(-1, panel))
    else:
        columns = held.nonzero()[:, -1] * width
        index = torch.cat([columns, columns.new_zeros(OVERREAD)]).to(torch.int16)
    values, index = on_huge_pages(values), on_huge_pages(index)
    return SparseWeight(values, index, pointer.int(), layout, (rows, weight.shape[1]), width)


def auto_layout(weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"]) -> str:
    """The layout that `pack` chooses: blocks where the mask is made of them, else by density."""
    rows, cols = mask.shape
    if mask.numel() and bool(mask.any()):
        if rows % 4 == 0 and _uniform(mask.reshape(rows // 4, 4, cols), 1):
            return "rows4"
        for width in reversed(BLOCK_WIDTHS):
            if cols % width == 0 and _uniform(mask.reshape(rows, cols // width, width), 2):
                return f"columns{width}"
    sparsity = 1 - int(mask.sum()) / max(1, mask.numel())
    # Triton's product of bits multiplies a stray neighbour by zero, which is not zero when that neighbour is
    # infinite.
    limit = BITMASK_LIMIT if weight.dtype.itemsize > 2 else BITMASK_LIMIT_HALF
    if sparsity > limit or not bool(torch.isfinite(weight).all()):
        return "csr"
    return "bitmask"


def _uniform(grouped: Tensor, dim: int) -> bool:
    return bool((grouped.any(dim) == grouped.all(dim)).all())


def whole_blocks(x: Tensor) -> Tensor:
    """[rows, cols] with rows of zeros up to a multiple of four, such as the padding of 4x1 blocks: it has no
    gradient."""
    missing = -x.shape[0] % 4
    # Older versions of torch (2.7) refuse to add no rows to none.
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def _blocks(x: Tensor, panel: int, block: tuple[int, int]) -> Tensor:
    """[rows, cols] as [panels, block rows, blocks per panel, entries], padded with zeros."""
    rows, cols = x.shape
    height, width = block
    x = torch.nn.functional.pad(x, (0, -cols % panel, 0, -rows % height))
    x = x.reshape(x.shape[0] // height, height, x.shape[1] // panel, panel // width, width)
    return x.permute(2, 0, 3, 1, 4).flatten(3)
