"""The layouts of a packed weight as plain tensors: where each value lies, the dense form, and what is
refused.

`weights.py` describes the layouts and builds them; custom ops receive their tensors one by one and come
here.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from ..errors import OpError
from . import _native

LAYOUTS = (
    "bitmask",
    "csr",
    "rows4",
    "columns",
)  # in the order of `enum Layout` in native/include/zoo/packed.hpp
VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of `enum ValueType`
STORED_TYPES = (*VALUE_TYPES, torch.float64)  # fp64 runs on the reference alone, for gradient checks
BLOCK_WIDTHS = (4, 8, 16)
PANEL = 4096  # columns per panel of every layout: x takes half of a usual first-level cache
OVERREAD = 16  # entries of padding behind values and columns; kOverread in native/include/zoo/simd.hpp


def block_of(layout: str, width: int) -> tuple[int, int]:
    """Rows and columns of a stored block."""
    return (4, 1) if layout == "rows4" else (1, width if layout == "columns" else 1)


def coordinates(
    index: Integer[Tensor, ...],
    pointer: Integer[Tensor, " end"],
    layout: str,
    shape: tuple[int, int],
    width: int,
) -> tuple[Integer[Tensor, " kept"], Integer[Tensor, " kept"]]:
    """Row and column of each stored value. Padding rows of `rows4` keep their number, which is beyond the
    shape."""
    panel, (height, width) = PANEL, block_of(layout, width)
    segment_rows = max(1, -(-shape[0] // height))
    counts = pointer.diff().long()
    segment = torch.repeat_interleave(torch.arange(counts.numel(), device=index.device), counts)
    columns = columns_of_bits(index) if layout == "bitmask" else index
    offset = columns[: columns.numel() - OVERREAD].long()
    number = torch.div(segment, segment_rows, rounding_mode="floor")
    within = torch.arange(height * width, device=index.device)
    rows = ((segment - number * segment_rows) * height).unsqueeze(1) + within // width
    cols = (number * panel + offset).unsqueeze(1) + within % width
    return rows.flatten(), cols.flatten()


def columns_of_bits(bits: Integer[Tensor, "segments bytes"]) -> Integer[Tensor, " stored"]:
    """The csr index (columns inside the panel, padded) of the same values in the same order."""
    kept = [unpack_bits(part).nonzero()[:, 1].to(torch.int16) for part in bits.split(1024)]
    return torch.cat([*kept, torch.zeros(OVERREAD, dtype=torch.int16, device=bits.device)])


def pack_bits(kept: Bool[Tensor, "segments panel"]) -> Integer[Tensor, "segments bytes"]:
    """Eight columns per byte, the first in the lowest bit."""
    powers = 1 << torch.arange(8, device=kept.device, dtype=torch.uint8)
    return (kept.reshape(kept.shape[0], kept.shape[1] // 8, 8) * powers).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Integer[Tensor, "segments bytes"]) -> Bool[Tensor, "segments panel"]:
    """The inverse of `pack_bits`."""
    powers = 1 << torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.unsqueeze(-1) & powers).flatten(1) != 0


def dense_of(
    values: Float[Tensor, " stored"],
    index: Integer[Tensor, ...],
    pointer: Integer[Tensor, " end"],
    layout: str,
    shape: tuple[int, int],
    width: int,
) -> Float[Tensor, "out in"]:
    """The dense weight of a packed one; differentiable in `values`."""
    rows, cols = coordinates(index, pointer, layout, shape, width)
    height = block_of(layout, width)[0]
    padded = -(-shape[0] // height) * height
    flat = values.new_zeros(padded * shape[1])
    flat = flat.index_add(0, rows * shape[1] + cols, values[: values.numel() - OVERREAD])
    return flat.view(padded, shape[1])[: shape[0]]


def check_weight(
    values: Tensor, index: Tensor, pointer: Tensor, layout: str, shape: tuple[int, int], width: int
) -> None:
    """Refuse a packed weight whose parts do not fit each other, or whose indices point outside.

    Raises:
        OpError: with the culprit. Nothing has been read through an index by then.
    """
    if layout not in LAYOUTS:
        raise OpError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    if layout == "columns" and (width not in BLOCK_WIDTHS or shape[1] % width):
        raise OpError(f"1x{width} blocks do not fit {shape[1]} columns: widths are {BLOCK_WIDTHS}")
    if width not in {"columns": BLOCK_WIDTHS, "bitmask": (1, 2, 4)}.get(layout, (1,)):
        raise OpError(f"a {layout} weight cannot have width {width}")
    index_type = torch.uint8 if layout == "bitmask" else torch.int16
    if values.dtype not in STORED_TYPES:
        raise OpError(f"packed values must be fp32, bf16, fp16 or fp64, received {values.dtype}")
    if index.dtype != index_type or pointer.dtype != torch.int32:
        raise OpError(
            f"a {layout} weight has a {index_type} index and an int32 pointer, received {index.dtype} and "
            f"{pointer.dtype}"
        )
    if not values.device == index.device == pointer.device:
        raise OpError(
            f"values, index and pointer are on {values.device}, {index.device} and {pointer.device}: "
            "move them together"
        )
    if not (values.is_contiguous() and index.is_contiguous() and pointer.is_contiguous()):
        raise OpError(
            "values, index and pointer of a packed weight must be contiguous: call .contiguous() on them"
        )
    if torch.compiler.is_compiling() or not _is_plain(index):
        return  # tracing: there is no content to look at; the op checks again when it runs
    _check_ranges(values, index, pointer, layout, shape, width)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and tensor.device.type != "meta"


def _check_ranges(
    values: Tensor, index: Tensor, pointer: Tensor, layout: str, shape: tuple[int, int], width: int
) -> None:
    panel, (height, block_width) = PANEL, block_of(layout, width)
    segments = -(-shape[1] // panel) * -(-shape[0] // height)
    if pointer.shape != (segments + 1,):
        raise OpError(
            f"a {layout} weight {shape} has {segments} segments, its pointer {tuple(pointer.shape)} entries"
        )
    for name, tensor in (("values", values), ("index", index), ("pointer", pointer)):
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise OpError(f"the memory of the {name} was given back: load the weight again")
    if index.device.type == "cpu" and _native.available() and _fits(values, index, layout, shape, width):
        entries = (values.numel() - OVERREAD) // (height * block_width)
        numbers = (entries, *shape, panel, LAYOUTS.index(layout), width, _native.threads())
        if not _native.value("zoo_packed_check", "ppiiiiiii")(index.data_ptr(), pointer.data_ptr(), *numbers):
            return
    # What is wrong is said here, in sums of int64: a column is int16, and the next after 32767 is not -32768.
    index = index if layout == "bitmask" else index.long()
    entries = int(pointer[-1])
    if int(pointer[0]) != 0 or bool((pointer[1:] < pointer[:-1]).any()):
        raise OpError("the pointer of a packed weight must start at 0 and never fall")
    if values.shape != (entries * height * block_width + OVERREAD,):
        raise OpError(
            f"the pointer ends at {entries} entries of {height * block_width}, which with {OVERREAD} of "
            f"padding does not fit {values.numel()} values"
        )
    columns = (
        torch.arange(-(-shape[1] // panel), device=index.device).mul(-panel).add(shape[1]).clamp(max=panel)
    )
    limits = columns.repeat_interleave(segments // max(1, columns.numel()))
    if layout == "bitmask":
        if index.shape != (segments, panel // 8):
            raise OpError(
                f"the bits of a weight {shape} are {(segments, panel // 8)}, received {tuple(index.shape)}"
            )
        kept = unpack_bits(index)
        if not torch.equal(kept.sum(1, dtype=torch.int32), pointer.diff()):
            raise OpError("the bits of a packed weight do not add up to its pointer")
        whole = (limits // 8).unsqueeze(1) > torch.arange(panel // 8, device=index.device)
        if width > 1 and bool((kept.reshape(segments, panel // 8, 8).sum(-1) != width)[whole].any()):
            raise OpError(f"the bits do not keep {width} of each 8 columns")
        if bool((kept & (torch.arange(panel, device=index.device) >= limits.unsqueeze(1))).any()):
            raise OpError(f"a bit beyond the {shape[1]} columns is set")
        return
    if index.shape != (entries + OVERREAD,):
        raise OpError(
            f"the pointer ends at {entries} entries, which with {OVERREAD} of padding does not fit an index "
            f"{tuple(index.shape)}"
        )
    limit = torch.cat(
        [limits.repeat_interleave(pointer.diff().long()), index.new_full((OVERREAD,), block_width)]
    )
    if bool(((index < 0) | (index + block_width > limit) | (index % block_width != 0)).any()):
        raise OpError(f"a column of the index lies outside its panel, or beyond the {shape[1]} columns")


def _fits(values: Tensor, index: Tensor, layout: str, shape: tuple[int, int], width: int) -> bool:
    """Whether an index has the size that a native check may read for so many values."""
    height, block_width = block_of(layout, width)
    if (values.numel() - OVERREAD) % (height * block_width) or values.numel() < OVERREAD:
        return False
    if layout == "bitmask":
        return index.shape == (-(-shape[1] // PANEL) * shape[0], PANEL // 8)
    return index.shape == ((values.numel() - OVERREAD) // (height * block_width) + OVERREAD,)


def used_bits(index: Integer[Tensor, "segments bytes"], cols: int) -> Integer[Tensor, "segments used"]:
    """The bytes of mask bits that belong to columns; a matrix of one narrow panel has many that do not."""
    return index if cols >= PANEL else index[:, : -(-cols // 64) * 8]
