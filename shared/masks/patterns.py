"""Where zeros may lie: patterns as small frozen values that turn a score and a count into a mask.

Every pattern cuts a tensor into *units* that are kept or dropped together: one weight (`Unstructured`, `NM`),
a tile of the (out, rest) matrix (`Block`), a slice (`Group`) or everything (`Whole`). The score of a unit is
the mean over its entries, so that units of different sizes can be compared. Counts are exact; equal scores
are decided by position, lower index first.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Bool, Num
from torch import Tensor

from ..errors import PatternError
from .topk import topk_mask

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Group",
    "Pattern",
    "Unstructured",
    "Whole",
    "parse_pattern",
    "pattern_from_dict",
    "topk_mask",
]


@dataclass(frozen=True)
class Pattern(ABC):
    """Base of the patterns. `str(pattern)` is what `parse_pattern` reads, `to_dict()` what
    `pattern_from_dict` reads."""

    @abstractmethod
    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises PatternError, with a remedy, if tensors of this shape cannot carry the pattern."""

    @abstractmethod
    def units(self, shape: Sequence[int]) -> int:
        """How many units a tensor of this shape has."""

    @abstractmethod
    def pool(self, score: Num[Tensor, "*shape"]) -> Num[Tensor, " units"]:
        """The score of each unit: the mean over its entries."""

    @abstractmethod
    def expand(self, kept_units: Bool[Tensor, " units"], shape: Sequence[int]) -> Tensor:
        """The mask of the given shape whose units are kept or dropped as said."""

    def unit_size(self, shape: Sequence[int]) -> int:
        """Entries per unit."""
        return math.prod(shape) // max(1, self.units(shape))

    @property
    def fixed_density(self) -> Fraction | None:
        """The share that is kept where the pattern alone decides it (N:M), else None."""
        return None

    def at(self, sparsity: float) -> Pattern:
        """The pattern on the way to its goal, at an intermediate sparsity; only N:M passes through others."""
        return self

    def feasible(self, shape: Sequence[int], kept: int) -> int:
        """The largest count the pattern can keep on this shape without exceeding `kept` (N:M: its own count
        always)."""
        self.check_shape(shape)
        size = self.unit_size(shape)
        return min(max(kept, 0), math.prod(shape)) // max(1, size) * size

    def max_sparsity(self, shape: Sequence[int]) -> float:
        """The largest share of zeros that leaves at least one unit (0 for an empty tensor)."""
        self.check_shape(shape)
        numel = math.prod(shape)
        return 1 - self.unit_size(shape) / numel if numel else 0.0

    def keep(self, score: Num[Tensor, "*shape"], kept: int) -> Bool[Tensor, "*shape"]:
        """The mask that keeps exactly `kept` entries, those of the best units.

        Raises:
            PatternError: `kept` is not a whole number of units, the shape does not fit, or a score is NaN.
        """
        shape = tuple(score.shape)
        if self.feasible(shape, kept) != kept:
            size = self.unit_size(shape)
            raise PatternError(
                f"{self} on shape {shape} keeps multiples of {size} up to {score.numel()}; received {kept}, "
                f"use feasible() which gives {self.feasible(shape, kept)}"
            )
        units = topk_mask(self.pool(score), kept // max(1, self.unit_size(shape)))
        return self.expand(units, shape)

    def check(self, mask: Bool[Tensor, "*shape"]) -> None:
        """Raises PatternError if the mask keeps part of a unit."""
        self.check_shape(tuple(mask.shape))
        share = self.pool(mask.float())
        partial = int(((share > 0) & (share < 1)).sum())
        if partial:
            raise PatternError(
                f"the mask keeps only a part of {partial} of {share.numel()} units of {self}; "
                "rebuild it with keep() or declare it Unstructured()"
            )

    def to_dict(self) -> dict[str, Any]:
        """The pattern as plain values: `{"kind": "nm", "n": 2, "m": 4, "dim": -1}`."""
        return {"kind": _KIND[type(self)], **dataclasses.asdict(self)}

    def _axis(self, dim: int, shape: Sequence[int]) -> int:
        if not -len(shape) <= dim < len(shape):
            raise PatternError(
                f"{self} needs dimension {dim}, but the shape {tuple(shape)} has {len(shape)} dimensions"
            )
        return dim % len(shape)


def _floating(score: Tensor) -> Tensor:
    single = score.is_floating_point() and score.element_size() >= 4
    return score if single else score.float()


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any entry may be zero."""

    def check_shape(self, shape: Sequence[int]) -> None:
        """Every shape will do."""

    def units(self, shape: Sequence[int]) -> int:
        return math.prod(shape)

    def pool(self, score: Num[Tensor, "*shape"]) -> Num[Tensor, " units"]:
        return score.reshape(-1)

    def expand(self, kept_units: Bool[Tensor, " units"], shape: Sequence[int]) -> Tensor:
        return kept_units.view(tuple(shape))

    def check(self, mask: Bool[Tensor, "*shape"]) -> None:
        """Every mask will do."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM(Pattern):
    """At most n of every m consecutive entries along `dim` are kept (2:4 is NM(2, 4)).

    `keep` keeps exactly n of each m and ignores the count it is given. For a Linear weight (out, in) `dim=-1`
    is the input axis; for a convolution (out, in, kh, kw) the input axis, which kernels expect, is `dim=1`.
    """

    n: int
    m: int
    dim: int = -1

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise PatternError(f"N:M needs 1 <= n <= m; received {self.n}:{self.m}")

    def check_shape(self, shape: Sequence[int]) -> None:
        length = shape[self._axis(self.dim, shape)]
        if length % self.m:
            raise PatternError(
                f"{self} needs dimension {self.dim} to be a multiple of {self.m}; the shape {tuple(shape)} "
                f"has {length} there: leave this tensor out, or choose another m or dim"
            )

    @property
    def fixed_density(self) -> Fraction | None:
        return Fraction(self.n, self.m)

    def at(self, sparsity: float) -> Pattern:
        """N':M with the largest N' that drops no more than `sparsity`, and never fewer kept than N."""
        return NM(
            max(self.n, self.m - math.floor(Fraction(repr(float(sparsity))) * self.m)), self.m, self.dim
        )

    def units(self, shape: Sequence[int]) -> int:
        return math.prod(shape)

    def pool(self, score: Num[Tensor, "*shape"]) -> Num[Tensor, " units"]:
        return score.reshape(-1)

    def expand(self, kept_units: Bool[Tensor, " units"], shape: Sequence[int]) -> Tensor:
        return kept_units.view(tuple(shape))

    def feasible(self, shape: Sequence[int], kept: int) -> int:
        self.check_shape(shape)
        return math.prod(shape) // self.m * self.n

    def max_sparsity(self, shape: Sequence[int]) -> float:
        self.check_shape(shape)
        return 1 - self.n / self.m

    def _groups(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(self.dim, -1).unflatten(-1, (-1, self.m))

    def keep(self, score: Num[Tensor, "*shape"], kept: int) -> Bool[Tensor, "*shape"]:
        """The n best of each m entries; `kept` is ignored.

        Raises:
            PatternError: the dimension is not a multiple of m, or a score is NaN.
        """
        self.check_shape(tuple(score.shape))
        score = score.detach()
        if score.is_floating_point() and bool(score.isnan().any()):
            bad = int(score.isnan().sum())
            raise PatternError(
                f"{bad} of {score.numel()} scores are NaN; repair the weights or gradients they come from"
            )
        groups = self._groups(score)
        # A stable descending sort of m entries keeps the lower index among equals.
        order = groups.argsort(dim=-1, descending=True, stable=True)[..., : self.n]
        mask = torch.zeros(groups.shape, dtype=torch.bool, device=score.device).scatter_(-1, order, True)
        return mask.flatten(-2).movedim(-1, self.dim).contiguous()

    def check(self, mask: Bool[Tensor, "*shape"]) -> None:
        self.check_shape(tuple(mask.shape))
        counts = self._groups(mask).sum(-1)
        bad = int((counts > self.n).sum())
        if bad:
            raise PatternError(
                f"{bad} of {counts.numel()} groups of {self.m} keep more than {self.n} entries, which "
                f"{self} forbids; rebuild the mask with keep() or declare it Unstructured()"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + ("" if self.dim == -1 else f"@{self.dim}")


@dataclass(frozen=True)
class Block(Pattern):
    """Tiles of rows x cols on the matrix view (out, rest) are kept or dropped whole."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise PatternError(f"a block needs at least 1x1 entries; received {self.rows}x{self.cols}")

    @staticmethod
    def _matrix(shape: Sequence[int]) -> tuple[int, int]:
        return shape[0], math.prod(shape[1:])

    def check_shape(self, shape: Sequence[int]) -> None:
        if not shape:
            raise PatternError(f"{self} needs a matrix; received a scalar")
        out, rest = self._matrix(shape)
        if out % self.rows or rest % self.cols:
            raise PatternError(
                f"{self} needs the matrix view {out}x{rest} of shape {tuple(shape)} to divide into "
                f"{self.rows}x{self.cols} tiles: leave this tensor out, or choose a block that divides it"
            )

    def units(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // (self.rows * self.cols)

    def unit_size(self, shape: Sequence[int]) -> int:
        return self.rows * self.cols

    def pool(self, score: Num[Tensor, "*shape"]) -> Num[Tensor, " units"]:
        out, rest = self._matrix(score.shape)
        tiles = _floating(score).reshape(out // self.rows, self.rows, rest // self.cols, self.cols)
        return tiles.mean(dim=(1, 3)).reshape(-1)

    def expand(self, kept_units: Bool[Tensor, " units"], shape: Sequence[int]) -> Tensor:
        out, rest = self._matrix(shape)
        grid = kept_units.view(out // self.rows, 1, rest // self.cols, 1)
        return grid.expand(-1, self.rows, -1, self.cols).reshape(tuple(shape))

    def __str__(self) -> str:
        return f"block{self.rows}x{self.cols}"


@dataclass(frozen=True)
class Group(Pattern):
    """Whole slices along `dim` are kept or dropped: filters and neurons (0), input channels (1), heads."""

    dim: int = 0

    def check_shape(self, shape: Sequence[int]) -> None:
        self._axis(self.dim, shape)

    def units(self, shape: Sequence[int]) -> int:
        return shape[self._axis(self.dim, shape)]

    def pool(self, score: Num[Tensor, "*shape"]) -> Num[Tensor, " units"]:
        slices = _floating(score).movedim(self.dim, 0)
        return (
            slices.reshape(slices.shape[0], -1).mean(dim=1)
            if score.numel()
            else slices.new_zeros(slices.shape[0])
        )

    def expand(self, kept_units: Bool[Tensor, " units"], shape: Sequence[int]) -> Tensor:
        view = [1] * len(shape)
        view[self._axis(self.dim, shape)] = -1
        return kept_units.view(view).expand(tuple(shape)).contiguous()

    def __str__(self) -> str:
        return f"channel{self.dim}"


Channel = Group


@dataclass(frozen=True)
class Whole(Pattern):
    """The tensor is kept or dropped as one: a layer, a primitive, a branch."""

    def check_shape(self, shape: Sequence[int]) -> None:
        """Every shape will do."""

    def units(self, shape: Sequence[int]) -> int:
        return 1

    def pool(self, score: Num[Tensor, "*shape"]) -> Num[Tensor, " units"]:
        return _floating(score).mean().reshape(1)

    def expand(self, kept_units: Bool[Tensor, " units"], shape: Sequence[int]) -> Tensor:
        return kept_units.reshape([1] * len(shape)).expand(tuple(shape)).contiguous()

    def __str__(self) -> str:
        return "whole"


_CLASSES: dict[str, type[Pattern]] = {
    "unstructured": Unstructured,
    "nm": NM,
    "block": Block,
    "group": Group,
    "whole": Whole,
}
_KIND = {cls: kind for kind, cls in _CLASSES.items()}
_FORMS = (
    "'unstructured', 'whole', 'N:M' as in '2:4' or '2:4@1', 'blockRxC' as in 'block4x1', "
    "'channelD' as in 'channel0'"
)


def pattern_from_dict(values: Mapping[str, Any]) -> Pattern:
    """The pattern that `to_dict` described.

    Raises:
        PatternError: an unknown kind, a missing or unknown field, or a value that is not an integer.
    """
    kind = values.get("kind")
    cls = _CLASSES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise PatternError(f"unknown pattern kind {kind!r}; known: {', '.join(_CLASSES)}")
    fields = {key: value for key, value in values.items() if key != "kind"}
    known = [field.name for field in dataclasses.fields(cls)]
    if not set(fields) <= set(known) or any(type(value) is not int for value in fields.values()):
        raise PatternError(f"pattern {kind!r} takes integers {known}; received {fields}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise PatternError(f"pattern {kind!r} takes {known}; received {fields}") from error


def parse_pattern(text: str) -> Pattern:
    """Reads 'unstructured', 'whole', '2:4', '2:4@1' (along dimension 1), 'block4x1', 'channel0'.

    Raises:
        PatternError: anything else, or numbers that make no pattern (4:2, block0x1).
    """
    if text == "unstructured":
        return Unstructured()
    if text == "whole":
        return Whole()
    if match := re.fullmatch(r"(\d+):(\d+)(?:@(-?\d+))?", text):
        return NM(int(match[1]), int(match[2]), int(match[3] or -1))
    if match := re.fullmatch(r"block(\d+)x(\d+)", text):
        return Block(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(?:channel|group)(-?\d+)", text):
        return Group(int(match[1]))
    raise PatternError(f"cannot read the pattern {text!r}; known forms: {_FORMS}")
