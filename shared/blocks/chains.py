"""Finds the repeated blocks of a network: the lists of modules of one class that it runs in turn."""

from __future__ import annotations

from torch import nn

from ..errors import StructureError


def find_chains(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The lists of blocks of a model, outermost ones, in order of definition.

    A list of blocks is a `ModuleList`, or a `Sequential` of two or more, of modules of one class that have
    parts and matrices: decoder layers; in a vision-language model those of the vision tower come first; the
    blocks of timm's transformers.

    Raises:
        StructureError: there is none.
    """
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        if any(name.startswith(f"{outer}.") or outer == "" for outer in found):
            continue
        children = list(module)
        alike = len({type(child) for child in children}) == 1
        enough = len(children) > 1 or isinstance(module, nn.ModuleList)
        if alike and enough and _is_block(children[0]):
            found[name] = children
    if not found:
        raise StructureError(
            f"{type(model).__name__} has no list of blocks with matrices; give a network whose layers are an "
            "nn.ModuleList or nn.Sequential of one class"
        )
    return found


def block_name(path: str, index: int) -> str:
    """The name of a block in the model."""
    return f"{path}.{index}" if path else str(index)


def _is_block(module: nn.Module) -> bool:
    has_parts = next(module.children(), None) is not None
    return has_parts and any(parameter.dim() > 1 for parameter in module.parameters())
