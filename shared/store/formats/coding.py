"""How a mask is stored: the smallest of several exact codes.

A mask is first seen as *units*: single elements, blocks of the 2-D view, or slices along a dimension,
whichever its pattern has. Which units are kept is then written as

- `full`, `empty`: nothing at all;
- `bitmap`: one bit per unit;
- `gaps`: for each kept unit the number of dropped units before it, in 8 or 16 bits (an index list,
  delta-coded);
- `nm`: for each group of m along a dimension the rank of its n kept places among all choices, in the fewest
  bits.

Kept values are not part of the code: they are always the kept entries in C order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb, prod
from typing import Any

import numpy as np

from ...masks.patterns import NM, Block, Group, Pattern
from .container import is_count

# A table of all choices must stay small enough for a reader to build; 2**16 covers 4:16 and every smaller
# one.
MAX_CHOICES = 1 << 16
MAX_GROUP = 32

Index = dict[str, Any]


@dataclass(frozen=True)
class MaskCode:
    """A coded mask: its description for the manifest, and its array (None where there is nothing to add)."""

    index: Index
    dtype: str
    payload: np.ndarray | None

    @property
    def nbytes(self) -> int:
        return 0 if self.payload is None else self.payload.nbytes


def encode_mask(keep: np.ndarray, pattern: Pattern | None = None) -> MaskCode:
    """The smallest legal code of a boolean mask.

    Args:
        keep: boolean array of any shape, True where an entry is kept.
        pattern: where the mask's zeros may lie; codes in its units are tried where the mask really has them.
    """
    kept = int(np.count_nonzero(keep))
    if kept == 0:
        return MaskCode({"code": "empty"}, "U8", None)
    if kept == keep.size:
        return MaskCode({"code": "full"}, "U8", None)
    best = _unit_code({"units": "element"}, keep.reshape(-1))
    if isinstance(pattern, NM):
        coded = _encode_nm(keep, pattern)
        if coded is not None and coded.nbytes < best.nbytes:
            best = coded
    description = _describe_units(pattern)
    units = None if description is None else _as_units(keep, description)
    if description is not None and units is not None:
        coded = _unit_code(description, units)
        if coded.nbytes < best.nbytes:
            best = coded
    return best


def decode_mask(index: Index, payload: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """The boolean mask that `encode_mask` coded.

    Raises:
        ValueError: the code is unknown, does not fit the shape, or its payload is not one the code could have
            made.
    """
    code = index.get("code")
    _check_keys(index, code)
    if code in ("full", "empty"):
        if payload is not None:
            raise ValueError(f"code {code} takes no index array")
        return np.full(shape, code == "full")
    if payload is None:
        raise ValueError(f"code {code} needs an index array")
    if code == "nm":
        return _decode_nm(index, payload, shape)
    count = _unit_count(index, shape)
    units = _decode_bitmap(payload, count) if code == "bitmap" else _decode_gaps(payload, count)
    return _from_units(units, index, shape)


def payload_range(index: Index, shape: tuple[int, ...]) -> tuple[tuple[str, ...], int, int]:
    """Allowed dtypes and (least, most) number of entries of the index array, from the manifest alone.

    Raises:
        ValueError: as `decode_mask`, for what can be seen without the payload.
    """
    code = index.get("code")
    _check_keys(index, code)
    if code in ("full", "empty"):
        return (), 0, 0
    if not prod(shape):
        raise ValueError(f"code {code} for a tensor without elements")
    if code == "nm":
        groups, bits = _nm_layout(index, shape)
        return ("U8",), _bytes_of(groups * bits), _bytes_of(groups * bits)
    count = _unit_count(index, shape)
    if code == "bitmap":
        return ("U8",), _bytes_of(count), _bytes_of(count)
    return ("U8", "U16"), 0, count


# -- units


def _describe_units(pattern: Pattern | None) -> Index | None:
    if isinstance(pattern, Block):
        return {"units": "block", "rows": pattern.rows, "cols": pattern.cols}
    if isinstance(pattern, Group):
        return {"units": "slice", "dim": pattern.dim}
    return None


def _check_keys(index: Index, code: object) -> None:
    if code in ("full", "empty"):
        expected = {"code"}
    elif code == "nm":
        expected = {"code", "n", "m", "dim"}
    elif code in ("bitmap", "gaps"):
        extra = {"element": set[str](), "block": {"rows", "cols"}, "slice": {"dim"}}
        units = index.get("units")
        if not isinstance(units, str) or units not in extra:
            raise ValueError(f"unknown units {units!r}; a newer version of this package may know them")
        expected = {"code", "units"} | extra[units]
    else:
        raise ValueError(f"unknown code {code!r}; a newer version of this package may know it")
    if set(index) != expected:
        raise ValueError(f"code {code} has fields {sorted(index)}, expected {sorted(expected)}")
    for name in expected - {"code", "units", "dim"}:
        if not is_count(index[name]) or index[name] < 1:
            raise ValueError(f"{name} is {index[name]!r}, expected a positive integer")


def _dim(index: Index, shape: tuple[int, ...]) -> int:
    dim = index["dim"]
    if not isinstance(dim, int) or isinstance(dim, bool) or not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim {dim!r} does not exist in shape {list(shape)}")
    return dim % len(shape)


def _unit_count(index: Index, shape: tuple[int, ...]) -> int:
    if index["units"] == "slice":
        return shape[_dim(index, shape)]
    if index["units"] == "block":
        rows, cols = index["rows"], index["cols"]
        if not shape or shape[0] % rows or prod(shape[1:]) % cols:
            raise ValueError(f"blocks of {rows}x{cols} do not divide shape {list(shape)}")
        return (shape[0] // rows) * (prod(shape[1:]) // cols)
    return prod(shape)


def _as_units(keep: np.ndarray, index: Index) -> np.ndarray | None:
    """One boolean per unit, or None where a unit is kept in part."""
    try:
        count = _unit_count(index, keep.shape)
    except ValueError:
        return None
    if index["units"] == "slice":
        rows = np.moveaxis(keep, index["dim"], 0).reshape(count, -1)
    else:
        height, width = index["rows"], index["cols"]
        view = keep.reshape(keep.shape[0] // height, height, -1, width)
        rows = view.transpose(0, 2, 1, 3).reshape(count, height * width)
    units = rows[:, 0]
    return units if bool((rows == units[:, None]).all()) else None


def _from_units(units: np.ndarray, index: Index, shape: tuple[int, ...]) -> np.ndarray:
    if index["units"] == "slice":
        dim = _dim(index, shape)
        column = units.reshape([-1 if axis == dim else 1 for axis in range(len(shape))])
        return np.broadcast_to(column, shape).copy()
    if index["units"] == "block":
        grid = units.reshape(shape[0] // index["rows"], -1)
        return grid.repeat(index["rows"], axis=0).repeat(index["cols"], axis=1).reshape(shape)
    return units.reshape(shape)


def _unit_code(description: Index, units: np.ndarray) -> MaskCode:
    """Bitmap or gaps of `units`, whichever is smaller."""
    bitmap = MaskCode({"code": "bitmap", **description}, "U8", np.packbits(units, bitorder="little"))
    if np.count_nonzero(units) >= bitmap.nbytes:
        return bitmap  # a gap takes a byte at least
    kept = np.flatnonzero(units)
    gaps = np.diff(kept, prepend=-1) - 1
    sizes = {
        dtype: (kept.size + int((gaps // escape).sum())) * width
        for dtype, escape, width in (("U8", 0xFF, 1), ("U16", 0xFFFF, 2))
    }
    dtype = "U16" if sizes["U16"] < sizes["U8"] else "U8"
    if sizes[dtype] < bitmap.nbytes:
        return MaskCode({"code": "gaps", **description}, dtype, _encode_gaps(gaps, dtype))
    return bitmap


# -- codes


def _bytes_of(bits: int) -> int:
    return -(-bits // 8)


def _unpack_bits(payload: np.ndarray, count: int) -> np.ndarray:
    if payload.dtype != np.uint8 or payload.size != _bytes_of(count):
        raise ValueError(f"the index has {payload.size} bytes, {count} bits need {_bytes_of(count)}")
    if count % 8 and payload[-1] >> (count % 8):
        raise ValueError("the unused bits at the end of the index are not zero")
    return np.unpackbits(payload, count=count, bitorder="little")


def _decode_bitmap(payload: np.ndarray, count: int) -> np.ndarray:
    return _unpack_bits(payload, count).view(np.bool_)


def _encode_gaps(gaps: np.ndarray, dtype: str) -> np.ndarray:
    kind, escape = (np.uint8, 0xFF) if dtype == "U8" else (np.uint16, 0xFFFF)
    escapes, rest = np.divmod(gaps, escape)
    codes = np.full(gaps.size + int(escapes.sum()), escape, dtype=kind)
    codes[np.cumsum(escapes + 1) - 1] = rest
    return codes


def _decode_gaps(payload: np.ndarray, count: int) -> np.ndarray:
    """A code c below the largest: drop c units and keep one; the largest: drop that many and keep none."""
    units = np.zeros(count, dtype=bool)
    if payload.size:
        escape = np.iinfo(payload.dtype).max
        keeps = payload != escape
        ends = np.cumsum(payload.astype(np.int64) + keeps)
        if not keeps[-1]:
            raise ValueError("the gaps end without a kept entry")
        if ends[-1] > count:
            raise ValueError(f"the gaps reach place {ends[-1]} of {count}")
        units[ends[keeps] - 1] = True
    return units


@lru_cache(maxsize=16)
def _choices(n: int, m: int) -> np.ndarray:
    """All masks that keep n of m, in lexicographic order of the kept places; row = rank."""
    table = np.zeros((comb(m, n), m), dtype=bool)
    places = np.array(list(combinations(range(m), n)), dtype=np.int64)
    table[np.arange(len(table))[:, None], places] = True
    return table


def _join_bits(bits: np.ndarray) -> np.ndarray:
    """The integer of each row of bits, lowest first; by columns, to need an eighth of a product's memory."""
    joined = np.zeros(len(bits), dtype="i4" if bits.shape[1] < 32 else "i8")
    for place in range(bits.shape[1]):
        joined |= bits[:, place].astype(joined.dtype) << place
    return joined


def _nm_layout(index: Index, shape: tuple[int, ...]) -> tuple[int, int]:
    """(number of groups, bits per group)."""
    n, m = index["n"], index["m"]
    if not (n < m <= MAX_GROUP and comb(m, n) <= MAX_CHOICES):
        raise ValueError(f"{n}:{m} is not a pattern that this code can hold")
    dim = _dim(index, shape)
    if shape[dim] % m:
        raise ValueError(f"{n}:{m} along dim {dim} does not divide shape {list(shape)}")
    return prod(shape) // m, (comb(m, n) - 1).bit_length()


def _encode_nm(keep: np.ndarray, pattern: NM) -> MaskCode | None:
    index = {"code": "nm", "n": pattern.n, "m": pattern.m, "dim": pattern.dim}
    try:
        _, bits = _nm_layout(index, keep.shape)
    except ValueError:
        return None
    groups = np.moveaxis(keep, pattern.dim, -1).reshape(-1, pattern.m)
    if not bool((groups.sum(1) == pattern.n).all()):
        return None  # a group that keeps fewer than n has no rank
    keys = _join_bits(_choices(pattern.n, pattern.m))
    order = np.argsort(keys)
    ranks = order[np.searchsorted(keys[order], _join_bits(groups))]
    spread = (ranks[:, None] >> np.arange(bits) & 1).astype(np.uint8)
    return MaskCode(index, "U8", np.packbits(spread, bitorder="little"))


def _decode_nm(index: Index, payload: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    groups, bits = _nm_layout(index, shape)
    ranks = _join_bits(_unpack_bits(payload, groups * bits).reshape(groups, bits))
    table = _choices(index["n"], index["m"])
    if groups and ranks.max() >= len(table):
        raise ValueError(f"a rank of {ranks.max()} where {index['n']}:{index['m']} has {len(table)} choices")
    dim = _dim(index, shape)
    moved = (*shape[:dim], *shape[dim + 1 :], shape[dim])
    return np.ascontiguousarray(np.moveaxis(table[ranks].reshape(moved), -1, dim))
