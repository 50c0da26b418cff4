"""How the calls of a weight ran before, so that a call like them need not be checked and planned again.

A product of a small layer takes a few microseconds, and so do the checks of its arguments and the choice of a
backend. These depend on the shape and dtype of x, on torch's threads, on what `ops.backend` asks for, and on
the content of the weight's index: while none of that has changed, their outcome is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native, dispatch
from .derived import version

Run = Callable[[Tensor, "Tensor | None"], Tensor]  # of x and the bias
_CAPACITY = 64  # shapes of x; a batch size per call would fill memory
_num_threads = torch.get_num_threads


def dense_run(weight: Tensor) -> Run:
    """The run of a weight [out, in] with its zeros, in the dtype of x."""

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    return run


def native_run(
    function: Callable[..., None], parts: Sequence[Tensor], y_shape: tuple[int, ...], numbers: Sequence[int]
) -> Run:
    """The run of a kernel that takes x, the parts of a weight, a bias, y, numbers and threads, in that order.

    All is made ready that stays from call to call. The parts are kept alive.
    """
    held = (tuple(parts), tuple(part.data_ptr() for part in parts))
    plain, empty, float32 = _native.plain, torch.empty, torch.float32

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        flat, y = plain(x), empty(y_shape, dtype=float32)
        wide_bias = None if bias is None else plain(bias)
        at_bias = None if wide_bias is None else wide_bias.data_ptr()
        function(flat.data_ptr(), *held[1], at_bias, y.data_ptr(), *numbers, _native.threads())
        return y if x.dtype is float32 else y.to(x.dtype)

    return run


class Settled:
    """Belongs to a weight whose tensors are never replaced; a copy of the weight starts without."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, tuple[Any, ...]] = {}

    def __reduce__(self) -> tuple[type[Settled], tuple[()]]:
        return Settled, ()

    def find(self, x: Tensor, bias: Tensor | None, rows: int, kind: Hashable = None) -> Run | None:
        """How such a call of a weight of so many rows ran, or None where it has to be checked and planned.

        `kind` tells calls of different ops from each other.
        """
        held = self._calls.get(x.shape if kind is None else (kind, x.shape))
        if held is None:
            return None
        run, dtype, device, threads, request, table, parts = held
        if (
            x.dtype is not dtype
            or _num_threads() != threads
            or dispatch.requested() != request
            or dispatch.table() is not table
            or x.device != device
        ):
            return None
        if bias is not None and (bias.dtype is not dtype or bias.shape != (rows,) or bias.device != device):
            return None
        for part, stamp, address in parts:
            if part.data_ptr() != address or version(part) != stamp:
                return None
        return run

    def keep(self, x: Tensor, run: Run, *parts: Tensor, kind: Hashable = None) -> None:
        """Let later calls like this one go straight to `run`, while the parts of the weight stay as they
        are."""
        if len(self._calls) >= _CAPACITY:
            self._calls.clear()
        held = [(part, version(part), part.data_ptr()) for part in parts]
        choice = (_num_threads(), dispatch.requested(), dispatch.table())
        self._calls[x.shape if kind is None else (kind, x.shape)] = (run, x.dtype, x.device, *choice, held)
