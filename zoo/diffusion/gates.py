"""Gates on heads and neurons: factors on the columns that a unit owns in a down-projection's input.

A gate multiplies the input of the down-projection by a forward pre-hook, which is right for every family: the
input of an attention's projection is the concatenation of its heads, that of a feed-forward's second layer
its activated neurons. Gates are known by the name of their group, never by the order of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zoo.diffusion.units import UnitGroup, unit_groups
from zoo.errors import ConfigError

Factors = Callable[[UnitGroup], Tensor]
Hook = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]


@contextmanager
def gated(network: nn.Module, factors: Mapping[str, Tensor] | Factors) -> Iterator[None]:
    """Multiply units by factors while the context lasts.

    Args:
        network: whose units are gated.
        factors: per group a vector with one factor per unit, by name (groups that are not named stay as they
            are); or a function that gives it, asked at every call of the layer.

    Raises:
        ConfigError: a group that the network has not, or a vector of another length.
    """
    groups = {group.name: group for group in unit_groups(network)}
    if isinstance(factors, Mapping):
        for name, vector in factors.items():
            if name not in groups:
                raise ConfigError(f"{name!r} is no group of units of this {type(network).__name__}")
            if vector.shape != (groups[name].count,):
                raise ConfigError(
                    f"{name!r} has {groups[name].count} units; received shape {tuple(vector.shape)}"
                )
        groups = {name: groups[name] for name in factors}
    handles = []
    try:
        for group in groups.values():
            ask = (lambda g: factors(g)) if callable(factors) else (lambda g: factors[g.name])
            for part in group.columns:
                linear = network.get_submodule(part.linear)
                handles.append(linear.register_forward_pre_hook(_hook(group, part.start, ask)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    group: UnitGroup, start: int, ask: Factors
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    size = group.count * group.width

    def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        factor = ask(group).to(x.dtype).repeat_interleave(group.width)
        if start == 0 and x.shape[-1] == size:
            return (x * factor,)
        parts = x.split([start, size, x.shape[-1] - start - size], dim=-1)
        return (torch.cat([parts[0], parts[1] * factor, parts[2]], dim=-1),)

    return multiply
