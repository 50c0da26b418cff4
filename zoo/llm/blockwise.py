"""Transformer blocks one after the other: each is changed while it sees what the changed blocks before it put
out.

    def visit(block: RunningBlock) -> None: ...     # may change block.module in place
    walk_blocks(model, batches, visit)

At any time one block computes, on the hidden states of all calibration batches; a chain of L blocks costs two
forward passes of each block, whatever is done to it. Where a model does not fit into memory, `opened` brings
one block in at a time (see `zoo.llm.shards`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from zoo.errors import ConfigError, DataError

Forward = Callable[[nn.Module, Any], Any]
#: Brings the block of that name into memory for as long as the context lasts.
Opened = Callable[[str], AbstractContextManager[None]]
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _ChainEnd(Exception):
    """Raised by the stub of the last block: nothing behind the chain has to run."""


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
    """

    name: str
    module: nn.Module
    inputs: list[Tensor]
    calls: list[_Call]
    index: int
    total: int

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


def block_chains(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of blocks of a model, outermost ones, in order of definition.

    A list of blocks is a ModuleList of modules of one class that hold linear layers: the decoder layers of a
    language model; in a vision-language model those of the vision tower come first.

    Raises:
        ConfigError: there is none.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or not isinstance(module, nn.ModuleList):
            continue
        alike = len({type(child) for child in module}) == 1
        if alike and any(isinstance(part, nn.Linear) for part in module[0].modules()):
            found[name] = module
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no list of blocks with linear layers; "
            "give a transformer whose layers are an nn.ModuleList"
        )
    return found


def default_forward(model: nn.Module, batch: Any) -> Any:
    """A batch is a tensor of token ids, or the keyword arguments of the model; moved to its device."""
    inputs = dict(batch) if isinstance(batch, dict) else {"input_ids": batch}
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    moved = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in inputs.items()}
    return model(**moved, use_cache=False)


@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    batches: Sequence[Any],
    visit: Callable[[RunningBlock], None],
    *,
    forward: Forward = default_forward,
    opened: Opened | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Visit every block of every chain in order; what a visit changes is felt by all later blocks.

    The model's weights are its own again afterwards, apart from what `visit` changed; it is not switched
    between train and eval mode.

    Args:
        model: a transformer, see `block_chains`.
        batches: calibration batches, kept in memory with one hidden state each.
        visit: called with each block.
        forward: runs the model on a batch.
        opened: brings a block into memory; by default all are there.
        progress: called with (done, total, name) after each block.

    Raises:
        ConfigError: no blocks found.
        DataError: no batch, or hidden states that are not finite.
    """
    if not batches:
        raise DataError("No calibration batches; pass at least one.")
    held: Opened = opened or (lambda name: nullcontext())
    chains = block_chains(model)
    total, done = sum(len(chain) for chain in chains.values()), 0
    for path, chain in chains.items():
        hidden, calls = _record(model, list(chain), batches, forward)
        for index, module in enumerate(chain):
            block = RunningBlock(f"{path}.{index}", module, hidden, calls.pop(0), index, len(chain))
            with held(block.name):
                visit(block)
                hidden = [block.run(batch) for batch in range(len(batches))]
            if not all(bool(torch.isfinite(state).all()) for state in hidden):
                raise DataError(
                    f"{block.name} puts out values that are not finite on the calibration text; "
                    "check the checkpoint, or load it in a wider dtype"
                )
            done += 1
            if progress is not None:
                progress(done, total, block.name)


def _record(
    model: nn.Module, chain: list[nn.Module], batches: Sequence[Any], forward: Forward
) -> tuple[list[Tensor], list[list[_Call]]]:
    """The hidden states that enter the first block, and the other arguments of every block, per batch.

    The blocks are stubs meanwhile that hand their input on: a model may give each block other masks and
    positions, and finding them out should not cost the blocks' work.
    """
    hidden: list[Tensor] = []
    calls: list[list[_Call]] = [[] for _ in chain]
    with _stubs(chain, hidden, calls):
        for batch in batches:
            try:
                forward(model, batch)
            except _ChainEnd:
                continue
            raise ConfigError(
                f"{type(model).__name__} did not run its {len(chain)} blocks on a calibration batch"
            )
    return hidden, calls


@contextmanager
def _stubs(chain: list[nn.Module], hidden: list[Tensor], calls: list[list[_Call]]) -> Iterator[None]:
    def stub(index: int) -> Callable[..., Tensor]:
        def forward(state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                hidden.append(state.detach())
            calls[index].append((args, kwargs))
            if index == len(chain) - 1:
                raise _ChainEnd
            return state

        return forward

    try:
        for index, module in enumerate(chain):
            module.forward = stub(index)
        yield
    finally:
        for module in chain:
            module.__dict__.pop("forward", None)
