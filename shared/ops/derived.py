"""What is kept while a tensor lives: forms of a weight that are computed once (its dense copy, its torch CSR
tensor), and that an index was found in order."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def version(tensor: Tensor) -> int:
    """The counter of in-place changes (inference tensors have none, and cannot be changed outside of
    inference)."""
    return -1 if tensor.is_inference() else tensor._version


class Derived:
    """A cache of one derived form, by identity and version of the tensor it comes from; freed with that
    tensor."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[Tensor], int, object]] = {}

    def get(self, source: Tensor, make: Callable[[], T]) -> T:
        """What `make()` returned for this content of `source`."""
        key, now = id(source), version(source)
        held = self._held.get(key)
        if held is not None and held[0]() is source and held[1] == now:
            return held[2]  # type: ignore[return-value]
        value = make()
        self._held[key] = (weakref.ref(source, lambda _: self._held.pop(key, None)), now, value)
        return value


class Checked:
    """Remembers tensors that a check has let pass, until one of them is changed or freed.

    Inference tensors, whose changes torch does not count, are never remembered; what is written through numpy
    is not noticed.
    """

    _CAPACITY = 8  # checks per first tensor

    def __init__(self) -> None:
        self._held = Derived()

    def knows(self, tensors: tuple[Tensor, ...], options: Hashable) -> bool:
        """Whether these very tensors, unchanged since, have passed the check with these options."""
        stamp = _stamp(tensors, options)
        return stamp is not None and any(
            stamp == known and all(ref() is tensor for ref, tensor in zip(refs, tensors, strict=True))
            for known, refs in self._of(tensors[0])
        )

    def add(self, tensors: tuple[Tensor, ...], options: Hashable) -> None:
        """The tensors have passed."""
        # By weak references: an id or an address may be another tensor's after the first is gone.
        stamp, refs = _stamp(tensors, options), [weakref.ref(tensor) for tensor in tensors]
        if stamp is not None:
            known = self._of(tensors[0])
            known.insert(0, (stamp, refs))
            del known[self._CAPACITY :]

    def _of(self, first: Tensor) -> list[tuple[_Stamp, list[weakref.ref[Tensor]]]]:
        return self._held.get(first, list)


_Stamp = tuple[Hashable, list[tuple[int, int]]]


def _stamp(tensors: tuple[Tensor, ...], options: Hashable) -> _Stamp | None:
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return options, [(tensor._version, tensor.data_ptr()) for tensor in tensors]
