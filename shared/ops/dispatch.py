"""Which backend runs an op: forced by `backend(...)`, or chosen from measurements.

Every op offers some of these backends:

- `reference`: the definition, plain PyTorch, any device and dtype;
- `native`: the C++ kernels (CPU);
- `vendor`: the sparse kernels that torch brings along (MKL on a CPU, cuSPARSELt on a GPU);
- `dense`: the same result by a dense product, offered so that a sparse layer is never slower than a dense
one;
- `triton`: Triton kernels of the ops of language models (a CUDA device), which `auto` leaves alone.

`auto` looks the case up in a table of measured times: `calibration.json` beside this file (measured on the
machine it names), or the one that `calibrate()` measured on this machine and left in the cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad as forward_mode

from ..bench.timing import compare
from ..errors import OpError
from ..store.io import atomic_write, read_json
from . import _native
from .layout import VALUE_TYPES

BACKENDS = ("auto", "reference", "native", "vendor", "dense", "triton")
# A call is only near a measured case: what is faster there by less than this may be slower here.
MARGIN = 0.85
_BY_COPY = {"dense", "vendor"}  # backends that may multiply by a copy of the weight
_requested: ContextVar[str] = ContextVar("zoo_ops_backend", default="auto")


@dataclass(frozen=True)
class Plan:
    """The backend that runs a call, why, and what the table says: seconds per backend in the nearest
    measured case."""

    op: str
    backend: str
    reason: str
    measured: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * t:.3g} ms" for name, t in self.measured.items())
        return f"{self.op}: {self.backend}, {self.reason}" + (f" ({times})" if times else "")


@dataclass(frozen=True)
class Entry:
    """One measured case: what was run (`kind` is compared exactly, `sizes` by nearness) and seconds per
    backend, without what `looking` adds."""

    op: str
    kind: str
    threads: int
    sizes: tuple[float, ...]
    times: Mapping[str, float]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the `with` block on one backend: "reference", "native", "vendor", "dense", "triton"
    or "auto".

    Raises:
        OpError: unknown name. An op that does not offer the backend raises when it is called.
    """
    if name not in BACKENDS:
        raise OpError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


requested = _requested.get  # what the enclosing `backend(...)` block asks for, "auto" outside of any


@contextlib.contextmanager
def for_gradients() -> Iterator[None]:
    """Let products of a backward pass choose for themselves where the forward's backend has none for them."""
    with backend("auto") if requested() in ("vendor", "dense", "triton") else contextlib.nullcontext():
        yield


def direct(*tensors: torch.Tensor | None) -> bool:
    """True where torch's dispatcher would add nothing but its cost to a call of a custom op.

    That is an eager call on plain tensors that needs no gradient, under no mode (fake tensors, tracing,
    vmap), of which none is a view that still has to be negated.

    Raises:
        OpError: a tensor carries a tangent: forward-mode derivatives would be lost without a word.
    """
    if _compiling():
        return False
    transformed = _functorch_level() is not None
    if transformed or forward_mode._current_level >= 0:
        refuse_tangents(*tensors)
    if transformed or _modes():
        return False
    trains = _grad_enabled()
    for tensor in tensors:  # a loop: this runs before every small product
        if tensor is None:
            continue
        kind = type(tensor)
        if (kind is not _Tensor and kind is not _Parameter) or (trains and tensor.requires_grad):
            return False
        if tensor.is_neg():
            return False
    return True


def runs_natively(
    x: torch.Tensor, *others: torch.Tensor | None, asked: tuple[str, ...] = ("auto", "native")
) -> bool:
    """Whether a call on x and others may go straight to a native kernel: x in fp32, bf16 or fp16 on a CPU,
    outside of tracing, autocast and gradients, and no backend asked for but these."""
    return (
        x.dtype in VALUE_TYPES
        and x.device.type == "cpu"
        and direct(x, *others)
        and not _autocast()
        and requested() in asked
        and _native.available()
    )


def eager() -> bool:
    """True under no mode that a custom op must be seen by (fake tensors, tracing, vmap)."""
    return not (_compiling() or _modes()) and _functorch_level() is None


def refuse_transforms(op: str) -> None:
    """Raise OpError under torch.func (vmap, grad ...), for an op that is not defined there."""
    if not _compiling() and _functorch_level() is not None:
        raise OpError(f"{op} is not defined under torch.func: call it outside of vmap, grad and jvp")


def refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """Raise OpError where a tensor carries a tangent, or `torch.func` wants a derivative: custom ops have
    derivatives for `backward` only."""
    if _compiling():
        return
    if any(level.key() in _DERIVATIVES for level in _functorch_stack() or ()):
        raise OpError(
            "the sparse operations have no derivative under torch.func (jvp, grad, jacrev ...): use "
            "torch.autograd.grad or backward"
        )
    if forward_mode._current_level >= 0 and any(
        tensor is not None and forward_mode.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise OpError(
            "the sparse operations have no forward-mode derivative: the tangent would be lost. Use backward, "
            "or take the dense form (to_dense) there"
        )


Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def in_own_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: run outside of autocast, so that every backend computes and returns the dtype of x."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not _autocast():
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


# Looked up once, as the look-ups would take as long as the answers.
_compiling, _grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled
_modes, _functorch_level = torch._C._len_torch_dispatch_stack, torch._C._functorch.maybe_current_level
_functorch_stack = torch._C._functorch.get_interpreter_stack
_DERIVATIVES = (torch._C._functorch.TransformType.Jvp, torch._C._functorch.TransformType.Grad)
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def looking(copied: int) -> float:
    """Seconds that a call by a copy takes to find that so many bytes, which it was made from, are the same
    (`cache.py`), and that its result is finite: as measured on the machine of the shipped table."""
    return 8e-6 + copied / 40e9


def choose(
    op: str,
    device: torch.device,
    offered: Sequence[str],
    kind: str,
    sizes: tuple[float, ...],
    copied: int = 0,
) -> Plan:
    """The backend for a call of `op`.

    Args:
        device: where the tensors are.
        offered: backends that can run this very call, best guess first; used when nothing was measured.
        kind: what must match exactly in the table (layout, dtype).
        sizes: positive numbers compared by the sum of |log2 ratio| (entries, batch, density ...).
        copied: bytes of the weight where "dense" and "vendor" multiply by a copy, which is looked up by them.

    Raises:
        OpError: the forced backend is not offered, or is native and there is no native library.
    """
    forced = _requested.get()
    if forced != "auto":
        if forced not in offered:
            names = ", ".join(offered)
            raise OpError(f"{op} has no backend {forced!r} for this call ({kind}, {device}): it has {names}")
        if forced == "native" and (reason := _native.missing()):
            raise OpError(f"{op}: the native backend was asked for, but {reason}")
        return Plan(op, forced, "asked for by ops.backend")
    return _auto(op, device.type, tuple(offered), kind, torch.get_num_threads(), sizes, copied)


@functools.lru_cache(maxsize=4096)
def _auto(
    op: str,
    device: str,
    offered: tuple[str, ...],
    kind: str,
    threads: int,
    sizes: tuple[float, ...],
    copied: int,
) -> Plan:
    if device != "cpu":
        usable = tuple(name for name in offered if name != "native")
        return Plan(op, usable[0], f"first choice on {device}")
    if "native" in offered and (reason := _native.missing()):
        offered = tuple(name for name in offered if name != "native")
        return Plan(op, offered[0], f"no native library: {reason}")
    nearest = _nearest(op, kind, threads, sizes)
    if nearest is None:
        return Plan(op, offered[0], "first choice, nothing measured for this case")
    measured = {name: nearest.times[name] for name in offered if name in nearest.times}
    if not measured:
        return Plan(op, offered[0], "first choice, nothing measured for this case")
    if copied:  # the times are those of another size, and so are the bytes
        looked = looking(round(copied * nearest.sizes[0] / sizes[0]))
        measured |= {name: time + looked for name, time in measured.items() if name in _BY_COPY}
    best = min(measured, key=measured.__getitem__)
    if "dense" in measured and measured[best] > MARGIN * measured["dense"]:
        reason = f"no other of {len(measured)} is clearly faster where last measured"
        return Plan(op, "dense", reason, measured)
    return Plan(op, best, f"fastest of {len(measured)} where last measured", measured)


def _nearest(op: str, kind: str, threads: int, sizes: tuple[float, ...]) -> Entry | None:
    def distance(entry: Entry) -> tuple[float, float]:
        return abs(math.log2(entry.threads / threads)), sum(
            abs(math.log2(ours / theirs)) for ours, theirs in zip(sizes, entry.sizes, strict=True)
        )

    return min(table().get((op, kind), ()), key=distance, default=None)


def calibration_file() -> Path:
    """Where this machine's own table is kept: $ZOO_CACHE, else ~/.cache/sparse-model-zoo."""
    folder = os.environ.get("ZOO_CACHE") or Path.home() / ".cache" / "sparse-model-zoo"
    return Path(folder) / f"calibration-{platform.node() or 'machine'}.json"


@functools.cache
def table() -> dict[tuple[str, str], list[Entry]]:
    """The measured cases, by (op, kind): this machine's where they exist, the shipped ones otherwise."""
    entries = _read(_native.FOLDER / "calibration.json")
    return entries | _read(calibration_file())


def _read(path: Path) -> dict[tuple[str, str], list[Entry]]:
    if not path.exists():
        return {}
    try:
        rows = [
            Entry(r["op"], r["kind"], int(r["threads"]), tuple(map(float, r["sizes"])), dict(r["times"]))
            for r in read_json(path)["entries"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise OpError(
            f"{path} is not a calibration table ({error!r}): delete it, or run `zoo bench --calibrate`"
        ) from error
    grouped: dict[tuple[str, str], list[Entry]] = {}
    for row in rows:
        grouped.setdefault((row.op, row.kind), []).append(row)
    return grouped


@dataclass(frozen=True)
class Example:
    """A call for the conformance suite (`conformance.check_op`).

    Attributes:
        call: runs the op; takes the inputs and returns one tensor. It must not keep what it returns.
        inputs: floating-point tensors; the first is the one that a product multiplies.
        differentiable: whether gradients reach all of them.
        tolerance: relative and absolute, of one backend's result against another's.
    """

    call: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    differentiable: bool = True
    tolerance: float = 1e-4

    def run(self, *instead: torch.Tensor) -> torch.Tensor:
        """The call, with the first inputs replaced."""
        return self.call(*instead, *self.inputs[len(instead) :])


_calibrators: dict[str, Callable[[bool], list[Entry]]] = {}
_planners: dict[str, Callable[..., Plan]] = {}
_examples: dict[str, Callable[[], Iterable[Example]]] = {}


def register(
    op: str,
    *,
    plan: Callable[..., Plan],
    calibrate: Callable[[bool], list[Entry]] | None = None,
    examples: Callable[[], Iterable[Example]] | None = None,
) -> None:
    """Make `op` known to `explain` (its `plan` takes the op's arguments), to `calibrate` and, by examples, to
    `conformance.check_op`."""
    _planners[op] = plan
    if examples is not None:
        _examples[op] = examples
    if calibrate is not None:
        _calibrators[op] = calibrate


def registered() -> list[str]:
    """The names of all ops."""
    return sorted(_planners)


def examples(op: str, seed: int = 0) -> list[Example]:
    """The examples of an op, the same for the same seed.

    Raises:
        OpError: no such op.
    """
    if op not in _examples:
        raise OpError(f"op {op!r} registers no examples: there are those of {', '.join(sorted(_examples))}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return list(_examples[op]())


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """Tell which backend `op(*args, **kwargs)` would run on, and why, without running it.

    Args:
        op: an op's function or its name.

    Raises:
        OpError: no such op; and whatever the op itself refuses.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _planners:
        raise OpError(f"unknown op {name!r}: there are {', '.join(registered())}")
    return _planners[name](*args, **kwargs)


def measure(
    op: str,
    run: Callable[[], object],
    offered: Sequence[str],
    kind: str,
    sizes: tuple[float, ...],
    copied: int = 0,
    *,
    quick: bool,
    plain: Callable[[], object] | None = None,
) -> Entry:
    """Time a call on each offered backend but the reference, side by side, for the table.

    Args:
        run: the call.
        offered, kind, sizes, copied: what the op passes to `choose` for it.
        quick: shorter blocks.
        plain: the product by a plain dense layer, for an op whose "dense" multiplies by a copy: the table has
            what a plain layer takes, to which `choose` adds what looking the copy up costs.
    """

    def forced(name: str) -> Callable[[], object]:
        timed = plain if plain is not None and name == "dense" else run

        def call() -> object:
            with backend(name):
                return timed()

        return call

    functions = {name: forced(name) for name in offered if name != "reference"}
    threads = torch.get_num_threads()
    timings = compare(
        functions,
        rounds=4,
        block_seconds=0.004 if quick else 0.01,
        # CPU time of one thread is what other programs disturb least
        clock=time.process_time if threads == 1 else time.perf_counter,
    )
    times = {name: timing.p10 for name, timing in timings.items()}  # other programs make times longer only
    if copied and "vendor" in times:
        times["vendor"] = max(0.1 * times["vendor"], times["vendor"] - looking(copied))
    return Entry(op, kind, threads, sizes, times)


def calibrate(ops: Sequence[str] | None = None, *, quick: bool = False, path: Path | None = None) -> Path:
    """Measure the cases that `auto` looks up, on this machine and with the current number of threads, and
    keep them for later processes, beside those of other numbers of threads.

    Args:
        ops: names of ops, all by default.
        quick: fewer cases and repeats.
        path: where to write; `calibration_file()` by default.
    """
    path = path or calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ops or sorted(_calibrators)
    threads = torch.get_num_threads()
    held = [entry for group in _read(path).values() for entry in group]
    kept = [entry for entry in held if entry.op not in names or entry.threads != threads]
    measured = [entry for name in names for entry in _calibrators[name](quick)]
    rows = [
        {
            "op": e.op,
            "kind": e.kind,
            "threads": e.threads,
            "sizes": [float(f"{size:.5g}") for size in e.sizes],
            "times": {name: float(f"{t:.3g}") for name, t in e.times.items()},
        }
        for e in sorted((*kept, *measured), key=lambda e: (e.op, e.kind, e.threads, e.sizes))
    ]
    machine = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "isa": _native.isa() if _native.available() else None,
    }
    # a line for each case: a third of the bytes of indented numbers, and what changed is seen
    lines = ",\n".join(json.dumps(row, separators=(",", ":"), allow_nan=False) for row in rows)
    atomic_write(path, f'{{"machine": {json.dumps(machine)}, "entries": [\n{lines}\n]}}\n'.encode())
    table.cache_clear()
    _auto.cache_clear()
    return path
