"""Norms and activations that go into the convolutions before them, with the same outputs: for inference."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..ops.modules import DepthwiseConv, SparseConv1x1, SparseConv2d
from .fusing import RELUS, followers


def fold_norms(model: nn.Module, kept: Collection[str] = ()) -> nn.Module:
    """Fold, in place, each batch norm into the convolution right before it: in a `nn.Sequential`, or where a
    `forward` that torch.fx can follow calls them so.

    This scales each row of a weight, and so keeps its zeros. A norm in training mode or without running
    statistics stays, as does one that another place of the model shares, and its convolution.

    Args:
        kept: names of parameters that must stay; a norm that has one is left alone.

    Returns:
        The model.
    """
    places: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[id(module)] = places.get(id(module), 0) + 1
    for first, second in _convolved(model):
        convolution, norm = model.get_submodule(first), model.get_submodule(second)
        if not (type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d):
            continue
        names = {f"{second}.{name}" for name, _ in norm.named_parameters()}
        once = places[id(convolution)] == places[id(norm)] == 1
        if norm.training or norm.running_mean is None or names & set(kept) or not once:
            continue
        grads = convolution.weight.requires_grad
        folded = fuse_conv_bn_eval(convolution.eval(), norm)
        model.set_submodule(first, folded.requires_grad_(grads))
        model.set_submodule(second, nn.Identity())
    return model


def _convolved(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of modules that follow each other: first those that stand side by side, then the traced ones."""
    for prefix, _, first, second in _neighbours(model):
        yield f"{prefix}{first}", f"{prefix}{second}"
    if any(type(module) is nn.BatchNorm2d for module in model.modules()):
        yield from followers(model)


def fuse_relus(model: nn.Module) -> nn.Module:
    """Let the packed convolutions of a `nn.Sequential` take, in place, the ReLU that follows them: one pass
    over their results less. Returns the model."""
    for _, sequence, first, second in _neighbours(model):
        convolution = sequence._modules[first]
        relu = RELUS.get(type(sequence._modules[second]), 0)
        if relu and isinstance(convolution, (SparseConv1x1, SparseConv2d, DepthwiseConv)):
            convolution.relu = relu
            sequence._modules[second] = nn.Identity()
    return model


def _neighbours(model: nn.Module) -> Iterator[tuple[str, nn.Sequential, str, str]]:
    """Prefix of names, sequence, and the keys in it of two modules that follow each other (identities left
    out)."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Sequential:
            continue
        keys = [key for key, part in module._modules.items() if type(part) is not nn.Identity]
        for first, second in zip(keys, keys[1:], strict=False):
            yield f"{name}." if name else "", module, first, second
