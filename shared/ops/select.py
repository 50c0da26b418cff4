"""The k-th largest magnitude over many tensors, without joining or sorting them, and what is kept by it.

Projection on the l0 ball, global magnitude pruning and masked optimiser steps run over every weight of a
model at every step, so they may read the memory once or twice, and allocate next to nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch

# Magnitude of infinity as an integer: larger keys are NaN.
_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_INTEGER = {4: torch.int32, 2: torch.int16}


class Threshold(NamedTuple):
    """Keep every entry with |x| > value and, of those with |x| == value, the first `ties` in order."""

    value: float
    ties: int


def threshold_and_ties(tensors: Sequence[Float[Tensor, ...]], kept: int) -> Threshold:
    """The smallest magnitude among the `kept` largest of all tensors together, and how many such are kept.

    The order of entries is that of the tensors, row-major within each. For kept = 0 the value is infinite.

    Raises:
        OpError: NaN, a count out of range, tensors of several dtypes or devices.
    """
    _check(tensors, kept)
    if kept == 0:
        return Threshold(float("inf"), 0)
    value, ties = _kth_magnitude([tensor.detach() for tensor in tensors], kept)
    return Threshold(float(value), int(ties))


def keep_largest_(tensors: Sequence[Float[Tensor, ...]], kept: int) -> None:
    """Set to zero, in place, all but the `kept` entries of largest magnitude (ties: first in order are kept).

    The projection on {x: ||x||_0 <= kept} of all tensors together, exact also with ties.

    Raises:
        OpError: NaN, a count out of range, tensors of several dtypes or devices.
    """
    _check(tensors, kept)
    _keep_largest([tensor.detach() for tensor in tensors], kept)


def largest_masks(tensors: Sequence[Float[Tensor, ...]], kept: int) -> list[Bool[Tensor, ...]]:
    """One mask per tensor; together they mark exactly the `kept` entries of largest magnitude.

    Raises:
        OpError: NaN, a count out of range, tensors of several dtypes or devices.
    """
    _check(tensors, kept)
    return list(_largest_masks([tensor.detach() for tensor in tensors], kept))


def apply_mask_(tensors: Sequence[Float[Tensor, ...]], mask: Bool[Tensor, ...]) -> None:
    """Set to zero, in place, the entries of every tensor where the mask is False.

    One pass, for a weight together with its optimiser's moments: the mask is read once, nothing is allocated.
    Unlike a product with 0, this also clears NaN and infinity.

    Raises:
        OpError: a tensor and the mask differ in shape or device.
    """
    for tensor in tensors:
        if tensor.shape != mask.shape or tensor.device != mask.device or not tensor.is_floating_point():
            raise OpError(
                "apply_mask_ needs floating-point tensors of the mask's shape and device, "
                f"{tuple(mask.shape)} on {mask.device}. "
                f"Received: {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}."
            )
    if mask.dtype != torch.bool:
        raise OpError(f"a mask is a bool tensor. Received: {mask.dtype}.")
    _apply_mask([tensor.detach() for tensor in tensors], mask)


def threshold_reference(tensors: Sequence[Float[Tensor, ...]], kept: int) -> Threshold:
    """The definition of `threshold_and_ties` in plain PyTorch."""
    magnitude = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).abs()
    value = magnitude.sort(descending=True).values[kept - 1]
    return Threshold(float(value), kept - int((magnitude > value).sum()))


def _check(tensors: Sequence[Tensor], kept: int) -> None:
    dispatch.refuse_transforms("selection")
    if not tensors:
        raise OpError("there are no tensors to select from")
    first = tensors[0]
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.dtype != first.dtype or tensor.device != first.device:
            raise OpError(
                "all tensors must share one floating-point dtype and one device. "
                f"Received: {first.dtype} on {first.device}, and {tensor.dtype} on {tensor.device}."
            )
    total = sum(tensor.numel() for tensor in tensors)
    if not 0 <= kept <= total:
        raise OpError(f"cannot keep {kept} of {total} entries; the count must lie between 0 and {total}")


def _plan(tensors: Sequence[Tensor]) -> dispatch.Plan:
    first = tensors[0]
    native = ["native"] if first.dtype in _INFINITY and first.device.type == "cpu" else []
    total = float(sum(tensor.numel() for tensor in tensors) + 1)
    kind = str(first.dtype).removeprefix("torch.")
    return dispatch.choose("select", first.device, (*native, "reference"), kind, (total,))


def _explain(tensors: Sequence[Tensor], kept: int) -> dispatch.Plan:
    _check(tensors, kept)
    return _plan(tensors)


def _refuse_nans(number: int) -> None:
    if number:
        raise OpError(f"{number} entries are NaN, which have no rank; repair the tensors they come from")


class _Pointers:
    """Addresses and sizes of tensors for the native library; copies those that are not in row-major order."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.originals = tensors
        self.tensors = [tensor.contiguous() for tensor in tensors]
        self.addresses = torch.tensor([tensor.data_ptr() for tensor in self.tensors], dtype=torch.int64)
        self.counts = torch.tensor([tensor.numel() for tensor in self.tensors], dtype=torch.int64)
        self.bytes = self.tensors[0].element_size()

    def arguments(self) -> tuple[int, int, int]:
        return self.addresses.data_ptr(), self.counts.data_ptr(), len(self.tensors)

    def write_back(self) -> None:
        for original, tensor in zip(self.originals, self.tensors, strict=True):
            if original.data_ptr() != tensor.data_ptr():
                original.copy_(tensor)


def _select(pointers: _Pointers, kept: int) -> tuple[int, int, int]:
    """Key of the threshold (its bits), ties to keep, ties there are."""
    result = torch.zeros(4, dtype=torch.int64)
    infinity = _INFINITY[pointers.tensors[0].dtype]
    _native.function("zoo_kth_magnitude", "ppiiiiip")(
        *pointers.arguments(), kept, pointers.bytes, infinity, _native.threads(), result.data_ptr()
    )
    key, ties, equal, nans = result.tolist()
    _refuse_nans(nans)
    return key, ties, equal


@dispatch.in_own_precision
def _reference(tensors: Sequence[Tensor], kept: int) -> Threshold:
    _refuse_nans(sum(int(tensor.isnan().sum()) for tensor in tensors))
    return threshold_reference(tensors, kept)


def _reference_masks(tensors: Sequence[Tensor], kept: int) -> list[Tensor]:
    if kept == 0:
        return [torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device) for tensor in tensors]
    value, ties = _reference(tensors, kept)
    masks = []
    for tensor in tensors:
        magnitude = tensor.abs().reshape(-1)
        equal = magnitude == value
        first = equal & (equal.cumsum(0) <= ties)
        ties = max(ties - int(equal.sum()), 0)
        masks.append(((magnitude > value) | first).view(tensor.shape))
    return masks


@torch.library.custom_op(
    "zoo::kth_magnitude", mutates_args=(), schema="(Tensor[] tensors, int kept) -> (Tensor, Tensor)"
)
def _kth_magnitude(tensors: Sequence[Tensor], kept: int) -> tuple[Tensor, Tensor]:
    first = tensors[0]
    if _plan(tensors).backend == "reference":
        value, ties = _reference(tensors, kept)
    else:
        key, ties, _ = _select(_Pointers(tensors), kept)
        value = torch.tensor(key, dtype=_INTEGER[first.element_size()]).view(first.dtype).item()
    return first.new_tensor(value), torch.tensor(ties)


@_kth_magnitude.register_fake
def _(tensors: Sequence[Tensor], kept: int) -> tuple[Tensor, Tensor]:
    return tensors[0].new_empty(()), torch.empty((), dtype=torch.int64)


@torch.library.custom_op(
    "zoo::keep_largest", mutates_args=("tensors",), schema="(Tensor(a0!)[] tensors, int kept) -> ()"
)
def _keep_largest(tensors: Sequence[Tensor], kept: int) -> None:
    if _plan(tensors).backend == "reference":
        for tensor, mask in zip(tensors, _reference_masks(tensors, kept), strict=True):
            tensor.masked_fill_(~mask, 0)
        return
    if kept == 0:
        for tensor in tensors:
            tensor.zero_()
        return
    pointers = _Pointers(tensors)
    _native.function("zoo_keep_selected", "ppiiiiii")(
        *pointers.arguments(), *_select(pointers, kept), pointers.bytes, _native.threads()
    )
    pointers.write_back()


@_keep_largest.register_fake
def _(tensors: Sequence[Tensor], kept: int) -> None:
    return None


@torch.library.custom_op(
    "zoo::largest_masks", mutates_args=(), schema="(Tensor[] tensors, int kept) -> Tensor[]"
)
def _largest_masks(tensors: Sequence[Tensor], kept: int) -> list[Tensor]:
    if kept == 0 or _plan(tensors).backend == "reference":
        return _reference_masks(tensors, kept)
    pointers = _Pointers(tensors)
    joined = torch.empty(int(pointers.counts.sum()), dtype=torch.bool)
    _native.function("zoo_mark_selected", "ppiiiiiip")(
        *pointers.arguments(),
        *_select(pointers, kept),
        pointers.bytes,
        _native.threads(),
        joined.data_ptr(),
    )
    if len(tensors) == 1:
        return [joined.view(tensors[0].shape)]
    # Outputs of an op may not share memory.
    parts = joined.split(pointers.counts.tolist())
    return [part.view(tensor.shape).clone() for part, tensor in zip(parts, tensors, strict=True)]


@_largest_masks.register_fake
def _(tensors: Sequence[Tensor], kept: int) -> list[Tensor]:
    return [torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device) for tensor in tensors]


@torch.library.custom_op(
    "zoo::apply_mask", mutates_args=("tensors",), schema="(Tensor(a0!)[] tensors, Tensor mask) -> ()"
)
def _apply_mask(tensors: Sequence[Tensor], mask: Tensor) -> None:
    in_order = mask.is_contiguous() and all(tensor.is_contiguous() for tensor in tensors)
    sizes = [tensor.element_size() for tensor in tensors]
    native = ["native"] if mask.device.type == "cpu" and in_order and set(sizes) <= {2, 4, 8} else []
    plan = dispatch.choose("select", mask.device, (*native, "reference"), "mask", (float(mask.numel() + 1),))
    if plan.backend == "reference":
        dropped = ~mask
        for tensor in tensors:
            tensor.masked_fill_(dropped, 0)
        return
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    widths = torch.tensor(sizes, dtype=torch.int64)
    _native.function("zoo_apply_mask", "ppipii")(
        addresses.data_ptr(),
        widths.data_ptr(),
        len(tensors),
        mask.data_ptr(),
        mask.numel(),
        _native.threads(),
    )


@_apply_mask.register_fake
def _(tensors: Sequence[Tensor], mask: Tensor) -> None:
    return None


def _examples(call: Callable[[Tensor], Tensor]) -> Iterator[dispatch.Example]:
    for dtype in (torch.float32, torch.float16):
        yield dispatch.Example(call, (torch.randint(-9, 9, (7, 11)).to(dtype),), differentiable=False)


def _threshold_of(x: Tensor) -> Tensor:
    return torch.tensor(threshold_and_ties([x, x[:2]], 31))


def _largest_of(x: Tensor) -> Tensor:
    kept = x.detach().clone()
    keep_largest_([kept], 31)
    return kept


def _masks_of(x: Tensor) -> Tensor:
    return torch.cat(largest_masks([x, x[:2]], 31)).float()


for _function, _example in (
    (threshold_and_ties, _threshold_of),
    (keep_largest_, _largest_of),
    (largest_masks, _masks_of),
):
    dispatch.register(_function.__name__, plan=_explain, examples=functools.partial(_examples, _example))
