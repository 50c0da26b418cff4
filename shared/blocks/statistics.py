"""What the inputs of a block's matrices look like on the calibration batches: norms and Hessians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ActivationError, StructureError
from ..measure.products import Matrices, Product, observe_products, product_matrices
from ..pruning.inventory import ROUTER, inventory
from .chains import block_name, find_chains
from .walk import Forward, RunningBlock

Kind = Literal["norms", "hessians"]
# A method that reaches less than this share of a block's matrices would state a sparsity that is none.
_LEAST_REACH = 0.5


@dataclass(frozen=True)
class MeasuredMatrices:
    """Matrices of a block and a statistic of the inputs of each.

    Attributes:
        matrices: the parameter; experts may be a stack of them.
        values: for each matrix the norms of its inputs, [in], or 2/n sum x x^T, [in, in]; zero for one
            that no row reached, as an expert that no token was sent to.
    """

    matrices: Matrices
    values: list[Tensor]


def measure_inputs(
    block: RunningBlock, kind: Kind, total: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, MeasuredMatrices]:
    """Run a block on its batches and measure what enters each of its matrices, by name in the block.

    Routers of mixtures are left out, as `zoo.shared.pruning.inventory` tells them.

    Args:
        block: from `walk_blocks`.
        kind: L2 norms of the input features, or Hessians 2/n sum x x^T.
        total: sums a tensor over the processes that share the batches.

    Raises:
        ActivationError: inputs that are not finite.
        StructureError: less than half of the block's matrices are multiplied in a way that is seen.
    """
    parameters = dict(block.module.named_parameters())
    sums: dict[tuple[str, int], Tensor] = {}
    counts: dict[tuple[str, int], int] = {}
    seen: dict[str, Matrices] = {}

    def see(product: Product) -> None:
        name, key = product.name, (product.name, product.index or 0)
        seen.setdefault(name, Matrices(name, parameters[name], product.axis))
        rows = product.rows.float()
        value = rows.square().sum(0) if kind == "norms" else 2 * rows.T @ rows
        sums[key] = value + sums[key] if key in sums else value
        counts[key] = counts.get(key, 0) + len(rows)

    with torch.no_grad(), observe_products(parameters, see):
        for batch in range(len(block.inputs)):
            block.run(batch)
    return {
        name: MeasuredMatrices(one, _values(block, one, kind, sums, counts, total))
        for name, one in _reached(block.module, block.name, seen).items()
    }


def _values(
    block: RunningBlock,
    one: Matrices,
    kind: Kind,
    sums: dict[tuple[str, int], Tensor],
    counts: dict[tuple[str, int], int],
    total: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    size = one.parameter.shape[one.axis]
    shape = (size,) if kind == "norms" else (size, size)
    values = []
    for index in range(len(one.views())):
        own = sums.get((one.name, index))
        value = total(torch.zeros(shape, device=one.parameter.device) if own is None else own)
        if kind == "norms":
            value = value.sqrt()
        elif rows := int(total(torch.tensor(float(counts.get((one.name, index), 0))))):
            value = value / rows
        if not bool(torch.isfinite(value).all()):
            raise ActivationError(
                f"the inputs of {block.name}.{one.name.removesuffix('.weight')} are not finite on the "
                "calibration data; check the checkpoint, or load it in a wider dtype"
            )
        values.append(value)
    return values


def chain_matrices(model: nn.Module, batch: object, forward: Forward) -> dict[str, Matrices]:
    """The matrices inside the blocks of a model, by parameter name, as `measure_inputs` would find them.

    Args:
        model: a network with blocks, all of it in memory.
        batch: one batch that the model is run on.
        forward: runs it.

    Raises:
        StructureError: no blocks, or matrices that are not reached.
    """
    seen = product_matrices(model, lambda: forward(model, batch))
    found: dict[str, Matrices] = {}
    for path, chain in find_chains(model).items():
        for index, module in enumerate(chain):
            block = block_name(path, index)
            prefix = f"{block}."
            own = {
                name.removeprefix(prefix): Matrices(name.removeprefix(prefix), one.parameter, one.axis)
                for name, one in seen.items()
                if name.startswith(prefix)
            }
            for name, one in _reached(module, block, own).items():
                found[prefix + name] = Matrices(prefix + name, one.parameter, one.axis)
    return found


def _reached(module: nn.Module, path: str, seen: dict[str, Matrices]) -> dict[str, Matrices]:
    """The matrices of a block that methods work on, in the order of its parameters.

    A linear layer that never ran counts, too: an expert that was not chosen is still pruned.
    """
    found = dict(seen)
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and isinstance(part.weight, nn.Parameter):
            key = f"{name}.weight" if name else "weight"
            found.setdefault(key, Matrices(key, part.weight, 1))
    routers = {weight.name for weight in inventory(module).weights if weight.reason == ROUTER}
    matrices = {name: one for name, one in module.named_parameters() if one.dim() > 1}
    kept = {name: found[name] for name in matrices if name in found and name not in routers}
    reached = sum(one.parameter.numel() for one in kept.values())
    everything = sum(parameter.numel() for parameter in matrices.values())
    if not seen or reached < _LEAST_REACH * everything:
        missed = ", ".join([name for name in matrices if name not in kept][:4])
        raise StructureError(
            f"only {reached / max(1, everything):.0%} of the weights of {path} ({type(module).__name__}) are "
            f"seen as matrices that activations are multiplied by; out of reach: {missed}. Convolutions and "
            "cast or parametrised weights are not seen; method prune takes them"
        )
    return kept
