"""Consensus sub-networks (Li et al., ECML PKDD 2023): gates that learn to agree, in one training.

Each block with a gate is left out for some inputs at first. A penalty that is zero only where a gate decides
alike for all inputs turns the gates into a consensus, so that the blocks that nobody uses can be removed when
the training ends, without another one. No code was published; the forms of gates and penalty are this zoo's
reading of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from zoo.errors import ConfigError
from zoo.methods.training import Pruned, TrainingMethod, run_model, train_held
from zoo.shared.errors import GroupError
from zoo.shared.learned.gates.functions import hard_step
from zoo.shared.measure.modes import eval_mode
from zoo.shared.structure.averaging import recalibrate_norms
from zoo.shared.structure.relatives import reinitialised, seeded
from zoo.shared.structure.surgery import drop_layers
from zoo.shared.train import Job


class Gated(nn.Module):
    """A block that is left out for the inputs for which its gate is shut: x + a (block(x) - x).

    Args:
        block: keeps the shape of its first argument.
        channels: of that argument.

    Attributes:
        share: of the last batch, for which the gate was open; it has the gradient of the sigmoid.
    """

    def __init__(self, block: nn.Module, channels: int) -> None:
        super().__init__()
        self.block, self.gate = block, nn.Linear(channels, 1)
        nn.init.ones_(self.gate.bias)  # open at first
        self.share = torch.ones(())

    def forward(self, x: Float[Tensor, "b ..."], *rest: Any, **named: Any) -> Float[Tensor, "b ..."]:
        opened = hard_step(self.gate(pooled(x)))[:, 0]
        self.share = opened.mean()
        out = self.block(x, *rest, **named)
        return x + opened.view(-1, *[1] * (x.dim() - 1)) * (out - x)


def pooled(x: Float[Tensor, "b ..."]) -> Float[Tensor, "b c"]:
    """The mean over pixels [b, c, h, w] or tokens [b, t, c]; vectors as they are."""
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x


def disagreement(shares: Float[Tensor, " gates"]) -> Float[Tensor, ""]:
    """Mean of q (1 - q): zero only if every gate decides alike for all inputs."""
    return (shares * (1 - shares)).mean()


def excess(shares: Float[Tensor, " gates"], wanted: float) -> Float[Tensor, ""]:
    """(mean q - tau)^2."""
    return (shares.mean() - wanted).square()


@dataclass
class Consensus(TrainingMethod):
    """Train fresh weights with a gate at every block that keeps its input's shape, and remove the blocks that
    the gates agree to leave out.

    The dense model that is given lends its shape only. How many blocks go is decided by the training, near
    the share that is asked for; one at least stays.
    """

    recipe: ClassVar[dict[str, Any]] = {**TrainingMethod.recipe}

    sparsity: float = 0.5
    """Share of the gated blocks that is to go."""

    polarise: float = 1.0
    """Weight of the disagreement; without it gates go on deciding by the input."""

    pressure: float = 1.0
    """Weight of the distance from the wanted share."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        learner = self.train(model, job)
        shares = shares_of(learner, job)
        removed = unwrap_gates(learner, shares)
        recalibrate_norms(learner, job.sample(20), run_model(job))
        return Pruned(learner, {"blocks/keep": torch.tensor([name not in removed for name in shares])})

    def train(self, model: nn.Module, job: Job) -> nn.Module:
        """A fresh relative of the model with trained gates at its blocks.

        Raises:
            GroupError: no block keeps the shape of its input.
            ConfigError: batches of one sample, of which all gates agree by themselves.
        """
        (batch,) = job.sample(1)
        learner = reinitialised(model, job.seed).to(job.device)
        widths = blocks_of(learner, batch, job)
        with seeded(job.seed):
            gates = [wrap(learner, name, channels) for name, channels in widths.items()]

        def penalty() -> Tensor:
            shares = torch.stack([gate.share for gate in gates])
            return self.polarise * disagreement(shares) + self.pressure * excess(shares, 1 - self.sparsity)

        train_held(job.fit(learner, penalty=penalty))
        return learner


def blocks_of(model: nn.Module, batch: Any, job: Job) -> dict[str, int]:
    """Names of the outermost modules with parameters that keep the shape of a float input of two to four
    dimensions, and the channels of it; norms and mere containers apart, and single layers unless there is
    nothing else.

    Raises:
        GroupError: there is none.
        ConfigError: a batch of one sample.
    """
    found: dict[str, int] = {}
    hooks = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            x = given[0] if given else None
            if not isinstance(x, Tensor) or not isinstance(out, Tensor) or x.shape != out.shape:
                return
            if x.is_floating_point() and 2 <= x.dim() <= 4:
                if len(x) < 2:
                    raise ConfigError("all gates agree on a batch of one sample: give the job larger batches")
                found[name] = x.shape[1] if x.dim() == 4 else x.shape[-1]

        return hook

    skipped = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.Sequential, nn.ModuleList)
    for name, module in model.named_modules():
        if name and any(True for _ in module.parameters()) and not isinstance(module, skipped):
            hooks.append(module.register_forward_hook(look(name)))
    try:
        with torch.no_grad(), eval_mode(model):
            job.loss(model, batch)
    finally:
        for one in hooks:
            one.remove()
    if composed := {n: c for n, c in found.items() if any(True for _ in model.get_submodule(n).children())}:
        found = composed
    outer = {n: c for n, c in found.items() if not any(n.startswith(f"{other}.") for other in found)}
    ordered = {name: outer[name] for name, _ in model.named_modules() if name in outer}
    if not ordered:
        raise GroupError(f"{type(model).__name__} has no block that keeps the shape of its input")
    return ordered


def wrap(model: nn.Module, name: str, channels: int) -> Gated:
    """Put a gate at a block, in place."""
    block = model.get_submodule(name)
    device = next(block.parameters()).device
    gate = Gated(block, channels).to(device)
    model.set_submodule(name, gate)
    return gate


@torch.no_grad()
def shares_of(model: nn.Module, job: Job, batches: int = 20) -> dict[str, float]:
    """The share of the training data for which each gate is open, by the block's name."""
    gates = {name: module for name, module in model.named_modules() if isinstance(module, Gated)}
    seen: dict[str, list[float]] = {name: [] for name in gates}
    with eval_mode(model):
        for batch in job.sample(batches):
            job.loss(model, batch)
            for name, gate in gates.items():
                seen[name].append(float(gate.share))
    return {name: sum(found) / len(found) for name, found in seen.items()}


def unwrap_gates(model: nn.Module, shares: dict[str, float]) -> list[str]:
    """Remove the blocks whose gate is shut for most inputs, in place, and all gates; returns their names. If
    all are shut, the one that is open most often stays."""
    for name in shares:
        gate = model.get_submodule(name)
        assert isinstance(gate, Gated)
        model.set_submodule(name, gate.block)
    removed = [name for name, share in shares.items() if share <= 0.5]
    if len(removed) == len(shares):
        removed.remove(max(shares, key=lambda name: shares[name]))
    drop_layers(model, removed)
    return removed


def polarised(shares: Sequence[float]) -> float:
    """Share of the gates that are open, or shut, for at least 98 % of the data."""
    return sum(share < 0.02 or share > 0.98 for share in shares) / len(shares)
