"""Diffusers networks that know what was cut from them, so that a saved folder loads as it was saved.

The plan stands in `config.json`, and the constructor carries it out before any weight is read: a folder then
loads with plain `from_pretrained` once `zoo.diffusion` is imported. (The stock class would refuse such a
folder, or leave what it misses at random values.)
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from zoo.diffusion.plan import Plan, apply_plan
from zoo.errors import ConfigError

__all__ = ["PRUNED", "ModelMixin", "load_network", "plan_of", "prune"]  # diffusers looks for ModelMixin here


def _pruned(base: Any) -> Any:
    """A subclass of a diffusers network that has the plan in its configuration."""

    def __init__(self: Any, *args: Any, pruning_plan: dict[str, Any] | None = None, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.register_to_config(pruning_plan=pruning_plan)
        if pruning_plan is not None:
            apply_plan(self, Plan.from_dict(pruning_plan))

    def _get_init_keys(input_class: Any) -> set[str]:
        parameters = {*inspect.signature(base.__init__).parameters, "pruning_plan", "self"}
        return parameters - {"kwargs", "args"}

    body = {
        "__init__": __init__,
        "_get_init_keys": staticmethod(_get_init_keys),
        "__module__": __name__,
        "__doc__": f"A {base.__name__} from which a plan of heads, neurons and layers was cut.",
    }
    return type(f"Pruned{base.__name__}", (base,), body)


PrunedUNet2DModel = _pruned(UNet2DModel)
PrunedUNet2DConditionModel = _pruned(UNet2DConditionModel)
PrunedSD3Transformer2DModel = _pruned(SD3Transformer2DModel)
PrunedFluxTransformer2DModel = _pruned(FluxTransformer2DModel)
PrunedDiTTransformer2DModel = _pruned(DiTTransformer2DModel)
PrunedPixArtTransformer2DModel = _pruned(PixArtTransformer2DModel)

PRUNED: dict[type, Any] = {
    UNet2DModel: PrunedUNet2DModel,
    UNet2DConditionModel: PrunedUNet2DConditionModel,
    SD3Transformer2DModel: PrunedSD3Transformer2DModel,
    FluxTransformer2DModel: PrunedFluxTransformer2DModel,
    DiTTransformer2DModel: PrunedDiTTransformer2DModel,
    PixArtTransformer2DModel: PrunedPixArtTransformer2DModel,
}


def prune(network: nn.Module, plan: Plan) -> nn.Module:
    """Cut a network in place and let it know its plan, so that saving and loading keep it.

    No second copy of the weights is made.

    Raises:
        ConfigError: the plan is of another network, the network was cut already, or its class has no pruned
            form.
    """
    if plan_of(network) is not None:
        raise ConfigError("this network was cut already: cut the dense one by one plan for both")
    if type(network) not in PRUNED and type(network) not in PRUNED.values():
        known = ", ".join(kind.__name__ for kind in PRUNED)
        raise ConfigError(f"a {type(network).__name__} cannot be saved with a plan; there are: {known}")
    apply_plan(network, plan)
    network.__class__ = PRUNED.get(type(network), type(network))
    network.register_to_config(pruning_plan=plan.to_dict())  # type: ignore[operator]
    return network


def plan_of(network: nn.Module) -> Plan | None:
    """The plan by which a network was cut; None for a whole one."""
    plan = getattr(getattr(network, "config", None), "pruning_plan", None)
    return None if plan is None else Plan.from_dict(plan)


def load_network(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The network that `save_pretrained` wrote, whole or cut.

    Args:
        folder: with `config.json` and safetensors.
        dtype: precision of the weights; by default single.

    Raises:
        ConfigError: an unknown class, pickled weights, or weights that do not cover the network.
    """
    import json

    folder = Path(folder)
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} has no readable config.json of a diffusers network: {error}") from error
    classes: dict[str, Any] = {kind.__name__: kind for pair in PRUNED.items() for kind in pair}
    if name not in classes:
        raise ConfigError(f"{folder} holds a {name}; there are: {', '.join(sorted(classes))}")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} has no safetensors file; pickled weights are not read. Convert them first."
        )
    network, facts = classes[name].from_pretrained(
        folder, output_loading_info=True, use_safetensors=True, dtype=dtype
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if facts[kind]:
            raise ConfigError(f"{folder}: {kind.replace('_', ' ')}, the first: {sorted(facts[kind])[0]}")
    return network
