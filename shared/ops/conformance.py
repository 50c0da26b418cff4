"""The conformance suite of the operations: what every one of them promises, whichever backend runs it.

    for name in dispatch.registered():
        check_op(name)

An op joins by the `examples` that it registers, a plug-in's like our own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import OpError
from . import dispatch
from .dispatch import Example

_THREADS = 16


def check_op(name: str, seed: int = 0) -> int:
    """Run an op's examples on all of its backends and raise AssertionError where one breaks the promise.

    All backends, `auto` among them, give what `reference` gives: for infinite and NaN inputs, views with any
    strides and with a sign to be taken, under autocast and vmap, from 16 Python threads; the same
    gradients; native kernels give bit for bit the same for any number of torch threads; forward-mode
    tangents are refused.

    Returns:
        How many comparisons were made.

    Raises:
        AssertionError: naming op, example, backend and the promise.
    """
    checks = 0
    examples = dispatch.examples(name, seed)
    largest = max(examples, key=lambda each: each.inputs[0].numel())
    for number, example in enumerate(examples):
        for backend in _backends(example):
            for promise, run in _promises(example):
                with dispatch.backend("reference"):
                    wanted = _outcome(functools.partial(run, example))
                with dispatch.backend(backend):
                    found = _outcome(functools.partial(run, example))
                _compare(f"{name}, example {number}, {backend}: {promise}", found, wanted, example.tolerance)
                checks += 1
            with dispatch.backend(backend):
                for promise, ask in _INVARIANTS if example is largest else _INVARIANTS[1:]:
                    try:
                        ask(example)
                    except AssertionError as error:
                        raise AssertionError(
                            f"{name}, example {number}, {backend}: {promise}: {error}"
                        ) from error
                    checks += 1
    return checks


Outcome = tuple[Tensor, ...] | str


def _outcome(run: Callable[[], Tensor | tuple[Tensor, ...]]) -> Outcome:
    """What a call returns, or that it was refused."""
    try:
        result = run()
    except OpError:
        return "refused"
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _compare(what: str, found: Outcome, wanted: Outcome, tolerance: float) -> None:
    if isinstance(found, str) or isinstance(wanted, str):
        if found != wanted:
            raise AssertionError(f"{what}: one backend refuses what another computes")
        return
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text: f"{what}: {text}",
        )


def _backends(example: Example) -> Iterator[str]:
    for name in dispatch.BACKENDS:
        try:
            with dispatch.backend(name):
                example.run()
        except OpError:
            continue
        yield name


def _promises(example: Example) -> Iterator[tuple[str, Callable[[Example], Tensor | tuple[Tensor, ...]]]]:
    """Calls whose outcome must be the reference's."""
    yield "plain inputs", lambda e: e.run()
    first = example.inputs[0]
    for value in (float("inf"), -float("inf"), float("nan")):
        if first.numel():
            yield f"{value} among the inputs", lambda e, value=value: e.run(_with(first, value))  # type: ignore[misc]
    yield "a view to be negated", lambda e: e.run(*(torch._neg_view(-each) for each in e.inputs))
    yield "every second of a row", lambda e: e.run(*(torch.stack([i, i], -1)[..., 0] for i in e.inputs))
    if first.dim() > 1:
        yield "transposed", lambda e: e.run(first.mT.contiguous().mT)
    yield "under autocast", _under_autocast
    if example.differentiable:
        yield "gradients", _gradients


def _with(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[tensor.numel() // 2] = value
    return changed


def _under_autocast(example: Example) -> Tensor | tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        return example.run()


def _gradients(example: Example) -> tuple[Tensor, ...]:
    inputs = [each.clone().requires_grad_() for each in example.inputs]
    result = example.run(*inputs)
    if not result.requires_grad:
        raise AssertionError("gradients do not reach the inputs")
    scale = torch.linspace(-1, 1, result.numel()).view(result.shape)
    return torch.autograd.grad((result * scale).sum(), inputs)


def _threads_change_nothing(example: Example) -> None:
    if dispatch.requested() != "native":
        return  # torch's own products promise no such thing
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = example.run()
        torch.set_num_threads(2)
        two = example.run()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.nan_to_num(), two.nan_to_num()), "two threads give other bits than one"


def _callers_do_not_meet(example: Example) -> None:
    asked, alone = dispatch.requested(), example.run()
    found: list[Tensor | None] = [None] * _THREADS

    def call(number: int) -> None:
        with dispatch.backend(asked):
            found[number] = example.run()

    callers = [threading.Thread(target=call, args=(number,)) for number in range(_THREADS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(each is not None and torch.equal(each, alone) for each in found), "a caller saw another's sums"


def _inputs_stay(example: Example) -> None:
    before = [each.clone() for each in example.inputs]
    example.run()
    assert all(map(torch.equal, before, example.inputs)), "an input was written to"


def _tangents_are_refused(example: Example) -> None:
    if not example.differentiable:
        return
    ones = torch.ones_like(example.inputs[0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(example.inputs[0], ones)
        assert _outcome(lambda: example.run(dual)) == "refused", "the tangent was lost"
    traced = _outcome(lambda: torch.func.jvp(example.run, (example.inputs[0],), (ones,)))
    assert traced == "refused", "torch.func.jvp lost the tangent"


def _vmap_is_a_loop(example: Example) -> None:
    first = example.inputs[0]
    rows = torch.stack([first, first.flip(0)])
    looped = torch.stack([example.run(row) for row in rows])
    mapped = _outcome(lambda: torch.vmap(example.run)(rows))
    if not isinstance(mapped, str):
        torch.testing.assert_close(mapped[0], looped, rtol=example.tolerance, atol=example.tolerance)


_INVARIANTS = (
    ("threads of Python", _callers_do_not_meet),
    ("threads of torch", _threads_change_nothing),
    ("inputs", _inputs_stay),
    ("forward mode", _tangents_are_refused),
    ("vmap", _vmap_is_a_loop),
)
