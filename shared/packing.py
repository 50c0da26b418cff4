"""Modules that skip the zeros of those they replace, for inference.

`pack(model, masks)` replaces each module whose weights are masked by what the converter of its type makes of
it. Where there is no converter, or it declines, the module stays as it is: masked, with the same outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shared.masks import Mask, MaskSet, set_masks

# Takes a module and the masks of its own parameters by their short names; None where the module should stay.
Converter = Callable[[nn.Module, Mapping[str, Mask]], "nn.Module | None"]
_CONVERTERS: dict[type[nn.Module], Converter] = {}


def register_packer(module_type: type[nn.Module]) -> Callable[[Converter], Converter]:
    """Decorator: `convert(module, masks) -> module or None` packs modules of exactly this type."""

    def register(convert: Converter) -> Converter:
        _CONVERTERS[module_type] = convert
        return convert

    return register


def pack(model: nn.Module, masks: MaskSet) -> nn.Module:
    """Replace, in place, the masked modules of a model by modules that skip the zeros.

    A parameter shared with another module is left alone. The model carries the masks of the modules that
    stayed. The result is for inference: packed modules have no trainable weight.

    Args:
        model: a model whose masked entries are zero.
        masks: its masks by parameter name.

    Returns:
        The model; another object only if the model itself is a module that is replaced.

    Raises:
        MaskError: the masks do not fit the model.
    """
    masks.check(model)
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    replaced: set[str] = set()
    for name, module in list(model.named_modules()):
        convert = _CONVERTERS.get(type(module))
        prefix = f"{name}." if name else ""
        own = {key: masks[prefix + key] for key, _ in module.named_parameters(recurse=False)
               if prefix + key in masks}
        tied = any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False))
        packed = convert(module, own) if convert is not None and own and not tied else None
        if packed is None:
            continue
        packed.train(module.training)
        replaced.update(prefix + key for key in own)
        if name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed)
        else:
            model = packed
    set_masks(model, MaskSet({name: mask for name, mask in masks.items() if name not in replaced}))
    return model


class PackedLinear(nn.Module):
    """y = x W^T + b with W in compressed sparse rows: only kept weights are stored and multiplied.

    Args:
        weight: dense weight.
        keep: its mask.
        bias: as in `torch.nn.Linear`.
    """

    bias: Tensor | None
    crow: Tensor
    col: Tensor
    values: Tensor

    def __init__(self, weight: Float[Tensor, "out in"], keep: Mask, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rows, columns = keep.keep.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=self.out_features)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.register_buffer("crow", crow.to(torch.int32))
        self.register_buffer("col", columns.to(torch.int32))
        self.register_buffer("values", weight.detach()[rows, columns].clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Apply the layer."""
        shape = (self.out_features, self.in_features)
        weight = torch.sparse_csr_tensor(self.crow, self.col, self.values, shape, check_invariants=False)
        out = (weight @ x.reshape(-1, self.in_features).t()).t()
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kept={self.values.numel()}"


# One thread, torch CSR against dense: 512x1433 and larger win from 90 % zeros on at batches of 16 to 256
# (1.2x to 2.4x), smaller or denser layers lose at every batch.
_MIN_SPARSITY = 0.9
_MIN_WEIGHTS = 500_000


@register_packer(nn.Linear)
def _pack_linear(module: nn.Module, masks: Mapping[str, Mask]) -> nn.Module | None:
    """CSR where it is faster than dense, else None."""
    weight, keep = module.weight, masks.get("weight")
    if not isinstance(weight, Tensor) or keep is None or set(masks) != {"weight"}:
        return None
    if weight.dtype not in (torch.float32, torch.float64):
        return None  # no CSR product in half precision on CPUs
    if keep.numel < _MIN_WEIGHTS or keep.sparsity < _MIN_SPARSITY:
        return None
    bias = module.bias
    return PackedLinear(weight, keep, bias if isinstance(bias, Tensor) else None)
