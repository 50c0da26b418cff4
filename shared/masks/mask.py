"""Masks: boolean tensors with a pattern, their algebra, and the masks of a model held through training.

Weights stay plain dense parameters with exact zeros; a `MaskSet` says which zeros are frozen. The mask is the
truth, never `w != 0`: a kept weight that happens to be zero is still kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import MaskError, PatternError
from .patterns import Pattern, Unstructured
from .shards import any_part, local_mask, local_part

if TYPE_CHECKING:
    from .handle import MaskHandle

_ATTRIBUTE = "_sparse_masks"


class Mask:
    """Which entries of one tensor are kept (True), and the pattern they obey. A value: operations return new
    masks.

    Args:
        keep: boolean tensor of the shape of what it masks: a weight, the edges of a graph, voxels.
        pattern: where zeros may lie.

    Raises:
        MaskError: `keep` is not boolean.
        PatternError: `keep` breaks the pattern.
    """

    __slots__ = ("keep", "pattern")

    def __init__(self, keep: Tensor, pattern: Pattern | None = None) -> None:
        if keep.dtype != torch.bool:
            raise MaskError(
                f"a mask is a boolean tensor; received {keep.dtype} (write `tensor != 0` if that is meant)"
            )
        self.keep: Tensor = keep.detach()
        self.pattern: Pattern = pattern if pattern is not None else Unstructured()
        self.pattern.check(self.keep)

    @property
    def shape(self) -> torch.Size:
        return self.keep.shape

    @property
    def numel(self) -> int:
        return self.keep.numel()

    @property
    def kept(self) -> int:
        return int(self.keep.count_nonzero())

    @property
    def sparsity(self) -> float:
        """Share of dropped entries; 0 for an empty tensor."""
        return 1 - self.kept / self.numel if self.numel else 0.0

    def to(self, device: torch.device | str) -> Mask:
        """The same mask on another device."""
        return Mask(self.keep.to(device), self.pattern)

    def equal(self, other: Mask) -> bool:
        """Same shape and same kept entries; the pattern does not matter."""
        return self.shape == other.shape and torch.equal(self.keep, other.keep.to(self.keep.device))

    def __and__(self, other: Mask) -> Mask:
        return self._combined(self.keep & self._matching(other), other.pattern, self.pattern)

    def __or__(self, other: Mask) -> Mask:
        shared = (self.pattern,) if other.pattern == self.pattern else ()
        return self._combined(self.keep | self._matching(other), *shared)

    def __invert__(self) -> Mask:
        return self._combined(~self.keep, self.pattern)

    def _matching(self, other: Mask) -> Bool[Tensor, ...]:
        if self.shape != other.shape:
            raise MaskError(
                f"masks of shapes {tuple(self.shape)} and {tuple(other.shape)} cannot be combined"
            )
        return other.keep.to(self.keep.device)

    def _combined(self, keep: Tensor, *patterns: Pattern) -> Mask:
        """With the first of the patterns that says something and that the result obeys: of two masks that
        both must hold, one may be 2:4 and the other not."""
        for pattern in patterns:
            if pattern != Unstructured():
                try:
                    return Mask(keep, pattern)
                except PatternError:
                    pass  # the union of two 2:4 masks, or blocks of which another mask took a part
        return Mask(keep)

    def __repr__(self) -> str:
        return f"Mask({tuple(self.shape)}, kept {self.kept} of {self.numel}, {self.pattern})"


@dataclass(frozen=True)
class SparsityReport:
    """Zeros by mask, over the masked tensors and over the whole model; tied parameters count once."""

    kept: int
    masked_numel: int
    whole_numel: int
    per_tensor: dict[str, float]

    @property
    def masked(self) -> float:
        """Share of zeros over the tensors that carry a mask."""
        return 1 - self.kept / self.masked_numel if self.masked_numel else 0.0

    @property
    def whole(self) -> float:
        """Share of zeros over all parameters of the model."""
        return (self.masked_numel - self.kept) / self.whole_numel if self.whole_numel else 0.0

    def __str__(self) -> str:
        return (
            f"{self.masked:.2%} of {self.masked_numel:,} masked weights are zero "
            f"({self.whole:.2%} of all {self.whole_numel:,} parameters)"
        )


class _NoMask(KeyError):
    """A name without a mask. Near misses are looked for by whoever reads the message: `get` never does."""

    def __init__(self, name: str, names: Iterable[str]) -> None:
        super().__init__(name)
        self._names = names

    def __str__(self) -> str:
        return f"no mask named {self.args[0]!r}{near_misses(self.args[0], self._names)}"


class MaskSet(Mapping[str, Mask]):
    """The named masks of one model, an immutable mapping.

    `a & b` keeps what both keep, `a | b` what either keeps; a name that one side lacks counts as all kept.

    Args:
        masks: `Mask` or boolean tensor by parameter name.
    """

    def __init__(self, masks: Mapping[str, Mask | Tensor]) -> None:
        self._masks = {name: mask if isinstance(mask, Mask) else Mask(mask) for name, mask in masks.items()}

    def __getitem__(self, name: str) -> Mask:
        try:
            return self._masks[name]
        except KeyError:
            raise _NoMask(name, self._masks) from None

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __and__(self, other: MaskSet) -> MaskSet:
        both = {name: self[name] & other[name] for name in self if name in other}
        return MaskSet({**self, **other, **both})

    def __or__(self, other: MaskSet) -> MaskSet:
        return MaskSet({name: self[name] | other[name] for name in self if name in other})

    def intersection(self, *others: MaskSet) -> MaskSet:
        """What every one of the sets keeps."""
        result = self
        for other in others:
            result = result & other
        return result

    def iou(self, other: MaskSet) -> float:
        """Kept by both over kept by either, over the common names: 1 for equal masks."""
        common = [name for name in self if name in other]
        either = sum((self[name] | other[name]).kept for name in common)
        return sum((self[name] & other[name]).kept for name in common) / either if either else 1.0

    def equal(self, other: MaskSet) -> bool:
        """Same names and same kept entries."""
        return set(self) == set(other) and all(self[name].equal(other[name]) for name in self)

    def to(self, device: torch.device | str) -> MaskSet:
        """The same masks on another device."""
        return MaskSet({name: mask.to(device) for name, mask in self.items()})

    def sparsity(self) -> float:
        """Share of dropped entries over the masked tensors."""
        total = sum(mask.numel for mask in self.values())
        return 1 - sum(mask.kept for mask in self.values()) / total if total else 0.0

    def check(self, model: nn.Module) -> None:
        """Raises MaskError unless every mask names a parameter of its shape, and tied parameters agree on
        their mask."""
        self._parameters(model)

    def apply_(self, model: nn.Module) -> None:
        """Zeroes the dropped entries of the model's parameters in place (NaN and infinities too)."""
        with torch.no_grad():
            for name, parameter in self._parameters(model).items():
                local_part(parameter).masked_fill_(local_mask(~self[name].keep, parameter), 0)

    def lost_zeros(self, model: nn.Module) -> list[str]:
        """Names of masked tensors with a dropped entry that is not zero; empty if no zero was lost."""
        lost = []
        for name, parameter in self._parameters(model).items():
            dropped = local_mask(~self[name].keep, parameter)
            if any_part(bool((local_part(parameter.detach())[dropped] != 0).any()), parameter):
                lost.append(name)
        return lost

    def report(self, model: nn.Module) -> SparsityReport:
        """Sparsity over the masked tensors, over the whole model and per tensor."""
        masked = [self[name] for name in self._parameters(model)]
        return SparsityReport(
            kept=sum(mask.kept for mask in masked),
            masked_numel=sum(mask.numel for mask in masked),
            whole_numel=sum(parameter.numel() for parameter in model.parameters()),
            per_tensor={name: mask.sparsity for name, mask in self.items()},
        )

    def attach(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None
    ) -> MaskHandle:
        """Zeroes the dropped entries and holds them there until the handle is detached.

        With the optimiser (or several), every `optimizer.step()` leaves weights and moments masked by itself.
        Without it gradients are masked all the same, and `handle.step()` after each optimiser step re-zeroes
        the weights, which weight decay and momentum would otherwise move.

        Raises:
            MaskError: the masks do not fit the model, or it is already attached.
            OptimizerStateError: optimiser state of unknown meaning.
        """
        from .handle import MaskHandle

        return MaskHandle(self, model, optimizer)

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The masked parameters by name, tied ones once, after checking that the masks fit."""
        known = dict(unwrap(model).named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        for name, mask in self.items():
            if name not in known:
                raise MaskError(f"the model has no parameter {name!r}{near_misses(name, known)}")
            parameter = known[name]
            if parameter.shape != mask.shape:
                raise MaskError(
                    f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter "
                    f"{tuple(parameter.shape)}; are these the masks of another model?"
                )
            twin = first.setdefault(id(parameter), name)
            if twin != name and not self[twin].equal(mask):
                raise MaskError(
                    f"{name!r} and {twin!r} are one tied parameter but have different masks; give one mask"
                )
        return {name: known[name] for name in first.values()}

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} tensors, sparsity {self.sparsity():.4f})"


def unwrap(model: nn.Module) -> nn.Module:
    """The model behind torch.compile, DataParallel, DistributedDataParallel and AveragedModel."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def masks_of(model: nn.Module) -> MaskSet | None:
    """The masks that a model carries, or None. They follow deepcopy and pickle and never enter
    `state_dict`."""
    return getattr(unwrap(model), _ATTRIBUTE, None)


def set_masks(model: nn.Module, masks: MaskSet | None) -> None:
    """Records the masks on the model (None forgets them) without touching its weights.

    Raises:
        MaskError: the masks do not fit the model.
    """
    model = unwrap(model)
    if masks is not None:
        masks.check(model)
        setattr(model, _ATTRIBUTE, masks)
    elif hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def tighten(model: nn.Module, masks: Mapping[str, Mask]) -> MaskSet:
    """Put masks on a model beside those that it carries, in place: dropped is what either drops.

    This is how every method combines its masks with earlier ones: a mask never loosens, since what it dropped
    is zero and a mask that calls it kept would let training bring it back. Whoever wants that says so by
    `set_masks(model, None)` first.

    Returns:
        The masks that the model now carries.

    Raises:
        MaskError: a name or shape that does not fit the model.
    """
    new = masks if isinstance(masks, MaskSet) else MaskSet(masks)
    before = masks_of(model)
    if before is not None:
        new = _by_first_name(model, before) & _by_first_name(model, new)
    new.apply_(model)
    set_masks(model, new)
    return new


def _by_first_name(model: nn.Module, masks: MaskSet) -> MaskSet:
    """The same masks with tied parameters under their first name, so that two sets name them alike."""
    masks.check(model)
    first: dict[int, str] = {}
    known = dict(unwrap(model).named_parameters(remove_duplicate=False))
    for name, parameter in known.items():
        first.setdefault(id(parameter), name)
    return MaskSet({first[id(known[name])]: mask for name, mask in masks.items()})


def near_misses(name: str, known: Iterable[str]) -> str:
    """The tail of an error message that lists what resembles an unknown name, else some of what there is."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + ", ".join(repr(match) for match in close) + "?"
    return f"; there are: {', '.join(names[:5]) or 'none'}{' ...' if len(names) > 5 else ''}"
