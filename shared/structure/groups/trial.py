"""Trial cuts: one unit of a family is cut from a copy, which must run and compute what the masked model
does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GroupError
from .families import GroupMap


def tried(model: nn.Module, groups: GroupMap, inputs: tuple[Any, ...]) -> GroupMap:
    """The families of which a unit can really be cut; the others go to `frozen`, with what came of it."""
    failed: dict[str, str] = {}
    _try(model, groups, list(groups), inputs, failed)
    if not failed:
        return groups
    frozen = groups.frozen | {name: f"cannot be cut: {reason}" for name, reason in failed.items()}
    return GroupMap([family for name, family in groups.items() if name not in failed], frozen)


def _try(
    model: nn.Module, groups: GroupMap, names: list[str], inputs: tuple[Any, ...], failed: dict[str, str]
) -> None:
    """Cut all these families at once, and where that fails the halves of the list, down to single ones."""
    reason = _trial(model, groups, names, inputs) if names else ""
    if not reason:
        return
    if len(names) == 1:
        failed[names[0]] = reason
        return
    middle = len(names) // 2
    _try(model, groups, names[:middle], inputs, failed)
    _try(model, groups, names[middle:], inputs, failed)


def _trial(model: nn.Module, groups: GroupMap, names: list[str], inputs: tuple[Any, ...]) -> str:
    """What stands in the way of cutting the last unit of these families, or nothing."""
    from ..surgery import check_cut

    keep = {name: torch.arange(groups[name].units) < groups[name].units - 1 for name in names}
    keep = {name: units for name, units in keep.items() if len(units) > 1}
    for part in _by_exactness(groups, keep):
        try:
            check_cut(model, groups, part, inputs, allow_inexact=True)
        except (GroupError, RuntimeError, ValueError, TypeError) as error:
            return " ".join(str(error).split())[:300]
    return ""


def _by_exactness(groups: GroupMap, keep: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The exact families, whose outputs can be compared, and all."""
    exact = {name: units for name, units in keep.items() if groups[name].exact}
    if exact:
        yield exact
    if len(exact) < len(keep):
        yield keep
