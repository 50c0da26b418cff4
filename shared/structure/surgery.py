"""Structured masks become a smaller dense network: channels, heads and layers are really removed.

Weights, buffers, masks and the optimiser's moments are sliced alike, module attributes follow, and the
parameters that change shape are replaced, in the model and in the optimiser.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from ..errors import GroupError, OptimizerStateError, PatternError
from ..masks import Mask, MaskSet, masks_of, near_misses, set_masks
from .attention import HeadPrunedAttention
from .groups.families import Family, GroupMap, Member, check_units

Selection = dict[int, Tensor]  # axis -> positions that stay, ascending


@dataclass(frozen=True, eq=False)
class Surgery:
    """What a cut did.

    Attributes:
        replaced: old and new Parameter by name; whoever holds an old one (an EMA, another optimiser) must
            swap it.
        parameters: number of parameters before and after.
        groups: the families that are left, for the next cut.
    """

    replaced: dict[str, tuple[nn.Parameter, nn.Parameter]]
    parameters: tuple[int, int]
    groups: GroupMap


def cut(
    model: nn.Module,
    groups: GroupMap,
    keep: Mapping[str, Tensor],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    allow_inexact: bool = False,
    check: tuple[Any, ...] | None = None,
) -> Surgery:
    """Remove units from `model`, in place. The result equals the network masked by `groups.masks(model,
    keep)`.

    Optimiser state is carried: moments of a parameter's shape are sliced like the parameter, counters stay,
    anything else is refused. Masks the model carries are sliced too. Nothing is changed if an error is
    raised.

    Args:
        model: owner of the tensors; harden gates and detach masks before (attach them to the smaller model
            after).
        groups: its families.
        keep: by family a bool vector [units], see `GroupMap.keep_from_masks`.
        optimizer: one or several optimisers that hold the parameters.
        allow_inexact: also cut families under a norm's statistics, where the cut network is another function.
        check: example inputs; the cut is first made on a copy and its outputs compared with the masked
            model's.

    Raises:
        GroupError: an unknown or inexact family, nothing left of a family, gates or hooks on a parameter, an
            attribute that does not follow, or a copy that does not compute what the masked model does.
        OptimizerStateError: optimiser state of unknown meaning.
    """
    if check is not None:
        check_cut(model, groups, keep, check, allow_inexact)
    selections = _selections(model, groups, keep, allow_inexact)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    parameters = dict(model.named_parameters())
    sliced_states = _slice_states(parameters, selections, optimizers)
    before = sum(p.numel() for p in parameters.values())

    owners = _owners(model)
    replaced = {}
    touched: dict[str, nn.Module] = {}
    for name, selection in selections.items():
        owner_path, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner_path)
        old = getattr(module, attribute)
        new: Tensor = _select(old.detach(), selection)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            if old.grad is not None:
                new.grad = _select(old.grad, selection)
            replaced[name] = (old, new)
        for path, owner, key in owners[id(old)]:
            setattr(owner, key, new)
            touched[path] = owner
    for path, module in touched.items():
        _follow(model, path, module)
    for name, units in keep.items():
        for path, share in groups[name].attributes:
            owner_path, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(owner_path), attribute, share * int(units.sum()))
    for swap in optimizers:
        _swap_parameters(swap, {old: new for old, new in replaced.values()}, sliced_states)
    carried = masks_of(model)
    if carried is not None:
        set_masks(model, _slice_masks(carried, selections))
    after = sum(p.numel() for p in model.parameters())
    return Surgery(replaced, (before, after), _remaining(groups, keep, selections))


def drop_layers(
    model: nn.Module, names: Iterable[str], optimizer: Optimizer | Sequence[Optimizer] | None = None
) -> dict[str, str]:
    """Remove whole modules, in place: from a ModuleList or Sequential they vanish, elsewhere Identity takes
    over.

    Right for modules that are the identity without their weights, such as residual blocks whose branch is
    masked entirely. The optimiser forgets the removed parameters, and masks are renamed or dropped.

    Returns:
        The new name of every parameter that stays, by old name (indices of a list move up).

    Raises:
        GroupError: an unknown name, or one module inside another that goes too.
    """
    paths = list(dict.fromkeys(names))
    modules = dict(model.named_modules())
    for path in paths:
        if not path or path not in modules:
            raise GroupError(f"drop_layers: the model has no module {path!r}{near_misses(path, modules)}")
        if any(path.startswith(f"{other}.") for other in paths):
            raise GroupError(f"drop_layers: {path} lies inside another module that is dropped.")
    before = dict(model.named_parameters(remove_duplicate=False))
    lists: dict[str, list[int]] = {}
    for path in paths:
        parent_path, _, child = path.rpartition(".")
        parent = modules[parent_path]
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            lists.setdefault(parent_path, []).append(list(parent._modules).index(child))
        else:
            setattr(parent, child, nn.Identity())
    for parent_path, indices in lists.items():
        for index in sorted(indices, reverse=True):
            del modules[parent_path][index]
    after = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    renamed = {name: after[id(p)] for name, p in before.items() if id(p) in after}
    gone = {p for p in before.values() if id(p) not in after}
    for one in [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ()):
        for group in one.param_groups:
            group["params"] = [p for p in group["params"] if p not in gone]
        for p in gone:
            one.state.pop(p, None)
    carried = masks_of(model)
    if carried is not None:
        set_masks(model, MaskSet({renamed[name]: mask for name, mask in carried.items() if name in renamed}))
    return renamed


# -- planning


def _selections(
    model: nn.Module, groups: GroupMap, keep: Mapping[str, Tensor], allow_inexact: bool
) -> dict[str, Selection]:
    """Which positions stay, by tensor and axis, after all checks of the plan."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stay: dict[str, dict[int, Tensor]] = {}
    for name, units in keep.items():
        if name not in groups:
            reason = groups.frozen.get(name)
            raise GroupError(
                f"cut: no family {name!r}{near_misses(name, groups)}" + (f" (it {reason})" if reason else "")
            )
        family = groups[name]
        check_units(family, units)
        if bool(units.all()):
            continue
        if not family.exact and not allow_inexact:
            raise GroupError(
                f"cut: a norm takes statistics over the units of {name}, so the cut network would not "
                "equal the masked one; pass allow_inexact=True and fine-tune."
            )
        for path, share in family.attributes:
            owner, _, attribute = path.rpartition(".")
            if getattr(model.get_submodule(owner), attribute, None) != share * family.units:
                raise GroupError(
                    f"cut: {path} is no longer {share} * {family.units}; build the GroupMap anew."
                )
        for member in family.members:
            tensor = tensors.get(member.name)
            if tensor is None:
                raise GroupError(
                    f"cut: the model has no tensor {member.name!r}; harden gates before surgery."
                )
            if tensor.shape[member.dim] <= int(member.index.max()):
                raise GroupError(
                    f"cut: {member.name!r} has been cut before; use the GroupMap that cut returned."
                )
            if isinstance(tensor, nn.Parameter) and (
                getattr(tensor, "_post_accumulate_grad_hooks", None) or tensor._backward_hooks
            ):
                raise GroupError(f"cut: {member.name!r} has gradient hooks; detach masks before surgery.")
            axes = stay.setdefault(member.name, {})
            if member.dim not in axes:
                axes[member.dim] = torch.ones(tensor.shape[member.dim], dtype=torch.bool)
            axes[member.dim][member.index[~units.cpu()].reshape(-1)] = False
    selections = {
        name: {dim: flags.nonzero().squeeze(1) for dim, flags in axes.items()} for name, axes in stay.items()
    }
    for name, selection in selections.items():
        if any(len(positions) == 0 for positions in selection.values()):
            raise GroupError(f"cut: nothing of {name!r} would be left; keep a unit, or use drop_layers.")
    return selections


def _select(tensor: Tensor, selection: Selection) -> Tensor:
    for dim, positions in selection.items():
        tensor = tensor.index_select(dim, positions.to(tensor.device))
    return tensor.clone()


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _slice_states(
    parameters: Mapping[str, nn.Parameter],
    selections: Mapping[str, Selection],
    optimizers: Sequence[Optimizer],
) -> dict[tuple[int, int], dict[str, Any]]:
    """The new state of each cut parameter, by ids of optimiser and parameter, made before anything
    changes."""
    result = {}
    for optimizer in optimizers:
        for name, selection in selections.items():
            p = parameters.get(name)
            if p is None or p not in optimizer.state:
                continue
            new: dict[str, Any] = {}
            for key, value in optimizer.state[p].items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    new[key] = _select(value, selection)
                elif value is None or isinstance(value, (bool, int, float)) or _is_scalar(value):
                    new[key] = value
                else:
                    what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise OptimizerStateError(
                        f"cut: {type(optimizer).__name__} keeps {key!r} ({what}) for {name}; "
                        "how to slice that is unknown. Cut without the optimiser and build a new one."
                    )
            result[id(optimizer), id(p)] = new
    return result


def _swap_parameters(
    optimizer: Optimizer,
    swaps: Mapping[nn.Parameter, nn.Parameter],
    states: Mapping[tuple[int, int], dict[str, Any]],
) -> None:
    for group in optimizer.param_groups:
        group["params"] = [swaps.get(p, p) for p in group["params"]]
    for old, new in swaps.items():
        if optimizer.state.pop(old, None) is not None:
            optimizer.state[new] = states[id(optimizer), id(old)]


def _slice_masks(masks: MaskSet, selections: Mapping[str, Selection]) -> MaskSet:
    result = {}
    for name, mask in masks.items():
        if name not in selections:
            result[name] = mask
            continue
        keep = _select(mask.keep, selections[name])
        if bool(keep.all()):
            continue  # all that it dropped is gone
        try:
            result[name] = Mask(keep, mask.pattern)
        except PatternError:  # a cut through N:M groups or blocks
            result[name] = Mask(keep)
    return MaskSet(result)


def _remaining(groups: GroupMap, keep: Mapping[str, Tensor], selections: Mapping[str, Selection]) -> GroupMap:
    """The same families with positions counted in the smaller tensors."""
    families = []
    for name, family in groups.items():
        units = keep.get(name, torch.ones(family.units, dtype=torch.bool)).cpu()
        members = []
        for member in family.members:
            index = member.index[units]
            positions = selections.get(member.name, {}).get(member.dim)
            if positions is not None:
                index = torch.searchsorted(positions, index)
            members.append(Member(member.name, member.dim, index, member.role))
        families.append(Family(name, int(units.sum()), tuple(members), family.exact, family.attributes))
    return GroupMap(families, groups.frozen)


# -- carrying out


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Every place where a tensor is registered, so that tied parameters stay tied."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                places.setdefault(id(tensor), []).append((path, module, key))
    return places


def _follow(model: nn.Module, path: str, module: nn.Module) -> None:
    """Bring a module's sizes in line with its tensors."""
    if isinstance(module, nn.MultiheadAttention):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, HeadPrunedAttention(module))
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _ConvNd):
        _follow_convolution(module)
    elif isinstance(module, _NormBase):
        sized = module.weight if module.weight is not None else module.running_mean
        if sized is not None:
            module.num_features = sized.shape[0]
    elif isinstance(module, nn.GroupNorm):
        per_group = module.num_channels // module.num_groups
        module.num_channels = module.weight.shape[0]
        if module.num_groups > 1:
            module.num_groups = module.num_channels // per_group
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]


def _follow_convolution(module: _ConvNd) -> None:
    weight = module.weight
    if isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
        return
    if module.groups > 1:
        # Whole conv groups were cut, so outputs per group stay what they were.
        module.groups = weight.shape[0] // (module.out_channels // module.groups)
    module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups


def check_cut(
    model: nn.Module,
    groups: GroupMap,
    keep: Mapping[str, Tensor],
    inputs: tuple[Any, ...],
    allow_inexact: bool,
) -> None:
    """Cut a copy and compare its outputs with those of a masked copy, in eval mode and the model's
    precision.

    Raises:
        GroupError: the copy does not run, or, unless a family is inexact, puts out something else.
    """
    masked, smaller = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    groups.masks(masked, keep).apply_(masked)
    cut(smaller, groups, keep, allow_inexact=allow_inexact)
    with torch.no_grad():
        expected = tree_flatten(masked(*inputs))[0]
        try:
            found = tree_flatten(smaller(*inputs))[0]
        except (RuntimeError, ValueError) as error:
            raise GroupError(
                f"cut: the smaller model does not run ({error}); a forward pass probably fixes a size. "
                "Declare the attribute that holds it, see GroupMap.declare."
            ) from error
    if allow_inexact and not all(groups[name].exact for name in keep):
        return
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, Tensor) and not torch.allclose(one, other, rtol=1e-3, atol=1e-5):
            raise GroupError(
                f"cut: the smaller model is {float((one - other).abs().max()):.2g} off the masked one; "
                "something computes with units that are not in the GroupMap."
            )
