"""Checkpoints whose tensors have other names or shapes than the parameters of transformers' model.

A mixture's folder holds each expert's matrices by themselves, its model all of them in one; transformers
converts as it loads, and back as it saves. Here that is done for single parameters, by its own conversions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)


@dataclass(frozen=True)
class Source:
    """What a parameter is made of.

    Attributes:
        files: names in the checkpoint, each with the pattern of the conversion that it matches, if any.
        made: name that the conversion is called with; that of one of the parameters that it makes.
        converter: of transformers; None for a tensor that is as it is.
    """

    files: tuple[tuple[str, str | None], ...]
    made: str
    converter: Any = None


def sources(model: nn.Module, names: list[str]) -> dict[str, Source]:
    """Of what tensors of a checkpoint each parameter of a model is made.

    Args:
        model: of transformers; it may be on the meta device.
        names: of all tensors in the checkpoint.
    """
    owner: Any = model
    known = dict(model.state_dict())
    mapping = get_model_conversion_mapping(owner)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, owner.base_model_prefix, known)
        found.setdefault(target, []).append((name, pattern))
    result = {}
    for target, files in found.items():
        pattern = files[0][1]
        result[target] = Source(tuple(files), target, of_pattern[pattern] if pattern is not None else None)
    return result


def read(source: Source, read_file: Callable[[str], Tensor], model: nn.Module) -> Tensor:
    """A parameter, made of the tensors of the checkpoint."""
    if source.converter is None:
        return read_file(source.files[0][0])
    converter = copy.deepcopy(source.converter)
    for name, pattern in source.files:
        converter.add_tensor(source.made, name, pattern, read_file(name))
    made = converter.convert(source.made, model=model, config=model.config)[source.made]
    tensor: Tensor = made[0] if isinstance(made, list) else made
    return tensor


def stored(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters as a checkpoint holds them."""
    owner: Any = model
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(owner, tensors).items()}
