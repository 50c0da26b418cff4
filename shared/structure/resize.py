"""Resizing a parameter's rows in place while it trains, its optimiser state carried along.

A set of points (3D Gaussians, say) grows and shrinks during training: rows are cloned, split, appended and
dropped in all of its tensors alike. The parameter keeps its name in the module and its place in the
optimiser; per-row state (`zoo.shared.masks.hold.PER_WEIGHT_STATE`: momentum, Adam's moments) moves with the
rows that stay and is zero for new ones; state of the whole tensor (the step) stays. A change costs one gather
per tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import MaskError, OptimizerStateError
from ..masks.hold import OTHER_STATE, PER_WEIGHT_STATE, unwrap_optimizer


class RowResizer:
    """Rows of several parameters of one module, changed together.

    Args:
        module: that owns the parameters.
        names: of parameters with the same first dimension N; as in `module.named_parameters()`.
        optimizers: that step them; a parameter that none of them steps has no state.

    Raises:
        MaskError: no such parameter, or first dimensions that differ.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], optimizers: Iterable[Optimizer] = ()) -> None:
        self.module, self.names = module, tuple(names)
        self.optimizers = [unwrap_optimizer(optimizer) for optimizer in optimizers]
        known = dict(module.named_parameters())
        if missing := [name for name in self.names if name not in known]:
            raise MaskError(f"{type(module).__name__} has no parameter {missing[0]!r} to resize")
        lengths = {name: len(known[name]) if known[name].dim() else 0 for name in self.names}
        if len(set(lengths.values())) != 1:
            raise MaskError(f"the parameters must have the same number of rows; received {lengths}")

    def __len__(self) -> int:
        return len(self.module.get_parameter(self.names[0]))

    def keep(self, rows: Bool[Tensor, " N"]) -> None:
        """Drop all rows but these.

        Raises:
            MaskError: not one entry per row.
        """
        if rows.dtype != torch.bool or rows.shape != (len(self),):
            raise MaskError(
                f"keep needs a bool for each of the {len(self)} rows; received {rows.dtype} "
                f"{tuple(rows.shape)}"
            )
        self._rebuild(rows.nonzero().flatten(), {})

    def append(self, values: Mapping[str, Float[Tensor, new * rest]]) -> None:
        """Add rows behind the others; their optimiser state starts at zero.

        Args:
            values: new rows for every one of the names.

        Raises:
            MaskError: a name is missing, or rows of another shape or number.
        """
        self._rebuild(torch.arange(len(self)), values)

    def clone(self, rows: Int[Tensor, " k"]) -> None:
        """Append copies of rows; the originals keep their optimiser state, the copies start at zero."""
        self.append({name: self._value(name)[self._index(name, rows)] for name in self.names})

    def split(self, rows: Int[Tensor, " k"], values: Mapping[str, Float[Tensor, new * rest]]) -> None:
        """Replace rows by new ones, which come behind the others with their optimiser state at zero.

        Args:
            rows: that go, each once.
            values: the new rows, any number of them, for every one of the names.

        Raises:
            MaskError: as for `append`.
        """
        staying = torch.ones(len(self), dtype=torch.bool)
        staying[rows.cpu()] = False
        self._rebuild(staying.nonzero().flatten(), values)

    def _value(self, name: str) -> Tensor:
        return self.module.get_parameter(name).detach()

    def _index(self, name: str, rows: Tensor) -> Tensor:
        return rows.to(self._value(name).device)

    def _check(self, values: Mapping[str, Tensor]) -> None:
        if not values:
            return
        if set(values) != set(self.names):
            raise MaskError(f"new rows are needed for {sorted(self.names)}; received {sorted(values)}")
        for name, value in values.items():
            own = self._value(name)
            if value.shape[1:] != own.shape[1:] or len(value) != len(values[self.names[0]]):
                raise MaskError(
                    f"new rows of {name!r} must be [new, {', '.join(map(str, own.shape[1:]))}], as many for "
                    f"each name; received {tuple(value.shape)}"
                )

    @torch.no_grad()
    def _rebuild(self, staying: Tensor, values: Mapping[str, Tensor]) -> None:
        self._check(values)
        states = {name: self._states(name) for name in self.names}  # all are checked before any is changed
        for name in self.names:
            old, index = self.module.get_parameter(name), self._index(name, staying)
            new = values[name].detach().to(old) if values else old.detach()[:0]
            parameter = nn.Parameter(torch.cat([old.detach()[index], new]), requires_grad=old.requires_grad)
            owner, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(owner), leaf, parameter)
            for optimizer, per_row in states[name]:
                self._replace(optimizer, old, parameter, per_row, index)

    def _states(self, name: str) -> list[tuple[Optimizer, list[str]]]:
        """The optimisers that step a parameter, and the keys of their state with a row per row of it."""
        parameter, found = self.module.get_parameter(name), []
        for optimizer in self.optimizers:
            if not any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                continue
            state = optimizer.state.get(parameter, {})
            if unknown := sorted(set(state) - PER_WEIGHT_STATE - OTHER_STATE):
                raise OptimizerStateError(
                    f"{type(optimizer).__name__} holds state {unknown[0]!r} for {name!r} whose meaning is "
                    "unknown, so rows cannot be carried; use a torch.optim optimiser"
                )
            rows = [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape]
            found.append((optimizer, rows))
        return found

    @staticmethod
    def _replace(
        optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, per_row: list[str], index: Tensor
    ) -> None:
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        if old not in optimizer.state:
            return
        state = optimizer.state.pop(old)
        for key in per_row:
            value = state[key]
            fresh = value.new_zeros((len(new) - len(index), *value.shape[1:]))
            state[key] = torch.cat([value[index.to(value.device)], fresh])
        optimizer.state[new] = state
