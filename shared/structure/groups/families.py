"""What is cut together: families of units, each unit a set of slices of several tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import GroupError
from ...learned.gates.modules import Gate, GatedWeight, HardConcrete
from ...masks import Mask, MaskSet, near_misses
from ...masks.patterns import Group, Unstructured
from ...masks.topk import topk_mask

Role = Literal["out", "in", "follow", "state"]


@dataclass(frozen=True, eq=False)
class Member:
    """Slices of one tensor that belong to the units of a family.

    Attributes:
        name: the parameter or buffer, as in `state_dict`.
        dim: its axis.
        index: [units, width] integer tensor; row u lists the positions along `dim` that belong to unit u.
        role: "out": makes the unit (rows of a weight, its bias); "in": reads it (columns of the next weight);
            "follow": acts on each unit by itself (norm scales and shifts, depthwise filters); "state": a
            buffer.
    """

    name: str
    dim: int
    index: Tensor
    role: Role


@dataclass(frozen=True, eq=False)
class Family:
    """A set of units (channels, neurons, heads) whose slices are cut together, all of them alike.

    Attributes:
        name: the first producing tensor, which is unique.
        units: how many units there are.
        members: every slice of every tensor that goes with a unit.
        exact: whether the network without a unit equals the network with that unit masked. Not so if a norm
            takes statistics over the units (LayerNorm over the features that are cut).
        attributes: (path of a module's integer attribute, its share per unit), e.g. ("attn.num_heads", 1),
            which surgery sets to share * units left.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    exact: bool = True
    attributes: tuple[tuple[str, int], ...] = ()

    def roles(self, *roles: Role) -> list[Member]:
        """The members with one of the roles."""
        return [member for member in self.members if member.role in roles]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _along(values: Tensor, dim: int, ndim: int) -> Tensor:
    return values.view([-1 if axis == dim else 1 for axis in range(ndim)])


class GroupMap(Mapping[str, Family]):
    """The families of one model: one declaration for group penalties, gates, masks and surgery.

    Built by `trace_groups` (from a traced forward pass) or by `declare`. A mapping from name to `Family`.

    Args:
        families: with distinct names.
        frozen: why tensors could not be cut, by name, for messages.
    """

    def __init__(self, families: Sequence[Family], frozen: Mapping[str, str] | None = None) -> None:
        self._families = {family.name: family for family in families}
        if len(self._families) != len(families):
            raise GroupError("two families have the same name; give each its own.")
        self.frozen = dict(frozen or {})

    @classmethod
    def declare(
        cls,
        model: nn.Module,
        families: Mapping[str, Sequence[tuple[str, int, Role]]],
        units: Mapping[str, int] | None = None,
        attributes: Mapping[str, Mapping[str, int]] | None = None,
    ) -> GroupMap:
        """Say what is cut together, for models that cannot be traced.

        A tensor's axis is divided evenly, in order, among the units: an axis of heads * head_dim entries with
        `units` = heads gives each head its block. Query heads that share a key head (grouped-query
        attention) go with it as one unit: `units` = number of key heads.

        Args:
            model: owner of the tensors.
            families: by a free name, (tensor name, axis, role) of each member.
            units: number of units by family; by default the length of its first member's axis.
            attributes: by family, {path of a module's attribute: share per unit}.

        Raises:
            GroupError: unknown tensors or attributes, axes that do not divide, or an axis that is declared
                twice.
        """
        known = _tensors(model)
        seen: dict[tuple[str, int], str] = {}
        built = []
        for family, entries in families.items():
            members = []
            count = (units or {}).get(family)
            for name, axis, role in entries:
                if name not in known:
                    raise GroupError(f"{family}: the model has no tensor {name!r}{near_misses(name, known)}")
                shape = tuple(known[name].shape)
                if not -len(shape) <= axis < len(shape):
                    raise GroupError(f"{family}: {name!r} of shape {shape} has no axis {axis}.")
                dim = axis % len(shape)
                if (name, dim) in seen:
                    raise GroupError(
                        f"{family}: axis {dim} of {name!r} belongs to {seen[name, dim]!r} already."
                    )
                seen[name, dim] = family
                count = shape[dim] if count is None else count
                if count < 1 or shape[dim] % count:
                    raise GroupError(
                        f"{family}: axis {dim} of {name!r} has {shape[dim]} entries, no multiple of {count}."
                    )
                members.append(Member(name, dim, torch.arange(shape[dim]).view(count, -1), role))
            if count is None:
                raise GroupError(f"{family}: no member is declared.")
            paths = tuple((attributes or {}).get(family, {}).items())
            for path, share in paths:
                owner, _, attribute = path.rpartition(".")
                if getattr(model.get_submodule(owner), attribute, None) != share * count:
                    raise GroupError(
                        f"{family}: {path} is not {share} * {count} units; check the declared share."
                    )
            built.append(Family(family, count, tuple(members), attributes=paths))
        return cls(built)

    def __getitem__(self, name: str) -> Family:
        try:
            return self._families[name]
        except KeyError:
            reason = f" (it cannot be cut: {self.frozen[name]})" if name in self.frozen else ""
            raise KeyError(f"no family named {name!r}{reason}{near_misses(name, self._families)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._families)

    def __len__(self) -> int:
        return len(self._families)

    def __repr__(self) -> str:
        lines = [
            f"  {family.name}: {family.units} units, {len(family.members)} tensors"
            + ("" if family.exact else ", inexact")
            for family in self.values()
        ]
        return "\n".join([f"GroupMap of {len(self)} families", *lines])

    def reach(self, model: nn.Module) -> float:
        """The share of a model's parameters that lie in units which can be cut, from 0 to 1."""
        known = dict(model.named_parameters())
        touched: dict[str, Tensor] = {}
        for family in self.values():
            for member in family.members:
                if member.name not in known:
                    continue
                shape = known[member.name].shape
                axis = torch.zeros(shape[member.dim], dtype=torch.bool)
                axis[member.index.reshape(-1)] = True
                spread = _along(axis, member.dim, len(shape)).expand(shape)
                touched[member.name] = touched[member.name] | spread if member.name in touched else spread
        total = sum(parameter.numel() for parameter in known.values())
        return sum(int(part.count_nonzero()) for part in touched.values()) / total if total else 0.0

    # -- sums over units

    def sums(
        self, values: Mapping[str, Tensor], roles: Sequence[Role] = ("out",)
    ) -> dict[str, Float[Tensor, " units"]]:
        """The sum of per-entry values (scores, squares, counts) over each unit's slices.

        Args:
            values: a tensor of the parameter's shape by parameter name; members that are not named add
                nothing.
            roles: which slices count. The default, the producing ones, never counts an entry in two families.

        Returns:
            By family a vector with one sum per unit, differentiable in `values`.
        """
        result = {}
        for name, family in self.items():
            parts = []
            for member in family.roles(*roles):
                if member.name not in values:
                    continue
                value = values[member.name]
                rest = [axis for axis in range(value.ndim) if axis != member.dim]
                slices = value.sum(rest) if rest else value
                parts.append(slices[member.index.to(value.device)].sum(1))
            result[name] = torch.stack(parts).sum(0) if parts else torch.zeros(family.units)
        return result

    def norms(self, model: nn.Module, roles: Sequence[Role] = ("out",)) -> dict[str, Float[Tensor, " units"]]:
        """The Euclidean norm of each unit's slices, by family; differentiable, with gradient 0 at a zero
        unit.
        """
        squares = self.sums({name: p.square() for name, p in model.named_parameters()}, roles)
        # sqrt has an infinite slope at 0, where the norm's subgradient 0 is wanted
        return {
            name: torch.where(s > 0, torch.where(s > 0, s, 1.0).sqrt(), 0.0) for name, s in squares.items()
        }

    def sizes(self, model: nn.Module, roles: Sequence[Role] = ("out",)) -> dict[str, Float[Tensor, " units"]]:
        """How many parameters each unit's slices hold, by family."""
        ones = {name: torch.ones_like(p, requires_grad=False) for name, p in model.named_parameters()}
        return self.sums(ones, roles)

    def penalty(self, model: nn.Module, roles: Sequence[Role] = ("out",)) -> Float[Tensor, ""]:
        """Group lasso: sum over units of sqrt(size) ||slices||_2 (Yuan and Lin, 2006), differentiable."""
        norms, sizes = self.norms(model, roles), self.sizes(model, roles)
        return torch.stack([(sizes[name].sqrt() * norms[name]).sum() for name in self]).sum()

    @torch.no_grad()
    def scale_(
        self,
        model: nn.Module,
        factors: Mapping[str, Float[Tensor, " units"]],
        roles: Sequence[Role] = ("out",),
    ) -> None:
        """Multiply each unit's slices by its factor, in place: how a group prox is applied.

        With `factors` from `group_soft_factors` or `envelope_factors` of `norms` this is the proximal step.
        """
        known = _tensors(model)
        for name, values in factors.items():
            for member in self[name].roles(*roles):
                tensor = known[member.name]
                slices = torch.ones(tensor.shape[member.dim], dtype=tensor.dtype, device=tensor.device)
                width = member.index.shape[1]
                slices[member.index.reshape(-1).to(tensor.device)] = values.to(slices).repeat_interleave(
                    width
                )
                tensor.mul_(_along(slices, member.dim, tensor.ndim))

    def select(
        self,
        scores: Mapping[str, Float[Tensor, " units"]],
        kept: float,
        costs: Mapping[str, Float[Tensor, " units"]] | None = None,
    ) -> dict[str, Tensor]:
        """The best unit of each family in `scores`, then by falling score what still fits.

        Equal scores are decided by the order of families and units.

        Args:
            scores: what each unit is worth, by family.
            kept: how much those that stay may cost together.
            costs: of each unit, >= 0; by default 1, so that `kept` is their number.

        Returns:
            By family a bool vector, for `masks` and `surgery.cut`.

        Raises:
            GroupError: no scores, or less than one unit of each family costs, or more than all.
            PatternError: a NaN among the scores.
        """
        if not scores:
            raise GroupError("select: no scores are given; see GroupMap.sums and GroupMap.norms.")
        keep = torch.cat([topk_mask(score.cpu(), 1) for score in scores.values()])
        values = torch.cat([score.detach().cpu() for score in scores.values()])
        price = (
            torch.ones(len(values)) if costs is None else torch.cat([costs[name] for name in scores]).cpu()
        )
        price = price.double()
        floor, total = float(price[keep].sum()), float(price.sum())
        if not floor <= kept <= total * (1 + 1e-9):
            raise GroupError(
                f"select: {kept:,.10g} cannot be kept of {total:,.10g} in {len(scores)} families with at "
                f"least one unit each; choose a number from {floor:,.10g} to {total:,.10g}."
            )
        left = kept - floor + 1e-9 * total  # sums of shares are not exact
        for index in values.argsort(descending=True, stable=True).tolist():
            if not keep[index] and price[index] <= left:
                keep[index], left = True, left - float(price[index])
        parts = keep.split([len(score) for score in scores.values()])
        return {name: part.clone() for name, part in zip(scores, parts, strict=True)}

    # -- gates and masks

    def gate(self, model: nn.Module, name: str, make: Callable[[tuple[int]], Gate]) -> Gate:
        """Gate the units of a family where they are read: every reading slice is multiplied by its unit's
        gate.

        Reading weights are linear in the unit, so this equals a gate on the activation; `harden` folds it
        into those weights, and `keep_from_masks` then tells the closed units. A noisy gate is given fixed
        noise, since all readers must see one sample: call `gate.resample()` once per training step.

        Args:
            model: owner of the weights.
            name: the family.
            make: makes the gate from its shape (units,), e.g. `HardConcrete`.

        Raises:
            GroupError: nothing reads the family's units by a weight.
        """
        readers = self[name].roles("in")
        if not readers:
            raise GroupError(f"{name}: no weight reads these units, so a gate has nothing to act on.")
        gate = make((self[name].units,))
        if isinstance(gate, HardConcrete):
            gate.resample()
        for member in readers:
            owner, _, attribute = member.name.rpartition(".")
            module = model.get_submodule(owner)
            parametrize.register_parametrization(
                module, attribute, GatedWeight(gate, member.dim, member.index)
            )
        return gate

    def masks(self, model: nn.Module, keep: Mapping[str, Tensor]) -> MaskSet:
        """The masks that drop whole units: every slice of a dropped unit, in every parameter it touches.

        That includes biases and the shift of a BatchNorm: whatever constant a dropped unit would still send
        on is dropped with it, and its readers' columns are zero besides. This is the masked network that
        the cut one equals.

        Args:
            model: owner of the parameters.
            keep: by family a bool vector [units]; families that are not named keep all.

        Raises:
            GroupError: a vector of wrong shape or type, or a family that would keep nothing.
        """
        known = dict(model.named_parameters(remove_duplicate=False))
        kept: dict[str, Tensor] = {}
        dims: dict[str, set[int]] = {}
        for name, units in keep.items():
            family = self[name]
            check_units(family, units)
            for member in family.members:
                if member.role == "state" or bool(units.all()):
                    continue
                shape = known[member.name].shape
                axis = torch.ones(shape[member.dim], dtype=torch.bool)
                axis[member.index[~units.cpu()].reshape(-1)] = False
                spread = _along(axis, member.dim, len(shape)).expand(shape)
                kept[member.name] = kept[member.name] & spread if member.name in kept else spread.clone()
                dims.setdefault(member.name, set()).add(member.dim)
        return MaskSet(
            {
                name: Mask(mask, Group(next(iter(dims[name]))) if len(dims[name]) == 1 else Unstructured())
                for name, mask in kept.items()
            }
        )

    def keep_from_masks(self, masks: MaskSet) -> dict[str, Tensor]:
        """Which units masks leave: a unit is dropped if all its readers or all its makers are masked for it.

        Masks on makers alone (a filter mask on a convolution's weight) are enough, although a bias or norm
        shift may still send a constant on; complete them with `masks(model, keep)` and see what the
        constant was worth. Families that nothing is dropped from are left out.
        """
        result = {}
        for name, family in self.items():
            dropped = torch.zeros(family.units, dtype=torch.bool)
            for role in ("out", "in"):
                members = [m for m in family.roles(role) if _is_weight(m)]
                if members and all(member.name in masks for member in members):
                    dead = [~_alive(masks[member.name].keep, member) for member in members]
                    dropped |= torch.stack(dead).all(0)
            if bool(dropped.any()):
                result[name] = ~dropped
        return result


def _is_weight(member: Member) -> bool:
    return not member.name.endswith("bias")


def _alive(keep: Tensor, member: Member) -> Tensor:
    """Per unit, whether any entry of its slices is kept."""
    rest = [axis for axis in range(keep.ndim) if axis != member.dim]
    slices = keep.any(dim=rest) if rest else keep
    return slices.cpu()[member.index].any(1)


def check_units(family: Family, units: Tensor) -> None:
    """Raises GroupError unless `units` is a bool vector with one entry per unit, at least one of them
    True."""
    if units.dtype != torch.bool or tuple(units.shape) != (family.units,):
        raise GroupError(
            f"{family.name}: expected a bool vector of {family.units} units, received {units.dtype} of shape "
            f"{tuple(units.shape)}."
        )
    if not bool(units.any()):
        raise GroupError(
            f"{family.name}: all units would be cut; keep one, or drop the layer with drop_layers."
        )
