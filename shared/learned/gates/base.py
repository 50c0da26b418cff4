"""What a weight gate is, and how gated weights become plain weights with masks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import MaskError
from ...masks import Mask, MaskSet, tighten
from ...masks.patterns import Pattern, Unstructured
from ...measure.modes import eval_mode


class WeightGate(nn.Module, ABC):
    """A parametrisation that masks a weight while it is trained; `harden` folds it into the weight.

    In eval mode `forward(weight)` must be exactly what hardening leaves: no noise, and zero wherever `keep`
    is False.
    """

    pattern: Pattern = Unstructured()

    @abstractmethod
    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The effective weight."""

    @abstractmethod
    def keep(self, weight: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """The entries that stay when the gate is hardened."""


def harden(model: nn.Module) -> MaskSet:
    """Fold every weight gate of `model` into its weight and give the model the masks that result.

    Each gated weight takes its eval-mode value with exact zeros, the parametrisation is removed, and the
    parameter is the same object under its own name again, so that an optimiser built before keeps working.
    Masks the model carried before are intersected with the new ones.

    Returns:
        The masks the model now carries (see `zoo.shared.masks.masks_of`).

    Raises:
        MaskError: no gate is found, or a gated weight has other parametrisations too.
    """
    found: dict[str, Mask] = {}
    folded: dict[int, str] = {}
    for prefix, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        for tensor_name, chain in list(module.parametrizations.items()):
            if not any(isinstance(link, WeightGate) for link in chain):
                continue
            name = f"{prefix}.{tensor_name}" if prefix else tensor_name
            if len(chain) != 1:
                raise MaskError(
                    f"harden: {name} has {len(chain)} parametrisations; remove all but the gate first."
                )
            gate, original = chain[0], chain.original
            if id(original) in folded:
                raise MaskError(
                    f"harden: {name} and {folded[id(original)]} are one tied parameter; gate it once."
                )
            folded[id(original)] = name
            with eval_mode(gate), torch.no_grad():
                keep = gate.keep(original)
                # What is not kept is zero by the gate's contract; filling makes it +0.0 even for a NaN
                # weight.
                value = gate(original).masked_fill(~keep, 0)
            _restore(module, tensor_name)
            with torch.no_grad():
                original.copy_(value)
            found[name] = Mask(keep, gate.pattern)
    if not found:
        raise MaskError(
            "harden: the model has no weight gates; register some with torch.nn.utils.parametrize first."
        )
    return tighten(model, MaskSet(found))


def _restore(module: nn.Module, tensor_name: str) -> None:
    """Remove the parametrisation and put the original parameter back, in its usual place."""
    # A deep copy shares the class that torch made for the parametrised module, and removing a parametrisation
    # deletes the property from that class; on a class of its own, the module leaves its copies alone.
    shared = type(module)
    own = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=False)
    if tensor_name == "weight":
        # torch puts it back behind the bias, but optimiser checkpoints know parameters by their order only.
        others = [name for name in module._parameters if name != "weight"]
        for name in others:
            module._parameters[name] = module._parameters.pop(name)
