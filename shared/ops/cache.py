"""The one memory of the operations, and its rule.

**What a tensor holds is looked at in every call; nothing else stands for it.** Not its id, its address or its
version counter: optimisers, moving averages, numpy, `.data`, `vector_to_parameters` and inference mode change
content without a trace in any of them. Hence

1. kernels read values where they lie, and check an index in the call that reads it;
2. a *copy* in another form (dense, transposed, a rulebook) is found again only while the address **and the
   digest of the whole content** of what it was made from are the same (`Derived`);
3. of values that train there are no copies beyond the call: they change with every step;
4. what depends on shapes, dtypes, devices, threads and the requested backend alone may be kept without a
   digest: it does not depend on content (`Calls`, and the plans of `dispatch`).

A digest costs a read of the weight, which `auto` counts where it chooses a copy (`dispatch.looking`). For few
rows of x a kernel that reads the weight itself is then the faster one; for many the product takes several
times as long.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from . import _native, dispatch
from .dense_linear import dense_product

Run = Callable[..., Tensor]  # of x, the bias and, where the kernel takes one, a residual
Form = TypeVar("Form")
Owner = TypeVar("Owner")
# Looked up once, as the look-ups would take as long as the answers.
_num_threads, _requested, _table = torch.get_num_threads, dispatch.requested, dispatch.table


def digest(*tensors: Tensor) -> int:
    """A 64-bit number that changes with the content of the tensors (not made to resist forgery)."""
    seed = 0
    for tensor in tensors:
        seed = _digest(tensor, seed)
    return seed


def _digest(tensor: Tensor, seed: int) -> int:
    if tensor.device.type == "cpu" and _native.available():
        place = _place(tensor) or _place(tensor := tensor.contiguous())
        return _native.value("zoo_digest", "piiii")(*place, seed)
    size = tensor.element_size()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    words = tensor.contiguous().view(integers).flatten().long()
    # Each word is told its place, then mixed until every bit of it reaches the upper ones (as splitmix does).
    words = words + torch.arange(1, words.numel() + 1, device=words.device).mul_(-0x61C8864680B583EB) + seed
    for factor in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        words = (words ^ (words >> 29)).mul_(factor)
    return int((words ^ (words >> 32)).sum())


def _place(tensor: Tensor) -> tuple[int, ...]:
    """Address, rows, bytes of a row and between rows, as `zoo_digest` takes them; empty for other strides."""
    size = tensor.element_size()
    if tensor.is_contiguous():
        return tensor.data_ptr(), 1, tensor.numel() * size, 0
    if tensor.dim() != 2 or tensor.stride(1) != 1:
        return ()
    return tensor.data_ptr(), tensor.shape[0], tensor.shape[1] * size, tensor.stride(0) * size


class Derived(Generic[Form]):
    """Copies of tensors in another form, by address and content of what they were made from.

    A copy goes when the memory of one of its sources is freed, or when `capacity` others have been used
    since. It must not hold the sources, or their memory is never freed.
    """

    def __init__(self, capacity: int = 256) -> None:
        self._capacity = capacity
        self._held: dict[Hashable, tuple[list[weakref.ref[Any]], int, Form]] = {}

    def get(self, sources: Sequence[Tensor], build: Callable[[], Form], options: Hashable = None) -> Form:
        """The form of this content of `sources`; `build()` makes it where there is none.

        Sources that train are never remembered.
        """
        if any(source.requires_grad for source in sources):
            return build()
        key = (options, *((each.data_ptr(), each.shape, each.dtype, each.device) for each in sources))
        now = digest(*sources)
        held = self._held.pop(key, None)
        if held is None or held[1] != now:
            form = build()
            # Storages, as a tensor may be a view that ends before its memory does.
            alive = [weakref.ref(each.untyped_storage(), lambda _: self._forget(key)) for each in sources]
            held = (alive, now, form)
        self._held[key] = held  # the latest used is last
        while len(self._held) > self._capacity:
            self._forget(next(iter(self._held)))
        return held[2]

    def run(
        self,
        owner: Owner,
        sources: Sequence[Tensor],
        build: Callable[[Owner], Form],
        make: Callable[[Owner, Form], Run],
        options: Hashable = None,
    ) -> Run:
        """A run that the owner keeps while the sources lie where they are: `make(owner, form)`, made again
        when their content has changed. A call costs the digest and little else.
        """
        held, places = weakref.ref(owner), [_place(source) for source in sources]
        look, number = None, _native.number
        if _native.available() and all(places) and all(source.device.type == "cpu" for source in sources):
            look = _native.bare("zoo_digest")
        bound = [(_native.address(at), *map(number, sizes)) for at, *sizes in places if look]
        known: int | None = None
        run: Run | None = None

        def call(*inputs: Tensor | None) -> Tensor:
            nonlocal known, run
            alive = cast(Owner, held())
            for source in sources:
                if source.requires_grad:
                    known = run = None
                    return make(alive, build(alive))(*inputs)
            if look is None:
                now = digest(*sources)
            else:
                now = 0
                for at, rows, size, stride in bound:
                    now = look(at, rows, size, stride, number(now))
            if run is None or now != known:
                run, known = make(alive, self.get(sources, lambda: build(alive), options)), now
            return run(*inputs)

        return call

    def _forget(self, key: Hashable) -> None:
        self._held.pop(key, None)

    def __len__(self) -> int:
        return len(self._held)


class Calls:
    """How calls of these shapes ran, ready to run again: checked arguments, chosen backend, bound addresses.

    A call is recognised by what does not depend on content, and by the addresses of the weight's parts, which
    `.data` and `set_` change. What is kept reads the parts when it runs. A copy of the owner starts without.
    """

    _CAPACITY = 64  # shapes of x; a batch size per call would fill memory

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[Any, ...]] = {}

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()

    def find(self, x: Tensor, bias: Tensor | None, rows: int, kind: Hashable = None) -> Run | None:
        """How such a call of a weight of so many rows ran, None where it has to be checked and planned.

        `kind` tells calls of different ops from each other.
        """
        held = self._held.get(x.shape if kind is None else (kind, x.shape))
        if held is None:
            return None
        run, dtype, device, threads, request, table, parts = held
        if (
            x.dtype is not dtype
            or _num_threads() != threads
            or _requested() != request
            or _table() is not table
            or x.device != device
        ):
            return None
        if bias is not None and (bias.dtype is not dtype or bias.shape != (rows,) or bias.device != device):
            return None
        for part, address, size, kind_of_number in parts:
            if part.data_ptr() != address or part.nbytes != size or part.dtype is not kind_of_number:
                return None
        return run

    def keep(self, x: Tensor, run: Run, parts: Iterable[Tensor], kind: Hashable = None) -> None:
        """Let later calls like this one go straight to `run`, while the parts lie where they are."""
        if len(self._held) >= self._CAPACITY:
            self._held.clear()
        held = [(part, part.data_ptr(), part.nbytes, part.dtype) for part in parts]
        choice = (_num_threads(), dispatch.requested(), dispatch.table())
        self._held[x.shape if kind is None else (kind, x.shape)] = (run, x.dtype, x.device, *choice, held)


class Recent:
    """Calls whose checks and plan passed, by what does not depend on content; some `capacity` of them."""

    def __init__(self, capacity: int = 256) -> None:
        self._capacity = capacity
        self._held: dict[Hashable, None] = {}

    def __contains__(self, call: Hashable) -> bool:
        return call in self._held

    def add(self, call: Hashable) -> None:
        """The call has passed."""
        if len(self._held) >= self._capacity:
            self._held.clear()
        self._held[call] = None


def owned_run(owner: Owner, run: Callable[[Tensor, Owner, Tensor | None], Tensor]) -> Run:
    """`run` for an owner that keeps the result: bound weakly, or the owner would keep itself alive."""
    held = weakref.ref(owner)

    def call(x: Tensor, bias: Tensor | None) -> Tensor:
        return run(x, cast(Owner, held()), bias)

    return call


def dense_run(
    owner: Owner, dense: Tensor, otherwise: Callable[[Tensor, Owner, Tensor | None], Tensor]
) -> Run:
    """The product by a dense weight [out, in], also a prepacked one; `otherwise(x, owner, bias)` where it is
    not finite."""
    exact, linear = owned_run(owner, otherwise), dense_product
    finite = _native.finite_like(dense)

    @dispatch.in_own_precision
    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        y = linear(x, dense, None if bias is None else bias.to(x.dtype))
        return y if finite(y) else exact(x, bias)

    return run


def native_run(
    name: str,
    parts: Sequence[Tensor],
    y_shape: tuple[int, ...],
    numbers: Sequence[int],
    residual: bool = False,
) -> Run:
    """The run of a kernel that takes x, the parts of a weight, a bias, y, numbers and threads, in that order;
    with `residual` one of the shape of y, or null, before y.

    All is made ready that stays from call to call, the number of threads among it. The parts are kept alive.
    """
    kernel, address = _native.bare(name), _native.address
    held = (tuple(parts), tuple(address(part.data_ptr()) for part in parts))
    sizes = tuple(map(_native.number, (*numbers, _native.threads())))
    plain, empty, float32 = _native.plain, torch.empty, torch.float32

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        flat, y = plain(x), empty(*y_shape, dtype=float32)  # sizes one by one are the faster to read
        if bias is None:
            code = kernel(address(flat.data_ptr()), *held[1], None, address(y.data_ptr()), *sizes)
        else:
            wide = plain(bias)
            at = address(wide.data_ptr())
            code = kernel(address(flat.data_ptr()), *held[1], at, address(y.data_ptr()), *sizes)
        if code:
            _native.refuse(code, kernel)
        return y if x.dtype is float32 else y.to(x.dtype)

    def run_with_residual(x: Tensor, bias: Tensor | None, added: Tensor | None = None) -> Tensor:
        flat, y = plain(x), empty(*y_shape, dtype=float32)
        wide, more = (None if each is None else plain(each) for each in (bias, added))
        at, beside = (None if each is None else address(each.data_ptr()) for each in (wide, more))
        code = kernel(address(flat.data_ptr()), *held[1], at, beside, address(y.data_ptr()), *sizes)
        if code:
            _native.refuse(code, kernel)
        return y if x.dtype is float32 else y.to(x.dtype)

    return run_with_residual if residual else run
