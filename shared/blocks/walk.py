"""Blocks one after the other: each is changed while it sees what the changed blocks before it put out.

    def visit(block: RunningBlock) -> None: ...     # may change block.module in place
    walk_blocks(model, batches, visit)

At any time one block computes, on the hidden states of all calibration batches; a chain of L blocks costs two
forward passes of each block, whatever is done to it. Where a model does not fit into memory, `opened` brings
one block in at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ActivationError, SparseError, StructureError
from ..masks import Mask, MaskSet, masks_of
from .chains import block_name, find_chains

Forward = Callable[[nn.Module, Any], Any]
#: Brings the block of that name into memory for as long as the context lasts.
Opened = Callable[[str], AbstractContextManager[None]]
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _ChainEnd(Exception):
    """Raised by the stub of the last block: nothing behind the chain has to run."""


class _Changed(Exception):
    """Raised by a stub that is not given what the stub before it returned."""


@dataclass
class RunningBlock:
    """A block and everything it is called with on the calibration batches.

    Attributes:
        name: as in `model.named_modules()`, e.g. `model.layers.3`.
        module: the block itself.
        inputs: the hidden states that enter it, one tensor per batch.
        calls: the other positional and keyword arguments, one per batch.
        index: its place in the chain.
        total: blocks in the chain.
        masks: those that the model carries of the block's parameters, by their name in the block.
    """

    name: str
    module: nn.Module
    inputs: list[Tensor]
    calls: list[_Call]
    index: int
    total: int
    masks: dict[str, Mask] = field(default_factory=dict)

    def run(
        self,
        batch: int,
        hidden: Float[Tensor, "*batch features"] | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "*batch features"]:
        """The block's output on a batch, from its own input or from other hidden states of that shape, with
        its own weights or with others by their name in the block.
        """
        args, kwargs = self.calls[batch]
        state = self.inputs[batch] if hidden is None else hidden
        output: Any = functional_call(self.module, weights or {}, (state, *args), kwargs)
        return output[0] if isinstance(output, tuple) else output

    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers inside, by their name in the block."""
        return {name: module for name, module in self.module.named_modules() if isinstance(module, nn.Linear)}


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a mapping is its keyword arguments, a tuple or list its positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    batches: Sequence[Any],
    visit: Callable[[RunningBlock], None],
    *,
    forward: Forward = call,
    opened: Opened | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Visit every block of every chain in order; what a visit changes is felt by all later blocks.

    The model's weights are its own again afterwards, apart from what `visit` changed; it is not switched
    between train and eval mode.

    Args:
        model: a network with blocks, see `find_chains`.
        batches: calibration batches, kept in memory with one hidden state each.
        visit: called with each block.
        forward: runs the model on a batch; also a loss will do, of which only the blocks' part is run.
        opened: brings a block into memory; by default all are there.
        progress: called with (done, total, name) after each block.

    Raises:
        StructureError: no blocks found, or blocks that do not hand one hidden state from each to the next.
        ActivationError: no batch, or hidden states that are not finite.
    """
    if not batches:
        raise ActivationError("No calibration batches; pass at least one.")
    held: Opened = opened or (lambda name: nullcontext())
    chains, masks = find_chains(model), masks_of(model) or MaskSet({})
    total, done = sum(len(chain) for chain in chains.values()), 0
    for path, chain in chains.items():
        hidden, calls = _record(model, path, chain, batches, forward)
        for index, module in enumerate(chain):
            name = block_name(path, index)
            own = {key.removeprefix(f"{name}."): masks[key] for key in masks if key.startswith(f"{name}.")}
            block = RunningBlock(name, module, hidden, calls.pop(0), index, len(chain), own)
            with held(block.name):
                visit(block)
                hidden = [block.run(batch) for batch in range(len(batches))]
            if not all(bool(torch.isfinite(state).all()) for state in hidden):
                raise ActivationError(
                    f"{block.name} puts out values that are not finite on the calibration data; "
                    "check the checkpoint, or load it in a wider dtype"
                )
            done += 1
            if progress is not None:
                progress(done, total, block.name)


def _record(
    model: nn.Module, path: str, chain: list[nn.Module], batches: Sequence[Any], forward: Forward
) -> tuple[list[Tensor], list[list[_Call]]]:
    """The hidden states that enter the first block, and the other arguments of every block, per batch.

    The blocks are stubs meanwhile that hand their input on: a model may give each block other masks and
    positions, and finding them out should not cost the blocks' work. Blocks return the state itself or a
    tuple that begins with it, and only the model's code knows which: the other way is tried if one fails.
    """
    failure: Exception | None = None
    for in_tuple in (False, True):
        try:
            return _record_with(model, path, chain, batches, forward, in_tuple)
        except (SparseError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a foreign forward makes of an output that it did not expect
            failure = failure or error
    why = str(failure).strip().splitlines() or [type(failure).__name__]
    raise StructureError(
        f"{type(model).__name__} does not run the blocks of {path or 'its own'} by handing one hidden state "
        f"from each to the next ({type(failure).__name__}: {why[0]}), or the batches do not fit it: its "
        "blocks cannot be walked. Methods that need no calibration, such as prune, still work."
    ) from failure


def _record_with(
    model: nn.Module,
    path: str,
    chain: list[nn.Module],
    batches: Sequence[Any],
    forward: Forward,
    in_tuple: bool,
) -> tuple[list[Tensor], list[list[_Call]]]:
    hidden: list[Tensor] = []
    calls: list[list[_Call]] = [[] for _ in chain]
    with _stubs(chain, hidden, calls, in_tuple):
        for batch in batches:
            try:
                forward(model, batch)
            except _ChainEnd:
                continue
            raise StructureError(
                f"{type(model).__name__} did not run the {len(chain)} blocks of {path} on a calibration batch"
            )
    return hidden, calls


@contextmanager
def _stubs(
    chain: list[nn.Module], hidden: list[Tensor], calls: list[list[_Call]], in_tuple: bool
) -> Iterator[None]:
    handed: list[Any] = [None]

    def stub(index: int, first: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            state, rest = (args[0], args[1:]) if args else (kwargs.pop(first, None), ())
            if not isinstance(state, Tensor) or (index > 0 and state is not handed[0]):
                raise _Changed(f"block {index} is given something else than block {index - 1} returned")
            if index == 0:
                hidden.append(state.detach())
            handed[0] = state
            calls[index].append((rest, kwargs))
            if index == len(chain) - 1:
                raise _ChainEnd
            return (state,) if in_tuple else state

        return forward

    try:
        for index, module in enumerate(chain):
            names = list(inspect.signature(module.forward).parameters)
            module.forward = stub(index, names[0] if names else "")
        yield
    finally:
        for module in chain:
            module.__dict__.pop("forward", None)
