"""The stored weight of `gather_linear`: dense, in rows of which whole ones are skipped; plain or
quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from .cache import Derived
from .memory import on_huge_pages

KINDS = ("float32", "bfloat16", "float16", "int8", "int4")  # in the order of `enum Kind` in gather_linear.cpp
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)
ALIGN = 16
_dequantised = Derived[Tensor]()


@dataclass(frozen=True, eq=False)
class DenseRows:
    """A matrix [rows, cols] stored row by row.

    Attributes:
        data: [rows, stride], or [rows, stride / 2] of two values per byte (low half first, 8 added) for
        int4;
            columns beyond `cols` are zero.
        scales: fp16 [rows, stride / group] for int8 and int4, else None. w = scale * q.
        cols: columns that count.
        group: consecutive columns that share a scale.
    """

    data: Tensor
    scales: Tensor | None
    kind: str
    cols: int
    group: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OpError(f"unknown kind of weight {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.data.dim() != 2 or self.data.dtype != _DTYPES[KINDS.index(self.kind)]:
            raise OpError(
                f"a {self.kind} weight is 2-D {_DTYPES[KINDS.index(self.kind)]}, not {self.data.dtype}"
            )
        if self.stride % ALIGN or not self.cols <= self.stride or not self.data.is_contiguous():
            raise OpError(
                f"stored rows must be contiguous and padded to a multiple of {ALIGN} values of which "
                f"{self.cols} count, received {tuple(self.data.shape)} with strides {self.data.stride()}"
            )
        if not self.quantised:
            return
        expected = (self.rows, self.stride // max(1, self.group))
        if self.group < ALIGN or self.group % ALIGN or self.stride % self.group:
            raise OpError(
                f"group must be a multiple of {ALIGN} that divides {self.stride}, received {self.group}"
            )
        scales = self.scales
        if scales is None or scales.dtype != torch.float16 or scales.shape != expected:
            found = None if scales is None else (scales.dtype, tuple(scales.shape))
            raise OpError(f"a {self.kind} weight has fp16 scales {expected}, received {found}")
        if not scales.is_contiguous() or scales.device != self.data.device:
            raise OpError("scales must be contiguous and on the device of the data")

    @property
    def quantised(self) -> bool:
        return self.kind in ("int8", "int4")

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def stride(self) -> int:
        """Values per stored row, with padding."""
        return self.data.shape[1] * (2 if self.kind == "int4" else 1)

    @property
    def nbytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.numel() * 2
        return self.data.numel() * self.data.element_size() + scales

    def dense(self) -> Float[Tensor, "rows cols"]:
        """The matrix: a view for the float kinds; fp32, kept while the weight lives as it is, for the
        quantised ones."""
        if not self.quantised:
            return self.data[:, : self.cols]
        sources = (self.data,) if self.scales is None else (self.data, self.scales)
        return _dequantised.get(sources, self._dequantise, (self.kind, self.group))[:, : self.cols]

    def _dequantise(self) -> Tensor:
        codes = self.data.float()
        if self.kind == "int4":
            codes = torch.stack([self.data & 15, self.data >> 4], -1).flatten(1).float() - 8
        if self.scales is None:
            raise OpError(f"a {self.kind} weight needs scales")
        return codes * self.scales.float().repeat_interleave(self.group, 1)


def store_rows(matrix: Float[Tensor, "rows cols"], kind: str | None = None, group: int = 64) -> DenseRows:
    """Store a matrix row by row.

    Args:
        matrix: fp32, bf16 or fp16.
        kind: one of `KINDS`; the matrix's own dtype by default. int8 and int4 are symmetric: a scale per
        `group`
            columns is the largest magnitude over 127 or 7, values are rounded to the nearest.

    Raises:
        OpError: unknown kind or dtype, or a group that is no multiple of 16.
    """
    kind = kind or str(matrix.dtype).removeprefix("torch.")
    if kind not in KINDS or matrix.dim() != 2:
        raise OpError(f"cannot store a {matrix.dim()}-D matrix as {kind!r}: kinds are {', '.join(KINDS)}")
    quantised = kind in ("int8", "int4")
    if quantised and (group < ALIGN or group % ALIGN):
        raise OpError(f"group must be a multiple of {ALIGN}, received {group}")
    cols = matrix.shape[1]
    padded = torch.nn.functional.pad(matrix.detach(), (0, -cols % (group if quantised else ALIGN)))
    if not quantised:
        stored = padded.to(_DTYPES[KINDS.index(kind)]).contiguous()
        return DenseRows(on_huge_pages(stored), None, kind, cols, group)
    most = 127 if kind == "int8" else 7
    grouped = padded.float().reshape(matrix.shape[0], padded.shape[1] // group, group)
    scales = (grouped.abs().amax(-1) / most).half()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (grouped / scales.float().unsqueeze(-1)).round().clamp(-most, most).flatten(1)
    if kind == "int8":
        return DenseRows(on_huge_pages(codes.to(torch.int8)), scales, kind, cols, group)
    nibbles = (codes + 8).to(torch.uint8)
    packed = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous()
    return DenseRows(on_huge_pages(packed), scales, kind, cols, group)
