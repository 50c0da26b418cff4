"""Peak of the memory that tensors take while a call runs, counted and not read off the process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class _Living(TorchDispatchMode):
    """Bytes of the tensors that were made inside the context and live, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.setdefault(tensor.untyped_storage(), None)  # there before, or counted
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = None
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors that a call made and that lived at once, on all devices together.

    Weights and inputs, which were there before, do not count, nor does what a kernel uses inside itself. The
    same call gives the same figure on every machine whose kernels allocate alike.
    """
    with _Living() as living:
        call()
    return living.peak
