"""Things derived from index tensors (a transposed graph, a rulebook), kept as long as those tensors live."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Derived = TypeVar("Derived")


class DerivedCache(Generic[Derived]):
    """A cache keyed by tensors: the same memory, view and in-place version give the same entry.

    An entry goes when the memory of one of its tensors is freed (the next call that makes an entry notices)
    or when `capacity` other entries have been used since; it is not found again once such a tensor is
    written to. What is kept must not hold those tensors, or they are never freed.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        # A weak reference keeps the address of a storage from being used again: no key names two storages.
        self._entries: dict[Hashable, tuple[list[StorageWeakRef], list[weakref.ref[Tensor]], Derived]] = {}
        # Keys of which a tensor has gone: memory is freed just after that, or later if others share it.
        self._suspects: list[Hashable] = []

    def get(self, tensors: Sequence[Tensor], options: Hashable, build: Callable[[], Derived]) -> Derived:
        """The entry of `tensors` and `options`; `build()` makes it when there is none."""
        owners = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        key = (options, *(_identity(tensor, owner) for tensor, owner in zip(tensors, owners, strict=True)))
        with self._lock:
            held = self._entries.pop(key, None)
            if held is not None:
                self._entries[key] = held  # the latest used is last
                return held[2]
        derived = build()
        watched = [weakref.ref(tensor, lambda _: self._suspects.append(key)) for tensor in tensors]
        with self._lock:
            self._drop_freed()
            self._entries[key] = (owners, watched, derived)
            while len(self._entries) > self._capacity:
                del self._entries[next(iter(self._entries))]
        return derived

    def _drop_freed(self) -> None:
        suspects, self._suspects = self._suspects, []
        for key in suspects:
            held = self._entries.get(key)
            if held is None:
                continue
            if any(owner.expired() for owner in held[0]):
                del self._entries[key]
            else:
                self._suspects.append(key)

    def __len__(self) -> int:
        return len(self._entries)


def _identity(tensor: Tensor, owner: StorageWeakRef) -> Hashable:
    version = 0 if tensor.is_inference() else tensor._version
    return owner.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, version
