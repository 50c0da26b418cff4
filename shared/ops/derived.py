"""Forms of a weight that are computed once and kept while the weight lives: its dense copy, its torch CSR
tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
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
