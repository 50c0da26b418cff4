"""Masks that others made: zeros of any checkpoint, `torch.nn.utils.prune`, compressed-tensors.

    masks = masks_from_zeros(model)                        # any model with zeros among its weights
    state, masks = plain_state(load_file("model.safetensors"))
    model.load_state_dict(state)
    set_masks(model, masks)                                # or: masks.attach(model, optimizer)

Read are `weight_orig` with `weight_mask` (torch.nn.utils.prune), and the formats `sparse-bitmask` and
`sparse-24-bitmask` of compressed-tensors: `shape`, `compressed` (kept values, row by row) and `bitmask`
(their places, eight to a byte, the lowest bit first). Quantised formats are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MaskError, PatternError
from .mask import Mask, MaskSet
from .patterns import NM, Pattern, Unstructured

_QUANTISED = (".weight_packed", ".weight_scale", ".qweight", ".weight_zero_point")


def masks_from_zeros(model: nn.Module, at_least: float = 0.05) -> MaskSet:
    """The masks that drop a model's zeros.

    Args:
        model: any module.
        at_least: the share of zeros from which on a parameter of two or more dimensions is taken for pruned;
            a few zeros are chance, as those of a padding row.

    Returns:
        A mask per pruned parameter, of the pattern 2:4 along the last axis where its zeros lie so.

    Raises:
        MaskError: no parameter has so many zeros.
    """
    found = {
        name: masked(parameter.detach() != 0)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.numel()
        if float((parameter.detach() == 0).double().mean()) >= at_least
    }
    if not found:
        raise MaskError(f"no parameter has {at_least:.0%} zeros or more; lower at_least to take fewer")
    return MaskSet(found)


def plain_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], MaskSet]:
    """A state dict of dense tensors, zeros filled in, and the masks that say where they are.

    Raises:
        MaskError: a part of a sparse tensor is missing or does not fit, or the tensors are quantised.
    """
    if wrong := [name for name in state if name.endswith(_QUANTISED)]:
        raise MaskError(f"{wrong[0]!r} is quantised: dequantise it with the library that made it")
    plain, masks, used = {}, {}, set()
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        where = f"{prefix}." if prefix else ""
        if last.endswith("_orig"):
            own = name.removesuffix("_orig")
            keep = _part(state, f"{own}_mask", name) != 0
            if keep.shape != tensor.shape:
                raise MaskError(f"{own}_mask is {list(keep.shape)}, {name} {list(tensor.shape)}")
            plain[own], masks[own] = torch.where(keep, tensor, 0), masked(keep)
            used |= {name, f"{own}_mask"}
        elif last == "compressed":
            own = f"{where}weight"
            plain[own], masks[own] = _decompressed(state, where, tensor)
            used |= {f"{where}{part}" for part in ("shape", "compressed", "bitmask", "row_offsets")}
    plain |= {name: tensor for name, tensor in state.items() if name not in used}
    return plain, MaskSet(masks)


def _part(state: Mapping[str, Tensor], name: str, beside: str) -> Tensor:
    if name not in state:
        raise MaskError(f"{beside!r} is there without {name!r}")
    return state[name]


def _decompressed(state: Mapping[str, Tensor], where: str, values: Tensor) -> tuple[Tensor, Mask]:
    bits = _part(state, f"{where}bitmask", f"{where}compressed")
    shape = tuple(int(size) for size in _part(state, f"{where}shape", f"{where}compressed").flatten())
    fits = len(shape) == 2 and min(shape) >= 0 and bits.dtype == torch.uint8
    if not fits or tuple(bits.shape) != (shape[0], math.ceil(shape[1] / 8)):
        raise MaskError(f"{where}bitmask is {bits.dtype} {list(bits.shape)} for a weight of {list(shape)}")
    places = np.unpackbits(bits.cpu().numpy(), axis=-1, count=shape[1], bitorder="little")
    keep = torch.from_numpy(places).bool()
    if int(keep.sum()) != values.numel():
        raise MaskError(
            f"{where}bitmask keeps {int(keep.sum())} values, {where}compressed has {values.numel()}"
        )
    dense = torch.zeros(shape, dtype=values.dtype)
    dense[keep] = values.flatten().cpu()
    return dense, masked(keep)


def masked(keep: Tensor) -> Mask:
    """The mask with the narrowest pattern among those that kernels know."""
    pattern: Pattern = NM(2, 4)
    try:
        pattern.check(keep)
    except PatternError:
        pattern = Unstructured()
    return Mask(keep, pattern)
