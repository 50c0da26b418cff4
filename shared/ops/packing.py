"""Modules that skip the zeros of those they replace, for inference.

`pack(model, masks)` replaces each module whose weights are masked by what the converter of its type makes of
it. Where there is no converter, or it declines, the module stays as it is: masked, with the same outputs.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..masks import Mask, MaskSet, set_masks
from ..masks.patterns import NM, Block
from ..structure.folding import fold_norms, fuse_relus
from ..structure.fusing import fuse
from .dense_linear import multiplies
from .dispatch import MARGIN, choose
from .modules import (
    DepthwiseConv,
    LinearByRows,
    MaxPool,
    SparseConv1x1,
    SparseConv2d,
    SparseLinear,
    WideningLinear,
    is_depthwise,
    is_plain,
    is_pointwise,
)
from .nm_linear import PATTERNS, pack_nm
from .sparse_linear import case
from .weights import SparseWeight

# Takes a module and the masks of its own parameters by their short names; None where the module should stay.
Converter = Callable[[nn.Module, Mapping[str, Mask]], "nn.Module | None"]
_log = logging.getLogger("zoo")
_CONVERTERS: dict[type[nn.Module], Converter] = {}
_WITHOUT_MASKS: set[type[nn.Module]] = set()
# Takes a module whose parts were packed; None where it should stay.
CompositeConverter = Callable[[nn.Module], "nn.Module | None"]
_COMPOSITES: list[CompositeConverter] = []


def register_packer(module_type: type[nn.Module], masked: bool = True) -> Callable[[Converter], Converter]:
    """Decorator: `convert(module, masks) -> module or None` packs modules of exactly this type.

    With `masked=False` it also packs those without a mask, which keep their zeros out in another way.
    """

    def register(convert: Converter) -> Converter:
        _CONVERTERS[module_type] = convert
        if not masked:
            _WITHOUT_MASKS.add(module_type)
        return convert

    return register


def register_composite_packer(convert: CompositeConverter) -> CompositeConverter:
    """Decorator: `convert(module) -> module or None` is offered every module that has parts, after these were
    packed, the outermost first.
    """
    _COMPOSITES.append(convert)
    return convert


def pack(model: nn.Module, masks: MaskSet) -> nn.Module:
    """Replace, in place, the masked modules of a model by modules that skip the zeros.

    A parameter shared with another module is left alone. Batch norms are folded into the convolutions before
    them where `fold_norms` can, and sparse convolutions take the ReLU and the shortcut that follow. The
    model carries the masks of the modules that stayed. The result is for inference: packed modules have no
    trainable weight.

    Args:
        model: a model whose masked entries are zero.
        masks: its masks by parameter name.

    Returns:
        The model; another object only if the model itself is a module that is replaced.

    Raises:
        MaskError: the masks do not fit the model.
    """
    masks.check(model)
    if not model.training:
        fold_norms(model, kept=masks)
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    replaced: set[str] = set()
    for name, module in list(model.named_modules()):
        convert = _CONVERTERS.get(type(module), _pack_affine)
        prefix = f"{name}." if name else ""
        own = {
            key: masks[prefix + key]
            for key, _ in module.named_parameters(recurse=False)
            if prefix + key in masks
        }
        tied = any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False))
        wanted = not tied and (own or type(module) in _WITHOUT_MASKS) and not _read_by_owner(model, name)
        packed = convert(module, own) if wanted else None
        if packed is None:
            continue
        packed.train(module.training)
        replaced.update(prefix + key for key in own)
        if name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed)
        else:
            model = packed
    if any(isinstance(module, (SparseConv1x1, SparseConv2d)) for module in model.modules()):
        _pack_between(model, masks)
        fuse_relus(model)
        if not model.training:
            fuse(model)
    model, taken = _pack_composites(model)
    model = _widen_halves(model)
    left = {name: mask for name, mask in masks.items() if name not in replaced and not name.startswith(taken)}
    set_masks(model, MaskSet(left))
    if left:
        _log.info(
            "%d of %d masked weights stay dense, such as %s: no packed layer multiplies by such a weight, it "
            "is shared, or dense is faster",
            *(len(left), len(masks), next(iter(left))),
        )
    return model


def _pack_between(model: nn.Module, masks: MaskSet) -> None:
    """What stands between sparse convolutions, for the channel-major maps of those: depthwise convolutions
    and maxima."""
    for name, module in list(model.named_modules()):
        if name and is_depthwise(module) and f"{name}.weight" not in masks:
            model.set_submodule(name, DepthwiseConv(module).train(module.training))
        elif name and type(module) is nn.MaxPool2d:
            model.set_submodule(name, MaxPool(module).train(module.training))


def _widen_halves(model: nn.Module) -> nn.Module:
    """The model with `WideningLinear` for the layers of halves that stayed, on a processor without products
    of halves; also for those that share a weight."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or multiplies(module.weight.dtype) or _read_by_owner(model, name):
            continue
        if not name:
            return WideningLinear(module)
        model.set_submodule(name, WideningLinear(module))
    return model


def _pack_composites(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Replace modules that are packed as a whole; also returns the prefixes of the parameters they took."""
    taken: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if f"{name}.".startswith(taken) or not _COMPOSITES or not list(module.children()):
            continue
        packed = next((made for convert in _COMPOSITES if (made := convert(module)) is not None), None)
        if packed is None:
            continue
        packed.train(module.training)
        if not name:
            return packed, ("",)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
        taken += (f"{name}.",)
    return model, taken


# Below this, storing where the weights are costs more than the zeros save, whatever the product costs.
MIN_SPARSITY = 0.5
# Blocks of outputs share where they are, and the kernel of 1x1 convolutions loads an input once for a block:
# MobileNet-v1 with 30 % zeros gains a third (`zoo reproduce sparse-byte-nn`).
MIN_BLOCK_SPARSITY = 0.25


@register_packer(nn.Linear)
def _pack_linear(module: nn.Module, masks: Mapping[str, Mask]) -> nn.Module | None:
    """`zoo.shared.ops.SparseLinear`, which runs each product by the fastest backend for its shape, also
    dense; in the layout of `nm_linear` where the mask is of such a pattern. A layer that gains by many rows
    of x only becomes a `LinearByRows`, one that does not gain stays.
    """
    keep = masks.get("weight")
    if not isinstance(module, nn.Linear) or keep is None or set(masks) != {"weight"}:
        return None
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if keep.sparsity < MIN_SPARSITY:
        return None
    pattern = keep.pattern
    if (
        isinstance(pattern, NM)
        and pattern.dim == -1
        and (pattern.n, pattern.m) in PATTERNS
        and keep.kept * pattern.m == keep.numel * pattern.n  # a mask of the pattern may keep fewer
    ):
        weight = pack_nm(module.weight, keep.keep, pattern.n, pattern.m)
        packed = SparseLinear(weight.packed, module.bias)
    else:
        packed = SparseLinear.from_dense(module, keep.keep)
    if _gains(packed.weight):
        return packed.requires_grad_(False)
    by_rows = LinearByRows(module)
    gains = any(by_rows.faster(rows, module.weight.dtype) for rows in _ROWS)
    return by_rows.requires_grad_(False) if gains else None


def _read_by_owner(model: nn.Module, name: str) -> bool:
    """Whether the code of the module above takes `self.<child>.weight` instead of calling the child, as Mamba
    and nn.MultiheadAttention do; initialisation may."""
    path, _, child = name.rpartition(".")
    kinds = type(model.get_submodule(path)).__mro__ if child.isidentifier() else ()
    for kind in kinds[: kinds.index(nn.Module)] if kinds else ():
        for method, function in vars(kind).items():
            if "init" not in method and "reset" not in method and inspect.isfunction(function):
                try:
                    source = inspect.getsource(function)
                except (OSError, TypeError):  # made at run time
                    continue
                if f"self.{child}.weight" in source:
                    return True
    return False


def _pack_affine(module: nn.Module, masks: Mapping[str, Mask]) -> nn.Module | None:
    """What `_pack_linear` makes of a module that computes x W^T + b or x W + b in a way of its own, as
    subclasses of nn.Linear and transformers' Conv1D do: proved on a random input, not by its class."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    own = dict(module.named_parameters())
    if set(masks) != {"weight"} or not set(own) <= {"weight", "bias"}:
        return None
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    mask = masks["weight"]
    for matrix, keep in ((weight, mask), (weight.t(), _transposed(mask))):
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(matrix.detach().contiguous())
        linear.register_parameter("bias", bias)
        if _agree(module, linear):
            return _pack_linear(linear, {"weight": keep})
    return None


def _transposed(mask: Mask) -> Mask:
    """The mask of the transposed matrix."""
    if isinstance(mask.pattern, NM):
        along = NM(mask.pattern.n, mask.pattern.m, -1 if mask.pattern.dim % 2 == 0 else 0)
        return Mask(mask.keep.t().contiguous(), along)
    return Mask(mask.keep.t().contiguous())


@torch.no_grad()
def _agree(module: nn.Module, linear: nn.Linear) -> bool:
    """Whether a module computes what a linear layer does, on a random input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, linear.in_features, generator=generator).to(linear.weight)
    try:
        found, wanted = module(x), linear(x)
    except Exception:  # another width or other arguments: whatever it is, it is not this
        return False
    same = isinstance(found, torch.Tensor) and found.shape == wanted.shape
    return same and torch.allclose(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().amax()))


# Bytes of a dense weight. A smaller one lies in a cache from call to call, as those that were measured do;
# the layers of a large model do not, where the fewer bytes of the packed weight gain more than was measured.
_CACHED = 1 << 20
_ROWS = (1, 64, 2048)  # of x: one, some and many
_NOT_SLOWER = 1 / 0.97  # times the time of a plain layer


def _gains(weight: SparseWeight) -> bool:
    """Whether `auto` is expected to be faster than a plain layer, which has no copy to look up: over all of
    `_ROWS` together, and slower for none of them."""
    times = []
    for rows in _ROWS:
        offered, kind, sizes, copied = case(weight.values.new_empty(rows, weight.shape[1]), weight)
        plan, plain = (
            choose("sparse_linear", weight.values.device, offered, kind, sizes, looked)
            for looked in (copied, 0)
        )
        if not plan.measured:  # nothing is known of it, or it was asked for
            return plan.backend != "dense"
        times.append(plan.measured[plan.backend] / plain.measured["dense"])
        if plan.backend != "dense" and math.prod(weight.shape) * weight.values.element_size() > _CACHED:
            return True
    return max(times) <= _NOT_SLOWER and math.prod(times) < MARGIN


@register_packer(nn.Conv2d)
def _pack_convolution(module: nn.Module, masks: Mapping[str, Mask]) -> nn.Module | None:
    """`zoo.shared.ops.SparseConv1x1` for 1x1 convolutions with stride 1, `SparseConv2d` for others of one
    group with a square kernel; those of several groups stay."""
    keep = masks.get("weight")
    if keep is None or not isinstance(module, nn.Conv2d):
        return None
    if keep.sparsity < (MIN_BLOCK_SPARSITY if isinstance(keep.pattern, Block) else MIN_SPARSITY):
        return None
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if is_pointwise(module):
        return SparseConv1x1.from_convolution(module, keep.keep).requires_grad_(False)
    return (
        SparseConv2d.from_convolution(module, keep.keep).requires_grad_(False) if is_plain(module) else None
    )
