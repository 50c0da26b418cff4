"""Things derived from index tensors (a transposed graph, a rulebook), kept as long as those tensors live."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Derived = TypeVar("Derived")


class DerivedCache(Generic[Derived]):
    """A cache keyed by tensors: the same memory, view and in-place version give the same entry.

    An entry goes when the memory of one of its tensors is freed (the next call notices) or when `capacity`
    other entries have been used since; it is not found again once such a tensor is written to.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        # A weak reference keeps the address of a storage from being used again: no key names two storages.
        self._entries: OrderedDict[Hashable, tuple[list[StorageWeakRef], Derived]] = OrderedDict()

    def get(self, tensors: Sequence[Tensor], options: Hashable, build: Callable[[], Derived]) -> Derived:
        """The entry of `tensors` and `options`; `build()` makes it when there is none."""
        owners = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        key = (options, *(_identity(tensor, owner) for tensor, owner in zip(tensors, owners, strict=True)))
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][1]
        derived = build()
        with self._lock:
            expired = [k for k, (refs, _) in self._entries.items() if any(ref.expired() for ref in refs)]
            for k in expired:
                del self._entries[k]
            self._entries[key] = (owners, derived)
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        return derived

    def __len__(self) -> int:
        return len(self._entries)


def _identity(tensor: Tensor, owner: StorageWeakRef) -> Hashable:
    version = 0 if tensor.is_inference() else tensor._version
    return owner.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, version
