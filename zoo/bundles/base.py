"""Weights files that leave out what another bundle, the base, has already.

A model with thresholds on its activations has every weight of its dense twin; one whose weights were only
dropped has those that it kept, and one whose channels were cut has rows or columns of it. `subtract` finds
out what need not be stored, `restore` puts it back; between them each tensor comes back bit for bit. The
file's metadata say what it lacks:

    "base": {"name": ..., "version": ..., "sha256": ..., "tensors": [names taken whole],
             "masked": {name: pattern of the mask, or null}, "cut": {name: axis}, "extras": [names]}

For a name in `masked` the file holds a boolean tensor: the base's entries are taken where it is true. The
pattern is that of the model's mask; null where it belongs to another name of the same tensor. For a name in
`cut` it holds one boolean for each index of the base's tensor along that axis: those that were kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from zoo.errors import BundleError
from zoo.shared.errors import SparseError
from zoo.shared.masks import Mask, MaskSet
from zoo.shared.masks.patterns import pattern_from_dict
from zoo.shared.store.formats import PackedContents

KEY = "base"  # of the metadata
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def subtract(
    state: Mapping[str, Tensor], masks: MaskSet, extras: Mapping[str, Tensor], base: PackedContents
) -> PackedContents:
    """What a file must hold besides its base; its metadata say what is the base's, bit for bit.

    Args:
        state: the model's tensors; zero where `masks` drop.
        masks: its masks.
        extras: its extra tensors.
        base: the content of the base's file.

    Raises:
        BundleError: nothing is the base's.
    """
    own: dict[str, Tensor] = {}
    own_masks: dict[str, Mask] = {}
    whole: list[str] = []
    masked: dict[str, Any] = {}
    cut: dict[str, int] = {}
    by_name = dict(masks)
    by_storage = {_storage(state[name]): mask for name, mask in masks.items()}  # tied names share one mask
    for name, tensor in state.items():
        stated = by_name.get(name)
        mask = stated or by_storage.get(_storage(tensor))
        other = base.tensors.get(name)
        if other is not None and mask is None and _same(tensor, other):
            whole.append(name)
        elif other is not None and mask is not None and _same(tensor, other, mask.keep):
            own[name] = mask.keep
            masked[name] = stated.pattern.to_dict() if stated else None
        elif other is not None and mask is None and (found := _kept_of(tensor, other)) is not None:
            cut[name], own[name] = found
        else:
            own[name] = tensor
            if stated is not None:
                own_masks[name] = stated
    known = [
        name for name, extra in extras.items() if name in base.extras and _same(extra, base.extras[name])
    ]
    rest = {name: extra for name, extra in extras.items() if name not in known}
    if not (whole or masked or cut or known):
        raise BundleError("no tensor is the same as the base's. Save the model without a base")
    taken = {"tensors": whole, "masked": masked, "cut": cut, "extras": known}
    return PackedContents(own, MaskSet(own_masks), rest, {KEY: taken})


def restore(contents: PackedContents, base: PackedContents) -> PackedContents:
    """Put together what `subtract` took apart.

    Raises:
        BundleError: the metadata ask for something that the base lacks, or that does not fit.
    """
    record = contents.metadata.get(KEY)
    taken = record if isinstance(record, dict) else {}
    whole, masked, known = taken.get("tensors"), taken.get("masked"), taken.get("extras")
    cut = taken.get("cut", {})  # files of version 0.1.0 have none
    if not (_are_names(whole) and isinstance(masked, dict) and isinstance(cut, dict) and _are_names(known)):
        raise BundleError("the weights do not say what they take from their base")
    tensors, masks, extras = dict(contents.tensors), dict(contents.masks), dict(contents.extras)
    for names, into, source in ((whole, tensors, base.tensors), (known, extras, base.extras)):
        for name in names:
            if name in into or name not in source:
                raise BundleError(f"the weights leave {name!r} to their base, which cannot give it")
            into[name] = source[name]
    for name, pattern in masked.items():
        keep, other = tensors.get(name), base.tensors.get(name)
        if keep is None or other is None or keep.dtype != torch.bool or keep.shape != other.shape:
            raise BundleError(f"the mask of {name!r} does not fit the base's tensor")
        tensors[name] = torch.where(keep, other, torch.zeros((), dtype=other.dtype))
        if pattern is not None:
            masks[name] = _mask(name, keep, pattern)
    for name, axis in cut.items():
        tensors[name] = _cut(name, tensors.get(name), base.tensors.get(name), axis)
    return PackedContents(tensors, MaskSet(masks), extras, contents.metadata)


def _kept_of(tensor: Tensor, other: Tensor) -> tuple[int, Tensor] | None:
    """The axis along which a tensor holds slices of another in their order, and which; None without one."""
    if tensor.dtype != other.dtype or tensor.dim() != other.dim() or not tensor.numel():
        return None
    shorter = [axis for axis in range(tensor.dim()) if tensor.shape[axis] < other.shape[axis]]
    if len(shorter) != 1 or any(
        tensor.shape[axis] != other.shape[axis] for axis in range(tensor.dim()) if axis not in shorter
    ):
        return None
    axis = shorter[0]
    wanted, there = _slices(tensor, axis), _slices(other, axis)
    keep, place = torch.zeros(len(there), dtype=torch.bool), -1
    for one in wanted:  # the first that is left: if there is any way to find all in order, this is one
        place = next((at for at in range(place + 1, len(there)) if there[at] == one), -1)
        if place < 0:
            return None
        keep[place] = True
    return axis, keep


def _slices(tensor: Tensor, axis: int) -> list[bytes]:
    moved = tensor.detach().cpu().movedim(axis, 0)
    return [one.numpy().tobytes() for one in _words(moved).reshape(len(moved), -1)]


def _cut(name: str, keep: Tensor | None, other: Tensor | None, axis: Any) -> Tensor:
    there = other is not None and isinstance(axis, int) and 0 <= axis < other.dim()
    if (
        other is None
        or keep is None
        or not there
        or keep.dtype != torch.bool
        or keep.shape != other.shape[axis : axis + 1]
    ):
        raise BundleError(f"what {name!r} keeps of the base's tensor does not fit it")
    return other.movedim(axis, 0)[keep].movedim(0, axis).contiguous()


def _mask(name: str, keep: Tensor, pattern: Any) -> Mask:
    try:
        return Mask(keep, pattern_from_dict(pattern if isinstance(pattern, dict) else {}))
    except SparseError as error:
        raise BundleError(f"the mask of {name!r} is not one: {error}") from error


def _are_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    # Empty tensors have no address of their own.
    address = tensor.data_ptr() if tensor.numel() else id(tensor)
    return address, tuple(tensor.shape), tensor.stride(), tensor.dtype


def _same(tensor: Tensor, other: Tensor, keep: Tensor | None = None) -> bool:
    """Whether the bits agree, where `keep` is true: NaN equals the same NaN, and -0 is not 0."""
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    equal = _words(tensor) == _words(other)
    return bool((equal if keep is None else equal | ~keep.cpu().reshape(-1)).all())


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(_WORDS[flat.itemsize])
